"""Samples: what a dataset returns, and how a batch of them becomes the arguments of a loss.

Two layouts exist. A *group* sample is one item and the group it belongs to (a class, usually). A *pair* sample is two
items and a score of their likeness. Everything that differs between them stands in a :class:`SampleLayout`, so that
loaders, caches and models never ask which one they have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from quatcache.errors import SampleError, shorten

__all__ = [
    "GROUPS",
    "LAYOUTS",
    "PAIRS",
    "ReadSample",
    "SampleColumns",
    "SampleLayout",
    "SimilarityGroupSample",
    "SimilarityPairSample",
    "columns_of",
    "in_columns",
    "read_sample",
]

_LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class SimilarityGroupSample:
    """An item and the group it belongs to; items of one group are alike.

    Attributes:
        obj: What the encoders take.
        group: Number of the group, or whatever the loss takes as target.

    Example:
        >>> SimilarityGroupSample(obj="how do I pay?", group=3).group
        3
    """

    obj: Any
    group: Any


@dataclass(frozen=True)
class SimilarityPairSample:
    """Two items and how alike they are.

    Attributes:
        obj_a: One item, for instance a question.
        obj_b: The other, for instance its answer.
        score: Likeness; for losses of in-batch negatives anything above 0 is a positive pair.
        subgroup: A number by which a loss may tell which pairs serve each other as negatives.

    Example:
        >>> SimilarityPairSample("how do I pay?", "by card").score
        1.0
    """

    obj_a: Any
    obj_b: Any
    score: float = 1.0
    subgroup: int = 0


Columns = tuple[Any, ...]
"""Targets of a batch by column: tensors ``(B, ...)``, or lists where values do not make a tensor."""


@dataclass(frozen=True)
class SampleLayout:
    """How samples of one kind are laid out in a batch.

    Attributes:
        name: Written into index tables.
        items_per_sample: Items k of one sample; the embeddings of a batch have shape ``(k * B, D)``, the first items
            of all samples before the second ones.
        loss_arguments: From the target columns of a batch to what the loss gets after the embeddings.
    """

    name: str
    items_per_sample: int
    loss_arguments: Callable[[Columns], Columns]


def _group_arguments(columns: Columns) -> Columns:
    """Give the groups ``(B,)``."""
    return columns


def _pair_arguments(columns: Columns) -> Columns:
    """Give pairs ``(B, 2)``, labels ``(B,)`` and subgroups ``(2B,)``."""
    labels, subgroups = columns
    size = len(labels)
    first = torch.arange(size, device=labels.device)
    return torch.stack([first, first + size], dim=1), labels, subgroups.repeat(2)


GROUPS = SampleLayout("group", 1, _group_arguments)
PAIRS = SampleLayout("pair", 2, _pair_arguments)
LAYOUTS: Mapping[str, SampleLayout] = {layout.name: layout for layout in (GROUPS, PAIRS)}


class ReadSample(NamedTuple):
    """A sample taken apart.

    Attributes:
        layout: Which kind it is.
        items: Its one or two items.
        targets: One value per target column: ``(group,)`` or ``(score, subgroup)``.
    """

    layout: SampleLayout
    items: tuple[Any, ...]
    targets: tuple[Any, ...]


class SampleColumns(NamedTuple):
    """N samples of one layout, taken apart.

    Attributes:
        layout: Which kind they are.
        items: Their N * k items, sample by sample.
        targets: For each target column its N values.
    """

    layout: SampleLayout
    items: list[Any]
    targets: tuple[Sequence[Any], ...]


def read_sample(sample: Any) -> ReadSample:
    """Take a sample apart.

    Args:
        sample: A :class:`SimilarityGroupSample`, a :class:`SimilarityPairSample`, a tuple or list ``(item, target)``,
            or a mapping with a ``label`` or ``labels`` entry: its one other entry is the item, or, if there are
            several, the mapping without the label.

    Raises:
        SampleError: It is none of these, or a pair whose score or subgroup is no number.

    Example:
        >>> read_sample({"text": "a gloss", "label": 4})[1:]
        (('a gloss',), (4,))
    """
    if type(sample) is tuple and len(sample) == 2:  # the common case first: a fill does little else for each row
        return ReadSample(GROUPS, sample[:1], sample[1:])
    if isinstance(sample, SimilarityGroupSample):
        return ReadSample(GROUPS, (sample.obj,), (sample.group,))
    if isinstance(sample, SimilarityPairSample):
        try:
            targets = float(sample.score), int(sample.subgroup)
        except (TypeError, ValueError):
            raise SampleError(
                f"a pair has score {shorten(sample.score)} and subgroup {shorten(sample.subgroup)}; give a number each."
            ) from None
        return ReadSample(PAIRS, (sample.obj_a, sample.obj_b), targets)
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return ReadSample(GROUPS, (sample[0],), (sample[1],))
    if isinstance(sample, Mapping):
        names = [name for name in _LABEL_NAMES if name in sample]
        if len(names) == 1 and len(sample) > 1:
            rest = {name: value for name, value in sample.items() if name != names[0]}
            item = next(iter(rest.values())) if len(rest) == 1 else rest
            return ReadSample(GROUPS, (item,), (sample[names[0]],))
    raise SampleError(
        f"the dataset returned {shorten(sample)}, a {type(sample).__name__}; return (item, target), a mapping with a "
        "'label' entry, a SimilarityGroupSample or a SimilarityPairSample, or override read_sample on the model."
    )


def in_columns(given: Sequence[Any], reader: Callable[[Any], Any]) -> SampleColumns:
    """Take samples apart and put them into columns.

    Args:
        given: N samples, at least one.
        reader: Takes one apart.

    Raises:
        SampleError: A sample is of no supported kind, or kinds are mixed.

    Example:
        >>> in_columns([("a", 0), ("b", 1)], read_sample)[1:]
        (['a', 'b'], ([0, 1],))
    """
    if reader is read_sample and set(map(type, given)) == {tuple} and set(map(len, given)) == {2}:
        # the common case, without an object for each sample: that takes three times as long, and many of them have
        # Python look for garbage in all that torch and Lightning hold
        return SampleColumns(GROUPS, [item for item, _ in given], ([target for _, target in given],))
    return columns_of([reader(sample) for sample in given])


def columns_of(samples: Sequence[ReadSample]) -> SampleColumns:
    """Put samples that were taken apart, at least one, into columns; see :func:`in_columns`."""
    layout, items = common_layout(samples), [item for sample in samples for item in sample.items]
    return SampleColumns(layout, items, tuple(zip(*(sample.targets for sample in samples), strict=True)))


def target_column(values: Sequence[Any]) -> Any:
    """Stack the values of one target column.

    Args:
        values: B values of one type.

    Returns:
        A tensor ``(B, ...)``: int64 for ints, bool for bools, the default float dtype for floats, the values' own
        dtype for tensors, arrays and NumPy scalars of one shape. Anything else stays a list.

    Example:
        >>> target_column([1.0, 0.5]), target_column(["a", "b"])
        (tensor([1.0000, 0.5000]), ['a', 'b'])
    """
    kinds = set(map(type, values))
    try:
        if kinds == {int} or kinds == {bool}:  # torch takes eight times as long to make a tensor of a list
            return torch.from_numpy(np.array(values, np.int64 if kinds == {int} else np.bool_))
        if kinds == {float}:
            return torch.from_numpy(np.array(values)).to(torch.get_default_dtype())
        if all(isinstance(value, torch.Tensor) for value in values):
            return torch.stack(list(values))
        if all(isinstance(value, np.ndarray | np.generic) for value in values):
            return torch.from_numpy(np.stack(values))
    except (RuntimeError, ValueError, TypeError, OverflowError):  # shapes differ, or values that torch cannot hold
        pass
    return list(values)


def target_columns(samples: Sequence[ReadSample]) -> Columns:
    """Stack the targets of B samples, column by column."""
    return tuple(target_column(column) for column in zip(*(sample.targets for sample in samples), strict=True))


def arranged_items(samples: Sequence[ReadSample]) -> list[Any]:
    """List the items of B samples as a batch has them: the first of every sample, then the second of every sample."""
    return [item for column in zip(*(sample.items for sample in samples), strict=True) for item in column]


def common_layout(samples: Sequence[ReadSample]) -> SampleLayout:
    """Give the layout that all samples share.

    Raises:
        SampleError: Groups and pairs are mixed.
    """
    layouts = {sample.layout.name for sample in samples}
    if len(layouts) > 1:
        raise SampleError(
            f"one batch mixes {' and '.join(sorted(layouts))} samples; let a dataset return one kind of sample."
        )
    return samples[0].layout
