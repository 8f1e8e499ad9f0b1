"""Loaders whose batches get their rows in the process that trains: beside workers that read, or all from memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from quatcache.data.batches import INDICES, Batch, BatchReader, as_it_is
from quatcache.training.gathering import Drawn, RowGatherer
from quatcache.training.index_batches import IndexBatch, IndexBatches

__all__ = ["Aside", "GatheringLoader", "MemoryLoader"]


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
        self._check()
        return map(self._serve, super().__iter__())

    def _check(self) -> None:
        self.dataset.check_size()  # type: ignore[attr-defined]

    def _serve(self, batch: Batch) -> Batch:
        drawn = Drawn(self.aside.batch, self._drawn(batch))
        return drawn.batch() if self.gather.aside else self.gather(batch, drawn)

    def _drawn(self, batch: Batch) -> Any:
        return batch.inputs.pop(INDICES)


class MemoryLoader(DataLoader[Any]):
    """A loader whose batches are index operations, with no workers and no fetcher in between.

    Where a GPU has all rows, it has their numbers and the labels too, and gets the order of an epoch once: what happens
    in a step then happens there.

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
        self.dataset.check_size()  # type: ignore[attr-defined]
        device, reader = self.gather.resident, self.dataset
        if device is not None:
            reader = reader.with_columns(self.gather.columns_on(device, reader.columns))  # type: ignore[attr-defined]
        indices = IndexBatches(self.batch_sampler, len(self.dataset), device)  # type: ignore[arg-type]
        if not (self.seeds_once and self.seeded):
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            self.seeded = True
        waiting = deque(islice(indices, self.ahead))
        return self._batches(reader, indices, waiting)

    def _batches(self, reader: Any, indices: IndexBatches, waiting: deque[IndexBatch]) -> Iterator[Batch]:
        with self.gather.pages(reader.cached) as pages:
            for begun, batch in enumerate(self._pulled(indices, waiting), 1):
                pages.read_ahead(indices.known, begun)
                yield self._serve(reader, batch)

    def _pulled(self, indices: IndexBatches, waiting: deque[IndexBatch]) -> Iterator[IndexBatch]:
        if not self.ahead:
            yield from indices
        while waiting:
            batch = waiting.popleft()
            waiting.extend(islice(indices, 1))
            yield batch

    def _serve(self, reader: Any, batch: IndexBatch) -> Batch:
        drawn = Drawn(self.aside.batch, batch.drawn)
        if self.gather.aside:
            return drawn.batch()
        return self.gather(reader.cached(batch.where), drawn)
