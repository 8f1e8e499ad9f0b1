"""From one of the user's loaders to the one that takes its place for a run.

The new loader shares the sampler, the batch sampler and the generator with the old one, so it draws the same random
numbers at the same moments and gives the same samples in the same batches. Only what happens with the indices of a
batch is different. The user's loader itself is never touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

from quatcache.data.batches import INDICES, Batch, BatchReader, CachedColumns, collate_samples
from quatcache.errors import LoaderError
from quatcache.training.gathering import RowGatherer, batches_in
from quatcache.training.lightning import Trainer

__all__ = ["GatheringLoader", "MemoryLoader", "checked_loader", "convert_loader", "replace_rows"]

Collates = Mapping[str, Callable[[Sequence[Any]], Any]]
SampleReader = Callable[[Any], Any]


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
    gather: RowGatherer | None,
    plain: Callable[[], BatchReader] | None = None,
) -> DataLoader[Any]:
    """Build the loader that takes the place of the user's.

    Args:
        loader: A loader that passed :func:`checked_loader`.
        collates: For each encoder that is not cached, its collate function.
        reader: Takes a sample apart.
        columns: What is cached of the loader's dataset; None where nothing is.
        gather: Replaces row numbers by rows, in this process; None where nothing is cached.
        plain: Makes what reads batches as if nothing were cached, for when the cache steps aside.

    Returns:
        A loader of :class:`~quatcache.data.Batch`. Where encoders and labels are all cached it has no workers.
    """
    settings: dict[str, Any] = {"generator": loader.generator}
    from_memory = columns is not None and columns.targets is not None and not collates
    workers = _worker_settings(loader)
    if not from_memory:
        settings.update(workers)
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
        aside = _Aside(plain, workers)
        ahead = (loader.prefetch_factor or 0) * loader.num_workers
        seeds_once = loader.persistent_workers
        return MemoryLoader(view, gather=gather, aside=aside, ahead=ahead, seeds_once=seeds_once, **settings)
    if gather is None:
        return DataLoader(view, collate_fn=_as_it_is, **settings)
    return GatheringLoader(view, gather=gather, aside=_Aside(plain, workers), collate_fn=_as_it_is, **settings)


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


@dataclass
class _Aside:
    """How a loader goes on when the cache steps aside.

    Attributes:
        make_plain: Makes what reads batches as if nothing were cached.
        workers: Settings of the user's loader.
        loader: Takes the place of the loader from its next epoch on.
    """

    make_plain: Callable[[], BatchReader] | None
    workers: dict[str, Any]
    loader: DataLoader[Any] | None = None

    @cached_property
    def plain(self) -> BatchReader:
        """What reads batches as if nothing were cached."""
        assert self.make_plain is not None
        return self.make_plain()

    def epoch(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Start an epoch with the samplers of a loader, which may have got another one since it was made."""
        if self.loader is None:  # one for all epochs: its workers may be persistent
            own: Any = {"batch_sampler": loader.batch_sampler, "generator": loader.generator}
            self.loader = DataLoader(self.plain, collate_fn=_as_it_is, **own, **self.workers)
        return iter(self.loader)

    def batch(self, indices: Sequence[int] | torch.Tensor) -> Batch:
        """Read one batch, in this process."""
        return self.plain.__getitems__(indices.tolist() if isinstance(indices, torch.Tensor) else indices)


class GatheringLoader(DataLoader[Any]):
    """A loader that replaces the row numbers of each batch by the rows, in the process that trains.

    Lightning builds it anew from its attributes when it puts in a sampler, so ``gather`` and ``aside`` are some.

    Attributes:
        drawn: Indices of the batch that was given last.
    """

    def __init__(self, dataset: Any, *, gather: RowGatherer, aside: _Aside, **settings: Any) -> None:
        """Take the arguments of a ``DataLoader``, and what gathers."""
        super().__init__(dataset, **settings)
        self.gather = gather
        self.aside = aside
        self.drawn: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start an epoch now, not at its first batch: the base seed is drawn when a loader is asked for an iterator."""
        self.gather.look()
        if self.gather.aside:
            return self.aside.epoch(self)
        return map(self._serve, super().__iter__())

    def _serve(self, batch: Batch) -> Batch:
        self.drawn = batch.inputs.pop(INDICES)
        return self.aside.batch(self.drawn) if self.gather.aside else self.gather(batch)


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
        aside: Reads samples instead when the cache steps aside.
        ahead: Batches that the workers of the user's loader pull ahead; 0 without workers.
        seeds_once: Whether these workers are persistent.
        settings: Sampler, batch size, batch sampler and generator, as a ``DataLoader`` takes them.

    Attributes:
        drawn: Indices of the batch that was given last.
    """

    def __init__(
        self,
        dataset: BatchReader,
        *,
        gather: RowGatherer,
        aside: _Aside,
        ahead: int = 0,
        seeds_once: bool = False,
        **settings: Any,
    ) -> None:
        """Keep the arguments as attributes, from which Lightning builds the loader anew."""
        super().__init__(dataset, **settings)
        self.gather = gather
        self.aside = aside
        self.drawn: Any = None
        self.ahead = ahead
        self.seeds_once = seeds_once
        self._seeded = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Start an epoch now: what is drawn at its start is drawn when the iterator is asked for."""
        self.gather.look()
        if self.gather.aside:
            return self.aside.epoch(self)
        indices = _index_batches(self.batch_sampler)
        if not (self.seeds_once and self._seeded):
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            self._seeded = True
        waiting: deque[Sequence[int]] = deque(islice(indices, self.ahead))
        return self._batches(indices, waiting)

    def _batches(self, indices: Iterator[Sequence[int]], waiting: deque[Sequence[int]]) -> Iterator[Batch]:
        if not self.ahead:
            for batch in indices:
                yield self._serve(batch)
        while waiting:
            batch = waiting.popleft()
            waiting.extend(islice(indices, 1))
            yield self._serve(batch)

    def _serve(self, indices: Sequence[int]) -> Batch:
        self.drawn = indices
        if self.gather.aside:
            return self.aside.batch(indices)
        return self.gather(self.dataset.__getitems__(indices))  # type: ignore[attr-defined]


def replace_rows(batch: Any, loaders: Sequence[Any], trainer: Trainer) -> None:
    """Put what encoders take in the place of the rows of the batches that loaders gave last.

    Args:
        batch: What the combined loader gave, on the device of the trainer.
        loaders: Its loaders.
        trainer: Brings inputs where its model takes them.
    """
    for given, loader in zip(batches_in(batch), loaders, strict=True):
        if isinstance(loader, MemoryLoader | GatheringLoader):
            read = trainer.precision_plugin.convert_input(loader.aside.batch(loader.drawn))
            given.inputs.update(trainer.strategy.batch_to_device(read).inputs)
