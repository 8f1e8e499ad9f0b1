"""Counting keys before a fill: items, distinct items, and those whose rows are stored already.

Keys that an index table knows are not read. The others are read in random order until all are read or the time is up;
what was read by then is a random sample, from which the number of distinct items is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader

from quatcache.data.samples import LAYOUTS
from quatcache.keys import KeyArray, KeyIndex, distinct
from quatcache.store import Positions, RowStore
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.keying import Chunk
from quatcache.training.plan.forecast import DatasetPlan

__all__ = ["Epoch", "KeysOf", "Rows", "count", "epoch_of", "estimated_distinct", "random_parts", "read_keys"]

READ_SECONDS = 10.0
"""Reading for keys stops after so long."""


def estimated_distinct(keys: KeyArray, total: float) -> float:
    """Estimate how many distinct keys a population has, from a random sample without replacement.

    The first-order jackknife of Haas, Naughton, Seshadri and Stokes (1995), which PostgreSQL's ANALYZE uses as well:
    exact for a whole population, and the whole population where nothing repeats.

    Args:
        keys: The sample ``(n, 2)``.
        total: Size of the population, at least n.

    Example:
        >>> keys = np.array([[1, 0], [1, 0], [2, 0], [3, 0]])
        >>> estimated_distinct(keys, 4), estimated_distinct(keys, 40)
        (3.0, 5.454545454545454)
    """
    if not len(keys):
        return 0.0
    firsts, which = distinct(keys)
    once = int((np.bincount(which) == 1).sum())
    return len(firsts) / (1 - (1 - len(keys) / total) * once / len(keys))


@dataclass(frozen=True)
class Epoch:
    """What one loader draws in an epoch.

    Attributes:
        samples: How many.
        batch_size: In batches of so many.
    """

    samples: int
    batch_size: int


def epoch_of(loader: DataLoader[Any], batch_size: int) -> Epoch:
    """Find out what a loader draws, without drawing: that would disturb its generators.

    Args:
        loader: A loader with a batch size or a batch sampler.
        batch_size: Assumed for a batch sampler that tells nothing of itself.
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    if type(batches) is not BatchSampler:
        return Epoch(len(dataset), getattr(batches, "batch_size", None) or batch_size)  # type: ignore[arg-type]
    try:
        samples = len(batches.sampler)  # type: ignore[arg-type]
    except TypeError:
        samples = len(dataset)  # type: ignore[arg-type]
    return Epoch(samples - samples % batches.batch_size if batches.drop_last else samples, batches.batch_size)


@dataclass
class KeysOf:
    """The keys of one dataset, as far as they are known.

    Attributes:
        fill: The dataset, planned: what an index table knows of it is in ``fill.table``.
        epochs: What its loaders draw; one dataset may have several.
        read: Samples read by :func:`read_keys`.
        keys: For each encoder the keys that were read, in pieces ``(n, 2)``.
        width: Items of a sample.
    """

    fill: DatasetFill
    epochs: Sequence[Epoch] = ()
    read: int = 0
    keys: dict[str, list[KeyArray]] = field(default_factory=dict)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        """Look at one sample."""
        self.width = LAYOUTS[self.fill.chunk_reader[0].layout].items_per_sample

    @property
    def known(self) -> int:
        """Count the samples whose keys an index table knows."""
        return 0 if self.fill.table is None else len(self.fill.table)

    @property
    def unknown(self) -> int:
        """Count the samples that must be read for their keys."""
        return len(self.fill.dataset) - self.known

    @property
    def items(self) -> int:
        """Count the items."""
        return len(self.fill.dataset) * self.width

    @property
    def items_per_epoch(self) -> int:
        """Count the items that its loaders draw in an epoch."""
        return self.width * sum(epoch.samples for epoch in self.epochs)

    def take(self, chunk: Chunk) -> None:
        """Take in a chunk that was read."""
        self.read += len(chunk.indices)
        for encoder in self.fill.encoders:
            chunk = encoder.resolve(chunk)
            self.keys.setdefault(encoder.name, []).append(chunk.keys[encoder.scheme.row_column].reshape(-1, 2))

    def in_table(self, encoder: str) -> KeyArray:
        """Give the keys ``(n, 2)`` that the index table knows."""
        table = self.fill.table
        if table is None:
            return np.empty((0, 2), np.int64)
        (column,) = (one.scheme.row_column for one in self.fill.encoders if one.name == encoder)
        return table.keys[column].reshape(-1, 2)

    def sampled(self, encoder: str) -> KeyArray:
        """Give the keys ``(n, 2)`` that were read."""
        return np.concatenate([np.empty((0, 2), np.int64), *self.keys.get(encoder, ())])


def read_keys(datasets: Sequence[KeysOf], advance: Callable[[int], None], time_func: Callable[[], float]) -> None:
    """Read samples whose keys no table knows, in random order, until all are read or the time is up.

    Args:
        datasets: The datasets; what was read is put into them.
        advance: Told how many samples were read.
        time_func: Clock in seconds.
    """
    sizes = [data.unknown for data in datasets]
    deadline = time_func() + READ_SECONDS
    for place, indices in random_parts(sizes, 1024):
        data = datasets[place]
        data.take(data.fill.chunk_reader.__getitems__((indices + data.known).tolist()))
        advance(len(indices))
        if time_func() >= deadline:
            break


def random_parts(sizes: Sequence[int], step: int, limit: int | None = None) -> Iterator[tuple[int, Positions]]:
    """Draw from several datasets as from one: give the place of a dataset and indices into it, again and again."""
    ends = np.cumsum(sizes)
    order = np.random.default_rng(0).permutation(int(ends[-1]))[:limit]
    for start in range(0, len(order), step):
        part = order[start : start + step]
        owners = np.searchsorted(ends, part, side="right")
        for place in np.unique(owners).tolist():
            yield place, part[owners == place] - (ends[place] - sizes[place])


class Rows:
    """The rows of one identity: those in its store, and those that encoders counted before will put there.

    Args:
        store: The store; None: nothing persists.
    """

    def __init__(self, store: RowStore | None) -> None:
        """Start with what is stored."""
        self._store = store
        self._planned = KeyIndex()

    def plan(self, keys: KeyArray) -> None:
        """Count on these keys from now on."""
        firsts, _ = distinct(keys)
        self._planned.add(keys[firsts], np.arange(len(firsts)))

    def new(self, keys: KeyArray) -> KeyArray:
        """Give those keys whose rows no encoder counted before has."""
        return keys[self._planned.find(keys) < 0]

    def missing(self, keys: KeyArray) -> KeyArray:
        """Give those keys whose rows must be computed."""
        new = self.new(keys)
        return new if self._store is None else new[self._store.missing(new)]


def count(name: str, datasets: Sequence[KeysOf], encoder: str, rows: Rows) -> tuple[DatasetPlan, int]:
    """Count the items of some datasets for one encoder, those in index tables and those that were read.

    Args:
        name: For the counts.
        datasets: The datasets.
        encoder: Its name.
        rows: What it shares with other encoders and earlier runs.

    Returns:
        The counts, and how many distinct items have a row that no encoder counted before has.
    """
    known = np.concatenate([data.in_table(encoder) for data in datasets])
    sampled = np.concatenate([data.sampled(encoder) for data in datasets])
    unread = sum(data.unknown * data.width for data in datasets)
    drawn = len(sampled)
    items = sum(data.items for data in datasets)
    total = round(_distinct(known, sampled, drawn, unread))
    new = round(_distinct(rows.new(known), rows.new(sampled), drawn, unread))
    to_encode = round(_distinct(rows.missing(known), rows.missing(sampled), drawn, unread))
    return DatasetPlan(name, items, total, total - to_encode, to_encode, drawn < unread), new


def _distinct(known: KeyArray, sampled: KeyArray, drawn: int, unread: int) -> float:
    """Count distinct keys of two parts: one is wholly known, of the other ``drawn`` of ``unread`` were read."""
    index = KeyIndex()
    firsts, _ = distinct(known)
    index.add(known[firsts], np.arange(len(firsts)))
    if not drawn:  # a small dataset beside a huge one, not drawn from
        return len(firsts) + unread
    new = sampled[index.find(sampled) < 0]
    return len(firsts) + estimated_distinct(new, len(new) * unread / drawn)
