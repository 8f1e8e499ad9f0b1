"""Views: for datasets that augment, several versions of each sample are cached, and one is chosen per epoch.

A dataset that draws random numbers when it is read gives another item each time, and a cache would keep one of them
for ever. So it is read under seeds: view *v* of sample *i* is what the dataset returns when Python, NumPy and torch
were seeded with a number made of *i* and *v*. The same numbers give the same views in the next run, which finds their
rows. To the fill, a dataset of N samples in V views is one of N * V samples, sample by sample: it can grow at its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from xxhash import xxh3_64_intdigest

from quatcache.data.batches import INDICES, Batch, BatchReader, CachedColumns
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import ConfigError, KeyTypeError
from quatcache.training.keying import ChunkReader
from quatcache.training.verify import reread

__all__ = ["ViewChoice", "ViewReader", "Views", "as_views", "changing"]

SECONDS = 0.1
"""Time in which it is tried whether a dataset augments; 64 samples are read twice in any case."""


class Views(Dataset[Any]):
    """A dataset in V seeded views: sample ``i * V + v`` is view *v* of sample *i*.

    Args:
        dataset: The user's map-style dataset, which draws from the global generators of Python, NumPy or torch.
        count: How many views each sample has.

    Example:
        >>> class Noisy:
        ...     def __len__(self): return 2
        ...     def __getitem__(self, index): return index + torch.rand(()).item(), 0
        >>> views = Views(Noisy(), 3)
        >>> len(views), views[1] == views[1], views[1] == views[2]
        (6, True, False)
    """

    def __init__(self, dataset: Any, count: int) -> None:
        """Read nothing yet."""
        self.dataset = dataset
        self.count = count

    def __len__(self) -> int:
        """Count the views of all samples."""
        return len(self.dataset) * self.count

    def __getitem__(self, place: int) -> Any:
        """Read one view."""
        index, view = divmod(place, self.count)
        with _seeded(index, view):
            return self.dataset[index]


@contextmanager
def _seeded(index: int, view: int) -> Iterator[None]:
    """Seed the global generators, and leave them as they were found."""
    seed = xxh3_64_intdigest(f"view {view} of sample {index}".encode())
    of_python, of_numpy = random.getstate(), np.random.get_state()  # what datasets draw from
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
            torch.default_generator.manual_seed(seed >> 1)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def as_views(dataset: Any, read_sample: Callable[[Any], Any], count: int) -> Any:
    """Give a dataset in views if it gives other items each time it is read, else the dataset itself.

    Args:
        dataset: A map-style dataset.
        read_sample: Takes a sample apart.
        count: How many views each sample has.
    """
    if count == 1 or not hasattr(dataset, "__len__") or not len(dataset):
        return dataset
    try:
        item, _ = reread(ChunkReader(dataset, read_sample, [KeyScheme("views")]), seconds=SECONDS)
    except KeyTypeError:  # it cannot be told
        item = 0
    return dataset if item is None else Views(dataset, count)


def changing(name: str, dataset: Any, item: int) -> ConfigError:
    """Say that a dataset gives other items each time it is read.

    Args:
        name: What it is for.
        dataset: The dataset, perhaps in views.
        item: One that differed between two reads.
    """
    if isinstance(dataset, Views):
        index, view = divmod(item, dataset.count)
        return ConfigError(
            f"view {view} of item {index} of the {name} dataset differs between two reads, though the global "
            "generators of Python, NumPy and torch were seeded alike; let its transforms draw from these, or return "
            "None from configure_caches()."
        )
    return ConfigError(
        f"item {item} of the {name} dataset differs between two reads, and a cache would keep one of them for ever; "
        "use a fixed transform for it, set num_views to cache several versions of each, or return None from "
        "configure_caches()."
    )


def _shared_zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call,no-any-return]


@dataclass
class ViewChoice:
    """Chooses the view of each sample of a batch.

    In each epoch a sample has another view than in the one before, and after V epochs it had all of them; which one it
    begins with differs from sample to sample.

    Attributes:
        count: How many views each sample has.
        epoch: The epoch, in memory that the workers of a loader share.
    """

    count: int
    epoch: torch.Tensor = field(default_factory=_shared_zero)

    def begin(self, epoch: int) -> None:
        """Note which epoch it is."""
        self.epoch.fill_(epoch)

    def __call__(self, where: torch.Tensor) -> torch.Tensor:
        """Turn indices of samples ``(B,)`` into those of their views."""
        scattered = (where * 0x9E3779B1) >> 15  # Knuth's multiplicative hashing: neighbours begin with other views
        return where * self.count + (scattered + self.epoch) % self.count


@dataclass
class ViewReader(Dataset[Any]):
    """Batches of a dataset in views, as batches of the dataset.

    Attributes:
        inner: Reads batches of views.
        choice: Chooses them.
    """

    inner: Any
    choice: ViewChoice

    @property
    def plain(self) -> BatchReader:
        """What reads batches whose rows are all there."""
        return self.inner.plain  # type: ignore[no-any-return]

    @property
    def columns(self) -> CachedColumns | None:
        """What is cached of the dataset in views."""
        return self.inner.columns  # type: ignore[no-any-return]

    def with_columns(self, columns: CachedColumns) -> ViewReader:
        """Give the same reader over other columns."""
        return self.over(self.inner.with_columns(columns))

    def over(self, inner: Any) -> ViewReader:
        """Read with another reader."""
        return ViewReader(inner, self.choice)

    def check_size(self) -> None:
        """Refuse a dataset that became longer or shorter; see :meth:`BatchReader.check_size`."""
        self.inner.check_size()

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.inner) // self.choice.count

    def __getitem__(self, index: int) -> Batch:
        """Give a batch of one sample."""
        return self.__getitems__([index])

    def cached(self, where: torch.Tensor) -> Batch:
        """Give a batch of which everything is cached; see :meth:`quatcache.data.batches.BatchReader.cached`."""
        return self.inner.cached(self.choice(where))  # type: ignore[no-any-return]

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> Batch:
        """Give the batch of these samples, each in the view of the epoch."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        where = torch.where(where < 0, where + len(self), where)
        batch = self.inner.__getitems__(self.choice(where))
        if INDICES in batch.inputs:
            batch.inputs[INDICES] = where
        return batch  # type: ignore[no-any-return]
