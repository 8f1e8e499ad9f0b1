"""Samples taken apart into what is cached and what belongs to it, and put together as the dataset gave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quatcache.errors import SampleError, SlotValueError, shorten
from quatcache.store.slot_layout import SLOT_DTYPES
from quatcache.store.slot_values import as_tensor

__all__ = ["Part", "SampleParts", "own_copy"]


@dataclass(frozen=True)
class Part:
    """One part of a sample.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        kind: Its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: type

    @classmethod
    def of(cls, value: Any) -> Part:
        """Look at a part.

        Raises:
            SlotValueError: It is neither a tensor nor an array nor a number, or of a kind that no slot can have.
        """
        tensor = as_tensor(value)
        if tensor.dtype not in SLOT_DTYPES.values() or not tensor.numel():
            raise SlotValueError(f"{shorten(value)} is {tuple(tensor.shape)} {tensor.dtype}, which no slot can have.")
        if isinstance(value, torch.Tensor) and getattr(value, "__dict__", None):
            raise SlotValueError(f"a {type(value).__name__} is more than its numbers: it has {', '.join(vars(value))}.")
        return cls(tuple(tensor.shape), tensor.dtype, type(value))

    def given(self, values: torch.Tensor) -> Sequence[Any]:
        """Take values ``(n, *shape)`` apart into what the dataset would give."""
        if issubclass(self.kind, torch.Tensor):
            rows = values.unbind()
            return rows if self.kind is torch.Tensor else [row.as_subclass(self.kind) for row in rows]
        if issubclass(self.kind, (np.ndarray, np.generic)):
            return list(values.numpy())
        numbers = values.tolist()
        return numbers if self.kind in (bool, int, float) else list(map(self.kind, numbers))


@dataclass(frozen=True)
class SampleParts:
    """How the samples of a dataset are made of parts.

    Attributes:
        container: The type of a tuple, list or mapping; None where the sample is the item itself.
        keys: Those of a mapping.
        item: Which part is the item.
        parts: All of them.

    Example:
        >>> parts = SampleParts.of((torch.zeros(3), 7), (3,), torch.float32)
        >>> parts.item, parts.together([[torch.ones(3)], [8]])
        (0, [(tensor([1., 1., 1.]), 8)])
    """

    container: Any
    keys: tuple[Any, ...] | None
    item: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, sample: Any, shape: tuple[int, ...], dtype: torch.dtype) -> SampleParts:
        """Find the item, which is the first part of some shape and dtype.

        Raises:
            SampleError: No part is, or another part cannot be cached, or its container cannot be made anew.
        """
        keys = tuple(sample) if isinstance(sample, Mapping) else None
        container = type(sample) if isinstance(sample, (tuple, list, Mapping)) else None
        given = _values(sample, container, keys)
        try:
            parts = tuple(map(Part.of, given))
        except SlotValueError as error:
            raise SampleError(
                f"a part of a sample has no place in a slot: {error} Leave it out, or have the dataset itself call "
                "get_slot and set_slot of the cache."
            ) from error
        item = next((i for i, part in enumerate(parts) if (part.shape, part.dtype) == (shape, dtype)), None)
        if item is None:
            found = ", ".join(f"{part.shape} {part.dtype}" for part in parts)
            raise SampleError(f"a sample has {found or 'no part'}, the cache takes {shape} {dtype}; make it for one.")
        made = cls(container, keys, item, parts)
        try:
            made.together([[value] for value in given])
        except Exception as error:
            raise SampleError(
                f"a {type(sample).__name__} cannot be made of its parts ({error}); have the dataset return a tuple, a "
                "list or a dict."
            ) from error
        return made

    def apart(self, sample: Any) -> Sequence[Any]:
        """Take a sample apart.

        Raises:
            SampleError: It is not made like the first one.
        """
        same = self.container is None or type(sample) is self.container
        if same and self.keys is not None:
            same = set(sample) == set(self.keys)
        values = _values(sample, self.container, self.keys) if same else ()
        if len(values) != len(self.parts):
            raise SampleError(f"{shorten(sample)} is not made like the first sample, of {len(self.parts)} parts.")
        return values

    def together(self, columns: Sequence[Sequence[Any]]) -> list[Any]:
        """Make samples of the values of all parts."""
        container = self.container
        if container is None:
            return list(columns[0])
        rows = zip(*columns, strict=True)
        if container is tuple:
            return list(rows)
        if self.keys is not None:
            made = [dict(zip(self.keys, row, strict=True)) for row in rows]
            return made if container is dict else list(map(container, made))
        return list(map(getattr(container, "_make", container), rows))  # of a named tuple

    def with_item(self, samples: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
        """Change the items of samples."""
        columns: list[Sequence[Any]] = list(zip(*map(self.apart, samples), strict=True))
        columns[self.item] = [change(item) for item in columns[self.item]]
        return self.together(columns)


def own_copy(part: Any) -> Any:
    """Copy a tensor or an array; a number is given as it is."""
    return part.clone() if isinstance(part, torch.Tensor) else part.copy() if isinstance(part, np.ndarray) else part


def _values(sample: Any, container: Any, keys: tuple[Any, ...] | None) -> Sequence[Any]:
    if container is None:
        return (sample,)
    return tuple(sample) if keys is None else tuple(sample[key] for key in keys)
