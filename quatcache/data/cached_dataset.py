"""A dataset whose samples are computed once and then read from shared memory, by whatever process asks."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from typing_extensions import Self

from quatcache.data.batches import given_samples
from quatcache.data.cached_rows import rows_of
from quatcache.data.sample_parts import SampleParts, own_copy
from quatcache.errors import ConfigError, SampleError, SlotValueError, StaleRowsError
from quatcache.read_through import read_through
from quatcache.store.memory import assembled
from quatcache.store.protocol import Found, Positions
from quatcache.store.safetensors_writer import tensor_bytes
from quatcache.store.shared import SharedCache
from quatcache.store.slot_files import stored_slots
from quatcache.store.slot_layout import SET
from quatcache.store.slot_values import as_item

__all__ = ["CachedDataset"]

logger = logging.getLogger(__name__)


class CachedDataset(Dataset[Any]):
    """A map-style dataset whose samples are read through a shared cache.

    Samples are what the dataset gives, in the same types: a tensor or array of the shape and dtype of the cache, or a
    tuple, list or mapping in which the first such part is the item. Its other parts, such as labels, are numbers, or
    tensors or arrays of one shape; they are kept in shared memory of their own beside the cache.

    A ``DataLoader`` reads the cached samples of a batch in one go, and they are copied once, with workers or without.

    Args:
        dataset: Gives the same sample for an index each time: random augmentation belongs into ``transform``. The first
            sample is read twice; if the two differ, a warning says so.
        cache: Made for its length and its items.
        transform: Applied to the item at each read, cached or not; it may change what it gets.
        example: A sample such as the dataset gives, which is then not read, in the process that wraps it.

    Raises:
        ConfigError: The cache is for another number of samples.
        SampleError: No part of a sample fits the cache, or another part cannot be kept.

    Example:
        >>> images = [(torch.full((3, 4, 4), i, dtype=torch.uint8), i % 2) for i in range(10)]
        >>> cached = CachedDataset(images, SharedCache(1, len(images), (3, 4, 4)))
        >>> image, label = cached[3]
        >>> image.unique(), label, cached[3] is not None, cached.cache.stats().hits
        (tensor([3], dtype=torch.uint8), 1, True, 1)
    """

    def __init__(
        self,
        dataset: Any,
        cache: SharedCache,
        *,
        transform: Callable[[Any], Any] | None = None,
        example: Any = None,
    ) -> None:
        """Look at one sample, and take memory for the parts beside the item."""
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise SampleError(f"{type(dataset).__name__} has no indices or no length; give a map-style dataset.")
        if len(dataset) != cache.spec.samples:
            raise ConfigError(
                f"the dataset has {len(dataset)} samples, the cache is for {cache.spec.samples}; make it with "
                f"dataset_len={len(dataset)}."
            )
        self.dataset = dataset
        self.cache = cache
        self.transform = transform
        sample = dataset[0] if example is None else example
        self._store = _SampleStore.of(cache, SampleParts.of(sample, cache.spec.dims, cache.spec.dtype))
        self._batches = replace(self._store, together=True)
        if example is None and not self._store.same(sample, dataset[0]):
            logger.warning(
                "%s gives another sample 0 each time, and every later epoch would get the first one: leave out what is "
                "random, and give it to CachedDataset(..., transform=...).",
                type(dataset).__name__,
            )

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Give one sample.

        Raises:
            SlotIndexError: The index is negative, or beyond the dataset.
        """
        index = operator.index(index)
        sample = self._store.get(index)
        if sample is None:
            return self._read(self._store, [index], Found(np.empty(0, np.int64), []))[0]
        return sample if self.transform is None else self._store.parts.with_item([sample], self.transform)[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Give many samples: what a loader asks for a batch; errors as for one."""
        store = self._batches if self.transform is None else self._store
        return self._read(store, list(map(operator.index, indices)))

    def _read(self, store: _SampleStore, indices: list[int], found: Found | None = None) -> list[Any]:
        fresh = False

        def compute(positions: Positions) -> list[Any]:
            nonlocal fresh
            fresh = True
            return list(given_samples(self.dataset, [indices[position] for position in positions.tolist()]))

        samples = read_through(indices, compute, store, found=found)
        if self.transform is None or not samples:
            return samples
        if fresh:  # the dataset may keep what it gives, and of an index asked for twice there is one sample
            samples = store.parts.with_item(samples, own_copy)
        return store.parts.with_item(samples, self.transform)

    def save(self, folder: str | os.PathLike[str]) -> int:
        """Write what is cached into a folder: a file for the items, and one for each part beside them.

        Returns:
            How many items there are.

        Raises:
            StoreError: The folder cannot be written.
        """
        return [cache.save(path) for path, cache in self._store.files(Path(folder))][-1]

    def load(self, folder: str | os.PathLike[str], *, verify: int = 3) -> int:
        """Fill empty slots from a folder of :meth:`save`.

        Args:
            folder: The folder.
            verify: So many of its samples are compared with those of the dataset before any is used.

        Returns:
            How many slots were filled.

        Raises:
            FormatError: A file is missing, damaged, or of other items.
            StaleRowsError: A sample is not what the dataset gives: it was edited or reordered, or is random.
            StoreError: A file cannot be read.
        """
        files = self._store.files(Path(folder))
        self._verify(files, verify)
        return [cache.load(path) for path, cache in files][-1]

    def _verify(self, files: Sequence[tuple[Path, SharedCache]], count: int) -> None:
        cached, _, _ = stored_slots(files[-1][0], self.cache.spec)
        places = np.unique(np.linspace(0, len(cached) - 1, min(count, len(cached)), dtype=np.int64))
        wanted = cached.numpy()[places]
        if not len(wanted):
            return
        columns = self._store.columns(wanted.tolist(), given_samples(self.dataset, wanted.tolist()))
        for (path, cache), column in zip(files, columns, strict=True):
            indices, values, _ = stored_slots(path, cache.spec)
            places = np.searchsorted(indices.numpy(), wanted)
            for place, index, value in zip(places.tolist(), wanted.tolist(), column, strict=True):
                there = place < len(indices) and int(indices[place]) == index
                if there and tensor_bytes(value) != tensor_bytes(values[place]):
                    raise StaleRowsError(
                        f"sample {index} in {path} is not what the dataset gives; delete the folder if the data were "
                        "changed, and keep what is random out of what is cached."
                    )


@dataclass(frozen=True)
class _SampleStore:
    """Slots as a store of samples by index, for ``read_through``.

    The parts beside an item are written before it and looked for after it: whoever finds an item finds its label.

    Attributes:
        parts: How samples are made.
        caches: A cache for each part.
        together: Whether the items that are found stay one batch.
    """

    parts: SampleParts
    caches: tuple[SharedCache, ...]
    together: bool = False

    @classmethod
    def of(cls, cache: SharedCache, parts: SampleParts) -> Self:
        """Take memory for the parts beside the item."""
        caches = (
            cache if place == parts.item else cache.beside(f"part{place}", part.shape, part.dtype)
            for place, part in enumerate(parts.parts)
        )
        return cls(parts, tuple(caches))

    @property
    def order(self) -> list[int]:
        """The parts, the item last."""
        return [*(place for place in range(len(self.caches)) if place != self.parts.item), self.parts.item]

    def files(self, folder: Path) -> list[tuple[Path, SharedCache]]:
        """Say where each part is kept, the item last."""
        names = [f"part{place}" for place in self.order[:-1]] + ["items"]
        return [(folder / f"{name}.safetensors", self.caches[i]) for name, i in zip(names, self.order, strict=True)]

    def __len__(self) -> int:
        return self.caches[self.parts.item].stats().present

    def missing(self, keys: Sequence[int]) -> Positions:
        """Give the positions of the samples that are not cached whole."""
        indices = torch.tensor(keys, dtype=torch.int64)
        absent = torch.stack([cache.aux_array[indices] != SET for cache in self.caches]).any(dim=0)
        return np.flatnonzero(absent.numpy())

    def get(self, key: int) -> Any:
        """Give one sample, or None if it is not cached whole."""
        item = self.caches[self.parts.item].copy_slot(key)
        if item is None:
            return None
        columns = []
        for place, part in enumerate(self.parts.parts):
            value = item if place == self.parts.item else self.caches[place].copy_slot(key)
            if value is None:
                return None
            columns.append([value] if part.kind is torch.Tensor else part.given(value[None]))
        return self.parts.together(columns)[0]

    def get_many(self, keys: Sequence[int]) -> Found:
        """Give the samples that are cached whole."""
        item, wanted = self.parts.item, np.asarray(keys)
        positions, items = self.caches[item].get_slots(wanted, shared=self.together and get_worker_info() is not None)
        columns: list[Sequence[Any]] = []
        for place, (part, cache) in enumerate(zip(self.parts.parts, self.caches, strict=True)):
            if place == item:
                columns.append(rows_of(items) if self.together and part.kind is torch.Tensor else part.given(items))
                continue
            beside = cache.get_slots(wanted[positions])
            if len(beside.positions) < len(positions):  # cleared meanwhile, or not loaded: it is the others, then
                kept = positions[beside.positions]
                whole = self.get_many(wanted[kept].tolist())
                return Found(kept[whole.positions], whole.values)
            columns.append(part.given(beside.values))
        return Found(positions, self.parts.together(columns))

    def put_many(self, keys: Sequence[int], values: Sequence[Any]) -> None:
        """Write samples that were computed; if one does not fit, none is written."""
        columns = self.columns(keys, values)
        for place, column in zip(self.order, columns, strict=True):  # a label of an item that was cleared is an old one
            self.caches[place].set_slots(keys, column, allow_overwrite=None if place == self.parts.item else True)

    def columns(self, keys: Sequence[int], samples: Sequence[Any]) -> list[torch.Tensor]:
        """Give each part of samples as slots hold it, the item last."""
        columns = list(zip(*map(self.parts.apart, samples), strict=True))
        return [_stacked(self.caches[place], keys, columns[place]) for place in self.order]

    def same(self, one: Any, other: Any) -> bool:
        """Say whether two samples are equal, bit for bit."""
        columns = zip(self.columns([0], [one]), self.columns([0], [other]), strict=True)
        return all(tensor_bytes(value) == tensor_bytes(again) for value, again in columns)

    def assemble(self, size: int, parts: Sequence[Found]) -> list[Any]:
        """Put samples in the order of their positions."""
        return assembled(size, parts)


def _stacked(cache: SharedCache, keys: Sequence[int], values: Sequence[Any]) -> torch.Tensor:
    tensors = []
    for key, value in zip(keys, values, strict=True):
        try:
            tensors.append(as_item(value, cache.spec))
        except SlotValueError as error:
            raise SlotValueError(f"sample {key} of the dataset: {error}") from error
    return torch.stack(tensors)
