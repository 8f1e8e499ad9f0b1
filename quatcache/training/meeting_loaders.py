"""Loaders of samples that may lack rows: of a dataset that is cached as it is met, or in part, and of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from quatcache.data.batches import Batch, BatchReader, CachedColumns, collate_items, collate_samples
from quatcache.training.gathering_loaders import GatheringLoader, MemoryLoader
from quatcache.training.meeting import UNMET, MeetingReader

__all__ = ["CollateSamples", "MeetingLoader", "StreamAside", "StreamLoader"]

Collates = Mapping[str, Callable[[Sequence[Any]], Any]]
SampleReader = Callable[[Any], Any]


class MeetingLoader(GatheringLoader):
    """A loader of a dataset whose samples may lack rows; it gathers from memory once none does.

    Attributes:
        columns: Called at the start of an epoch; gives what is known of the dataset then.
        draws: When the user's loader draws random numbers; see :class:`MemoryLoader`.
    """

    def __init__(
        self, dataset: MeetingReader, *, columns: Callable[[], CachedColumns], draws: dict[str, Any], **settings: Any
    ) -> None:
        """Take the arguments of a :class:`GatheringLoader`."""
        super().__init__(dataset, **settings)
        self.columns = columns
        self.draws = draws
        self.begun = False
        self.memory: MemoryLoader | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start an epoch with what is known now."""
        self.gather.look()
        if not self.gather.aside:
            view: BatchReader = self.dataset.plain  # type: ignore[attr-defined]
            view.columns = columns = self.columns()
            if columns.targets is not None and columns.complete and not view.collates:
                return self._from_memory(view)
        self.begun = True
        return super().__iter__()

    def _from_memory(self, view: BatchReader) -> Iterator[Any]:
        if self.memory is None:
            self._iterator = None  # ends persistent workers
            own: Any = {"batch_sampler": self.batch_sampler, "generator": self.generator, **self.draws}
            source = self.dataset.over(view)  # type: ignore[attr-defined]
            self.memory = MemoryLoader(source, gather=self.gather, aside=self.aside, **own)
            self.memory.seeded = self.begun
        return iter(self.memory)


@dataclass
class StreamAside:
    """How a loader of a stream goes on when the cache steps aside.

    Attributes:
        make_collates: Gives the collate functions of all encoders.
        reader: Takes a sample apart.
        settings: Of the user's loader.
        loader: Takes the place of the loader from its next epoch on.
    """

    make_collates: Callable[[], Collates]
    reader: SampleReader
    settings: dict[str, Any]
    loader: DataLoader[Any] | None = None

    def epoch(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Start an epoch of the stream."""
        if self.loader is None:  # one for all epochs: its workers may be persistent
            collate = CollateSamples(self.make_collates(), self.reader)
            self.loader = DataLoader(loader.dataset, collate_fn=collate, **self.settings)
        return iter(self.loader)

    def batch(self, batch: Batch) -> Batch:
        """Collate the samples of a batch for the encoders that were cached."""
        inputs = dict(batch.inputs)
        chunk = inputs.pop(UNMET).chunk
        items = [chunk.items[position] for position in chunk.batch_order.tolist()]
        for name, collate in self.make_collates().items():
            if name not in inputs:
                inputs[name] = collate_items(name, collate, items)
        return Batch(inputs, batch.targets)


class StreamLoader(GatheringLoader):
    """A loader of an iterable dataset, all of whose samples are looked up by key."""

    def _check(self) -> None:
        """Do without: a stream has no length."""

    def _drawn(self, batch: Batch) -> Any:
        return batch  # a stream cannot be asked for it again


@dataclass
class CollateSamples:
    """Collates samples of an iterable dataset, which has no indices to read by."""

    collates: Collates
    reader: SampleReader

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """Give the batch of these samples."""
        return collate_samples([self.reader(sample) for sample in samples], self.collates)
