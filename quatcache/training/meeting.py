"""Batches of samples whose rows may not be there yet: read and keyed where the loader runs, answered where it trains.

A loader reads and keys the samples of a batch that have no row, in its workers if it has any, and sends their items
along. In the process that trains each encoder answers for them with one look-up through its store, which encodes and
stores what is absent. So a batch waits for what it needs, and for nothing else.

This serves caches that are filled as training goes on, caches with a budget, and streams, which have no index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from quatcache.data.batches import INDICES, Batch, BatchReader, CachedColumns, collate_samples, read_samples
from quatcache.data.samples import LAYOUTS, columns_of
from quatcache.training.columns import ColumnsInMaking
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import Chunk, ChunkReader

__all__ = ["UNMET", "Answer", "MeetingReader", "Meetings", "MetSamples", "StreamCollate", "Unmet"]

UNMET = "#unmet"
"""No encoder has this name: names are those of attributes."""


class Unmet(NamedTuple):
    """The samples of a batch that lack a row.

    Attributes:
        positions: Where they are in the batch, int64 ``(n,)``.
        chunk: The samples, read and keyed.
        number: That of their dataset within the run.
    """

    positions: torch.Tensor
    chunk: Chunk
    number: int


@dataclass
class MeetingReader(Dataset[Any]):
    """A dataset as batches, of which some samples have rows.

    Attributes:
        plain: Gives batches whose rows are all there; a row number of -1 says that there is none.
        chunks: Reads and keys samples.
    """

    plain: BatchReader
    chunks: ChunkReader

    @staticmethod
    def over(inner: BatchReader) -> BatchReader:
        """Read with another reader, once every sample has a row."""
        return inner

    def check_size(self) -> None:
        """Refuse a dataset that became longer or shorter; see :meth:`BatchReader.check_size`."""
        self.plain.check_size()

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.plain)

    def __getitem__(self, index: int) -> Batch:
        """Give a batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give the batch of these samples.

        Rows are numbers, for the loader to gather; the samples without are among the inputs as :data:`UNMET`, the
        indices of all as :data:`INDICES`.
        """
        columns = self.plain.columns
        assert columns is not None
        where = self.plain.positions(indices)
        lacking = torch.zeros(len(where), dtype=torch.bool)
        for rows in columns.rows.values():
            lacking |= (rows.index_select(0, where) < 0).any(dim=1)
        positions = lacking.nonzero().reshape(-1)
        batch = None
        if columns.targets is not None and not self.plain.collates:  # only what lacks a row is read
            samples = read_samples(self.plain.dataset, where[positions].tolist(), self.plain.reader)
            batch = self.plain.batch_beside(samples, positions, where)
        if batch is None:
            everything = read_samples(self.plain.dataset, where.tolist(), self.plain.reader)
            batch = self.plain.batch_of(everything, where)
            samples = [everything[position] for position in positions.tolist()]
        inputs = {**batch.inputs, INDICES: where}
        if samples:
            chunk = self.chunks.keyed(columns_of(samples), where[positions].tolist())
            inputs[UNMET] = Unmet(positions, chunk, self.chunks.number)
        return Batch(inputs, batch.targets)


@dataclass
class StreamCollate:
    """Collates samples of an iterable dataset, and keys them all: a stream has no index to remember them by.

    Attributes:
        collates: For each encoder that is not cached, its collate function.
        chunks: Keys samples.
    """

    collates: Mapping[str, Callable[[Sequence[Any]], Any]]
    chunks: ChunkReader

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """Give the batch of these samples, all of them under :data:`UNMET`."""
        read = [self.chunks.reader(sample) for sample in samples]
        batch = collate_samples(read, self.collates)
        chunk = self.chunks.keyed(columns_of(read), range(len(read)))
        unmet = Unmet(torch.arange(len(read)), chunk, self.chunks.number)
        return Batch({**batch.inputs, UNMET: unmet}, batch.targets)


class Answer(NamedTuple):
    """The rows of some samples for one encoder.

    Attributes:
        rows: ``(k * n, *row_shape)``: the first items of all samples before the second ones.
        lost: How many of them were encoded for it and not kept.
    """

    rows: torch.Tensor
    lost: int


class MetSamples:
    """What is known of the samples of one dataset while batches meet them.

    Args:
        fill: The dataset, planned.

    Attributes:
        fill: The same.
    """

    def __init__(self, fill: DatasetFill) -> None:
        """Start with what its index table knows."""
        self.fill = fill
        size, known = len(fill.dataset), 0 if fill.table is None else len(fill.table)
        self._making = ColumnsInMaking(size, fill.table)
        self._shared = False
        self._unmet = np.arange(size) >= known
        layout = LAYOUTS[fill.table.layout if fill.table is not None else fill.chunk_reader[0].layout]
        self._layout = layout
        self._rows = {one.name: torch.full((size, layout.items_per_sample), -1) for one in fill.encoders}
        for one in fill.encoders if fill.table is not None else ():
            keys = fill.table.keys[one.scheme.row_column]  # type: ignore[union-attr]
            numbers = fill.rows_of(one)
            self._rows[one.name][:known] = torch.from_numpy(numbers)
            lacking = one.lacking(keys.reshape(-1, 2), numbers)  # lost, or there is room for it now
            self._unmet[lacking // keys.shape[1]] = True

    @property
    def columns(self) -> CachedColumns:
        """What is known now: row numbers by index, -1 where there are none yet; targets are right where rows are."""
        return CachedColumns(self._rows, self._making.targets if self.fill.targets else None, self._layout)

    @property
    def complete(self) -> bool:
        """Whether every sample was met."""
        return not self._unmet.any()

    def share(self) -> None:
        """Let the workers of a loader see what comes to be known, instead of how it was when they started."""
        self._shared = True
        self._making.part_from_table()
        for tensor in (*self._rows.values(), *(self._making.targets or ())):
            if not tensor.is_shared():  # type: ignore[no-untyped-call]
                tensor.share_memory_()  # type: ignore[no-untyped-call]

    def put(self, chunk: Chunk) -> None:
        """Take in samples whose rows were asked for."""
        self._making.put(chunk)
        if self._shared:
            self.share()  # targets are made with the first samples
        self._unmet[chunk.indices] = False
        for one in self.fill.encoders:
            keys = chunk.keys[one.scheme.row_column]
            numbers = one.store.rows_of(keys.reshape(-1, 2)).reshape(keys.shape[:2])
            self._rows[one.name][chunk.indices] = torch.from_numpy(numbers)  # after the targets: workers look at these

    def settle(self) -> None:
        """Make the index table, once every sample was met."""
        self.fill.settle(self._making)


class Meetings:
    """Answers for the samples that batches meet, in the process that trains.

    Args:
        encoders: Those that are cached.
        batch_size: Items per encoder call, at most.

    Attributes:
        met: The datasets that are indexed as their samples are met, by their number within the run.
    """

    def __init__(self, encoders: Mapping[str, EncoderFill], batch_size: int) -> None:
        """Answer nothing yet."""
        self._encoders = encoders
        self._batch_size = batch_size
        self.met: dict[int, MetSamples] = {}

    def answer(self, unmet: Unmet) -> dict[str, Answer]:
        """Give the rows of samples that have none, for each encoder; remember them if their dataset is indexed."""
        chunk = unmet.chunk
        for encoder in self._encoders.values():
            chunk = encoder.resolve(chunk)
        answers = {}
        for name, encoder in self._encoders.items():
            before = encoder.in_steps - encoder.kept_in_steps
            rows = encoder.answer(chunk, self._batch_size)
            answers[name] = Answer(rows, encoder.in_steps - encoder.kept_in_steps - before)
        if unmet.number in self.met:
            self.met[unmet.number].put(chunk)
        return answers
