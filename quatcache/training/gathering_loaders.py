"""Loaders whose batches get their rows in the process that trains: beside workers that read, or all from memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from quatcache.data.batches import INDICES, Batch, BatchReader
from quatcache.training.gathering import Drawn, RowGatherer

__all__ = ["Aside", "GatheringLoader", "MemoryLoader", "as_it_is"]


def as_it_is(batch: Any) -> Any:
    """Give a batch that a dataset made whole."""
    return batch


@dataclass
class Aside:
    """How a loader goes on when the cache steps aside.

    Attributes:
        make_plain: Makes what reads batches as if nothing were cached.
        workers: Settings of the user's loader.
        loader: Takes the place of the loader from its next epoch on.
    """

    make_plain: Callable[[], BatchReader]
    workers: dict[str, Any]
    loader: DataLoader[Any] | None = None

    @cached_property
    def plain(self) -> BatchReader:
        """What reads batches as if nothing were cached."""
        return self.make_plain()

    def epoch(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Start an epoch with the samplers of a loader, which may have got another one since it was made."""
        if self.loader is None:  # one for all epochs: its workers may be persistent
            own: Any = {"batch_sampler": loader.batch_sampler, "generator": loader.generator}
            self.loader = DataLoader(self.plain, collate_fn=as_it_is, **own, **self.workers)
        return iter(self.loader)

    def batch(self, indices: Sequence[int] | torch.Tensor) -> Batch:
        """Read one batch, in this process."""
        return self.plain.__getitems__(indices.tolist() if isinstance(indices, torch.Tensor) else indices)


class GatheringLoader(DataLoader[Any]):
    """A loader that replaces the row numbers of each batch by the rows, in the process that trains.

    Lightning builds it anew from its attributes when it puts in a sampler, so ``gather`` and ``aside`` are some.
    """

    def __init__(self, dataset: Any, *, gather: RowGatherer, aside: Any, **settings: Any) -> None:
        """Take the arguments of a ``DataLoader``, and what gathers."""
        super().__init__(dataset, **settings)
        self.gather = gather
        self.aside = aside

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start an epoch now, not at its first batch: the base seed is drawn when a loader is asked for an iterator."""
        self.gather.look()
        if self.gather.aside:
            return self.aside.epoch(self)  # type: ignore[no-any-return]
        return map(self._serve, super().__iter__())

    def _serve(self, batch: Batch) -> Batch:
        drawn = Drawn(self.aside.batch, self._drawn(batch))
        return drawn.batch() if self.gather.aside else self.gather(batch, drawn)

    def _drawn(self, batch: Batch) -> Any:
        return batch.inputs.pop(INDICES)


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
        seeded: Whether the workers, being persistent, have drawn their seed.
    """

    def __init__(
        self,
        dataset: BatchReader,
        *,
        gather: RowGatherer,
        aside: Aside,
        ahead: int = 0,
        seeds_once: bool = False,
        **settings: Any,
    ) -> None:
        """Keep the arguments as attributes, from which Lightning builds the loader anew."""
        super().__init__(dataset, **settings)
        self.gather = gather
        self.aside = aside
        self.ahead = ahead
        self.seeds_once = seeds_once
        self.seeded = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Start an epoch now: what is drawn at its start is drawn when the iterator is asked for."""
        self.gather.look()
        if self.gather.aside:
            return self.aside.epoch(self)
        indices = _index_batches(self.batch_sampler)
        if not (self.seeds_once and self.seeded):
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            self.seeded = True
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
        drawn = Drawn(self.aside.batch, indices)
        if self.gather.aside:
            return drawn.batch()
        return self.gather(self.dataset.__getitems__(indices), drawn)  # type: ignore[attr-defined]
