"""From one of the user's loaders to the one that takes its place for a run.

The new loader shares the sampler, the batch sampler and the generator with the old one, so it draws the same random
numbers at the same moments and gives the same samples in the same batches. Only what happens with the indices of a
batch is different. The user's loader itself is never touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from quatcache.data.batches import Batch, BatchReader, CachedColumns, collate_samples
from quatcache.errors import LoaderError

__all__ = ["MemoryLoader", "checked_loader", "convert_loader"]

Collates = Mapping[str, Callable[[Sequence[Any]], Any]]
SampleReader = Callable[[Any], Any]
Gather = Callable[[Batch], Batch]


def checked_loader(loader: Any, name: str) -> DataLoader[Any]:
    """Refuse a loader whose batches could not be reproduced.

    Args:
        loader: What the user passed or a hook returned.
        name: What it is for, for the message.

    Raises:
        LoaderError: It is no ``DataLoader``, iterates in a way of its own, collates itself, or does not batch.
    """
    if not isinstance(loader, DataLoader):
        raise LoaderError(
            f"the {name} loader is a {type(loader).__name__}; pass a torch.utils.data.DataLoader over a dataset of "
            "samples."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise LoaderError(
            f"the {name} loader is a {type(loader).__name__} with an __iter__ of its own, whose batches cannot be "
            "reproduced from a cache; pass a plain DataLoader with a sampler or batch sampler instead."
        )
    if loader.batch_sampler is None:
        raise LoaderError(
            f"the {name} loader has batch_size=None, so its dataset returns batches; let the dataset return samples, "
            "and give the loader a batch_size or a batch_sampler."
        )
    if loader.collate_fn is not default_collate:
        collate = getattr(loader.collate_fn, "__qualname__", loader.collate_fn)
        raise LoaderError(
            f"the {name} loader has a collate_fn of its own ({collate}), but the model collates samples through its "
            "encoders; leave collate_fn unset, and override read_sample on the model if the samples need it."
        )
    return loader


def convert_loader(
    loader: DataLoader[Any],
    collates: Collates,
    reader: SampleReader,
    columns: CachedColumns | None,
    gather: Gather | None,
) -> DataLoader[Any]:
    """Build the loader that takes the place of the user's.

    Args:
        loader: A loader that passed :func:`checked_loader`.
        collates: For each encoder that is not cached, its collate function.
        reader: Takes a sample apart.
        columns: What is cached of the loader's dataset; None where nothing is.
        gather: Replaces row numbers by rows, in this process; None where nothing is cached.

    Returns:
        A loader of :class:`~quatcache.data.Batch`. Where encoders and labels are all cached it has no workers.
    """
    settings: dict[str, Any] = {"generator": loader.generator}
    from_memory = columns is not None and columns.targets is not None and not collates
    if not from_memory:
        settings.update(_worker_settings(loader))
    if isinstance(loader.dataset, IterableDataset):
        settings.update(batch_size=loader.batch_size, drop_last=loader.drop_last)
        return DataLoader(loader.dataset, collate_fn=_CollateSamples(collates, reader), **settings)
    if loader.batch_size is not None:  # in parts: Lightning puts a distributed sampler in place of the sampler
        settings.update(sampler=loader.sampler, batch_size=loader.batch_size, drop_last=loader.drop_last)
    else:
        settings["batch_sampler"] = loader.batch_sampler
    view = BatchReader(loader.dataset, collates, reader, columns)
    if from_memory:
        assert gather is not None
        ahead = (loader.prefetch_factor or 0) * loader.num_workers
        return MemoryLoader(view, gather=gather, ahead=ahead, seeds_once=loader.persistent_workers, **settings)
    if gather is None:
        return DataLoader(view, collate_fn=_as_it_is, **settings)
    return GatheringLoader(view, gather=gather, collate_fn=_as_it_is, **settings)


def _worker_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    names = [
        "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
        "persistent_workers", "pin_memory_device", "in_order",
    ]  # fmt: skip
    return {name: getattr(loader, name) for name in names if hasattr(loader, name)}


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass
class _CollateSamples:
    """Collates samples of an iterable dataset, which has no indices to read by."""

    collates: Collates
    reader: SampleReader

    def __call__(self, samples: Sequence[Any]) -> Batch:
        return collate_samples([self.reader(sample) for sample in samples], self.collates)


class GatheringLoader(DataLoader[Any]):
    """A loader that replaces the row numbers of each batch by the rows, in the process that trains.

    Lightning builds it anew from its attributes when it puts in a sampler, so ``gather`` is one.
    """

    def __init__(self, dataset: Any, *, gather: Gather, **settings: Any) -> None:
        """Take the arguments of a ``DataLoader``, and the gathering function."""
        super().__init__(dataset, **settings)
        self.gather = gather

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start an epoch now, not at its first batch: the base seed is drawn when a loader is asked for an iterator."""
        return map(self.gather, super().__iter__())


def _index_batches(batches: Any) -> Iterator[Any]:
    """Iterate over a batch sampler; in index tensors where that gives the same indices and draws the same numbers."""
    sampler = getattr(batches, "sampler", None)
    if type(batches) is BatchSampler and type(sampler) is SequentialSampler:
        return _tensor_batches(batches, lambda size: torch.arange(size), len(sampler), None)
    if type(batches) is BatchSampler and type(sampler) is RandomSampler and not sampler.replacement:
        size = len(sampler.data_source)
        if sampler.num_samples == size:
            return _tensor_batches(batches, None, size, sampler)
    return iter(batches)


def _tensor_batches(
    batches: BatchSampler, order: Callable[[int], torch.Tensor] | None, size: int, sampler: RandomSampler | None
) -> Iterator[torch.Tensor]:
    generator = None
    if sampler is not None:  # what RandomSampler.__iter__ does, less a Python number per index
        generator = sampler.generator
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    positions = torch.randperm(size, generator=generator) if order is None else order(size)
    whole = size - size % batches.batch_size
    if whole:  # an empty tensor splits into one empty part
        yield from torch.split(positions[:whole], batches.batch_size)
    if sampler is not None:  # it draws once more when it is asked for an index past its last
        torch.randperm(size, generator=generator)
    if whole < size and not batches.drop_last:
        yield positions[whole:]


class MemoryLoader(DataLoader[Any]):
    """A loader whose batches are index operations, with no workers and no fetcher in between.

    A ``DataLoader`` draws a base seed for its workers from the generator, once an epoch or once for ever with
    persistent workers, and workers pull batches from the sampler ahead of time. Where a sampler or a model draws from
    the same generator, all of this decides the batches; so it happens here at the same moments.

    Args:
        dataset: What gives the batch for a list of indices.
        gather: Replaces row numbers by rows.
        ahead: Batches that the workers of the user's loader pull ahead; 0 without workers.
        seeds_once: Whether these workers are persistent.
        settings: Sampler, batch size, batch sampler and generator, as a ``DataLoader`` takes them.
    """

    def __init__(
        self, dataset: BatchReader, *, gather: Gather, ahead: int = 0, seeds_once: bool = False, **settings: Any
    ) -> None:
        """Keep the arguments as attributes, from which Lightning builds the loader anew."""
        super().__init__(dataset, **settings)
        self.gather = gather
        self.ahead = ahead
        self.seeds_once = seeds_once
        self._seeded = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Start an epoch now: what is drawn at its start is drawn when the iterator is asked for."""
        indices = _index_batches(self.batch_sampler)
        if not (self.seeds_once and self._seeded):
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            self._seeded = True
        waiting: deque[Sequence[int]] = deque(islice(indices, self.ahead))
        return self._batches(indices, waiting)

    def _batches(self, indices: Iterator[Sequence[int]], waiting: deque[Sequence[int]]) -> Iterator[Batch]:
        read, gather = self.dataset.__getitems__, self.gather  # type: ignore[attr-defined]
        if not self.ahead:
            for batch in indices:
                yield gather(read(batch))
        while waiting:
            batch = waiting.popleft()
            waiting.extend(islice(indices, 1))
            yield gather(read(batch))
