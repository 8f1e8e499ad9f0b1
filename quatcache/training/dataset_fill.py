"""One dataset of a fill: indexed, in at most one pass.

What a verified index table knows is not read again, what the stores hold is not encoded again; so a warm start reads a
sample of items only, and a grown dataset its new part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quatcache.data.batches import CachedColumns
from quatcache.data.samples import LAYOUTS
from quatcache.encoders.calls import WINDOW
from quatcache.encoders.extracted import ExpectedRows
from quatcache.errors import ConfigError
from quatcache.keys import KeyArray
from quatcache.progress import FillProgress
from quatcache.read_through import Counts
from quatcache.store import CacheDirectory, DatasetTable
from quatcache.training.chunk_loading import load_chunks
from quatcache.training.columns import ColumnsInMaking, Part
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import Chunk, ChunkReader
from quatcache.training.verify import SAMPLED, matching_table, reread
from quatcache.training.views import changing

__all__ = ["DatasetFill"]

BLOCK = 1 << 16
"""Samples whose keys are looked at together."""


class _FoundRows(NamedTuple):
    """Row numbers of the keys of an index table, and how many numbers the store had given out before."""

    keys: KeyArray
    numbered: int
    numbers: npt.NDArray[np.int64]


@dataclass
class DatasetFill:
    """The indexing of one dataset for all cached encoders.

    Attributes:
        name: What the dataset is for, for messages.
        dataset: The user's map-style dataset.
        reader: Takes a sample apart.
        encoders: The encoders that are cached.
        targets: Whether to keep targets.
        number: Of the dataset within the run.
        table: What is known of it; in the end all of it.
        counted: Items, by encoder, that were counted while ranks read their shares.
    """

    name: str
    dataset: Any
    reader: Callable[[Any], Any]
    encoders: Sequence[EncoderFill] = ()
    targets: bool = False
    number: int = 0
    table: DatasetTable | None = None
    counted: dict[str, int] = field(default_factory=dict)
    _columns: ColumnsInMaking | None = None
    _unread: npt.NDArray[np.bool_] | None = None
    _to_read: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _targets_reason: str | None = None
    _found: dict[str, _FoundRows] = field(default_factory=dict)  # by encoder

    def __post_init__(self) -> None:
        """Refuse what cannot be indexed."""
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            raise ConfigError(
                f"the {self.name} dataset is a {type(self.dataset).__name__} without length and index, so its rows "
                "cannot be found again; use a map-style dataset, or return None from configure_caches()."
            )
        if len(self.dataset) == 0:
            raise ConfigError(f"the {self.name} dataset has 0 samples; give it at least one.")

    @property
    def chunk_reader(self) -> ChunkReader:
        """Read the dataset in keyed chunks."""
        return ChunkReader(self.dataset, self.reader, [encoder.scheme for encoder in self.encoders], self.number)

    def plan(self, directory: CacheDirectory | None) -> int:
        """Find out what is known already.

        Args:
            directory: Where index tables are kept; None where nothing persists.

        Returns:
            How many samples must be read.

        Raises:
            ConfigError: The dataset gives other items each time it is read.
        """
        reader = self.chunk_reader
        by_index = any(encoder.scheme.salt is not None for encoder in self.encoders)
        self.table, self._columns = None, None
        if directory is not None and not by_index:
            names = [column for encoder in self.encoders for column in (encoder.name, encoder.scheme.row_column)]
            self.table = matching_table(self.name, directory.tables(names), reader, self.targets)
            if self.table is not None:
                directory.mark_used(self.table)
        known = 0 if self.table is None else len(self.table)
        wanted = np.arange(len(self.dataset)) >= known
        for encoder in self.encoders if self.table is not None else ():
            keys = self.table.keys[encoder.scheme.row_column]  # type: ignore[union-attr]
            if encoder.extracted is not None:
                encoder.extracted.learn(self.table)  # type: ignore[arg-type]
            missing = encoder.lacking(keys.reshape(-1, 2), self.rows_of(encoder)) // keys.shape[1]
            wanted[missing] = True
        self._to_read = np.flatnonzero(wanted)
        if len(self._to_read):
            item, target = reread(reader, self._to_read)
            if item is not None and not by_index:
                raise changing(self.name, self.dataset, item)
            if target is not None and self.targets:
                self.targets, self._targets_reason = False, f"the target of item {target} differs between two reads"
        return len(self._to_read)

    @property
    def to_read(self) -> int:
        """Count the samples that must be read."""
        return len(self._to_read)

    @property
    def unread(self) -> npt.NDArray[np.int64]:
        """The samples that must be read."""
        return self._to_read

    def verify(self, parts: int) -> None:
        """Hold the stored rows of some random samples against the encoders, before any row is used or added.

        Args:
            parts: How many datasets there are.

        Raises:
            StaleRowsError: They differ.
        """
        wanted = max((one.canary.begin(parts) for one in self.encoders if one.canary is not None), default=0)
        if not wanted:
            return
        stored = np.delete(np.arange(len(self.dataset)), self._to_read)
        candidates = stored if len(stored) else np.arange(len(self.dataset))
        count = min(len(candidates), max(SAMPLED, 2 * wanted))
        indices = np.random.default_rng().choice(candidates, count, replace=False)
        chunk = self.chunk_reader.__getitems__(indices.tolist())
        for encoder in self.encoders:
            encoder.verify(chunk)

    def run(self, batch_size: int, num_workers: int, context: Any, advance: FillProgress) -> None:
        """Read what must be read, and encode what must be encoded.

        Args:
            batch_size: Upper bound of items per encoder call.
            num_workers: Processes that read.
            context: How they are started, as the user's loader has it.
            advance: Told after each chunk.
        """
        self.count_known()
        if not len(self._to_read):
            self._columns = None
            return
        columns = self._columns or ColumnsInMaking(len(self.dataset), self.table)
        for chunk in self.chunks(self._windows(batch_size), num_workers, context):
            counts = Counts()
            for encoder in self.encoders:
                chunk = encoder.resolve(chunk)
                counts += encoder.fill(chunk, batch_size)
            columns.put(chunk)
            advance(len(chunk.indices), counts)
        self.settle(columns)
        self._columns = None

    def _windows(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Give the indices of the samples to read, as many at once as the encoders split into calls together."""
        start = 0
        if len(self._to_read) > batch_size * WINDOW:
            first = self.chunk_reader[int(self._to_read[0])]
            for encoder in self.encoders:
                encoder.calls.look_ahead(first.items)
        while start < len(self._to_read):
            size = min(encoder.calls.window(batch_size, encoder.pace) for encoder in self.encoders)
            yield self._to_read[start : start + size]
            start += size

    def count_known(self) -> None:
        """Count the items that need not be read among those that were asked for and found."""
        for encoder in self.encoders:
            known = max(self._known_items(encoder) - self.counted.pop(encoder.name, 0), 0)
            encoder.counts += Counts(asked=known, hits=known)

    def _known_items(self, encoder: EncoderFill) -> int:
        if self._columns is None:
            width = None if self.table is None else self.table.keys[encoder.name].shape[1]
        else:
            width = self._columns.width
        return (len(self.dataset) - len(self._to_read)) * (width or 0)

    def chunks(
        self, batches: Iterable[Sequence[int] | npt.NDArray[np.int64]], num_workers: int, context: Any
    ) -> Iterator[Chunk]:
        """Read samples.

        Args:
            batches: The indices of each chunk.
            num_workers: Processes that read.
            context: How they are started.
        """
        return load_chunks(self.chunk_reader, batches, num_workers, context, self.name)

    def gather(self, parts: Iterable[Part | None], expected: Mapping[str, ExpectedRows]) -> bool:
        """Take over what ranks have read of what :meth:`plan` found unread.

        Args:
            parts: What each has read; None: nothing.
            expected: For each encoder with a key extractor the rows that are there or will be.

        Returns:
            Whether every sample is known now.

        Raises:
            SampleError: The parts have samples of several kinds.
        """
        columns, unread = ColumnsInMaking(len(self.dataset), self.table), np.zeros(len(self.dataset), bool)
        unread[self._to_read] = True
        for part in parts:
            if part is not None:
                columns.put_part(part)
                unread[part.indices] = False
        whole = not unread.any()
        if not whole and expected:
            return False
        for start in range(0, len(self._to_read) if expected else 0, BLOCK):
            indices = self._to_read[start : start + BLOCK]
            chunk = columns.chunk(indices, f"the {self.name} dataset")
            for encoder in self.encoders:
                if encoder.extracted is not None:
                    column = encoder.scheme.row_column
                    rows = encoder.resolve(chunk, expected[encoder.name]).keys[column]
                    expected[encoder.name].expect(rows.reshape(-1, 2))
                    columns.put_keys(indices, column, rows)
        self._columns, self._unread = columns, unread
        if whole:
            self.settle(columns)
        return whole

    def look_again(self) -> None:
        """Find out what is left to read, after ranks have read and encoded their shares."""
        if self._columns is None or self._unread is None:
            return
        wanted, read = self._unread.copy(), np.flatnonzero(~self._unread)
        for encoder in self.encoders:
            keys = self._columns.keys_of(read, encoder.scheme.row_column)
            wanted[read[encoder.lacking(keys.reshape(-1, 2)) // keys.shape[1]]] = True
        self._to_read = np.flatnonzero(wanted)

    def leave_targets(self, reason: str | None) -> None:
        """Do not keep targets if the rank that read others could not."""
        if reason is not None and self.targets:
            self.targets, self._targets_reason = False, reason

    def settle(self, columns: ColumnsInMaking) -> None:
        """Take over what is known of every sample."""
        if self.targets:
            self._targets_reason = columns.targets_reason
        self.table = columns.table(self.targets)

    def still_holds(self) -> bool:
        """Compare the dataset with what was indexed, as at a warm start: a hook may have changed it in place."""
        assert self.table is not None
        if len(self.table) != len(self.dataset):
            return False
        return matching_table(self.name, [self.table], self.chunk_reader, with_targets=False) is not None

    def keep(self, directory: CacheDirectory) -> None:
        """Write the index table, unless its keys are good for this run only."""
        if self.table is not None and all(encoder.scheme.salt is None for encoder in self.encoders):
            directory.write_table(self.table)

    @property
    def targets_reason(self) -> str | None:
        """Why targets could not be kept although they were to be; None if they could."""
        return self._targets_reason

    def rows_of(self, encoder: EncoderFill) -> npt.NDArray[np.int64]:
        """Give the row numbers of the samples that are known, for one of the encoders.

        They are looked up once, and again when the table is another one or the store has given out more numbers.

        Returns:
            int64 ``(N, k)``, -1 where there is no row; not to be written to.
        """
        assert self.table is not None
        keys, numbered = self.table.keys[encoder.scheme.row_column], encoder.store.numbered
        found = self._found.get(encoder.name)
        if found is None or found.keys is not keys or found.numbered != numbered:
            numbers = encoder.store.rows_of(keys.reshape(-1, 2)).reshape(keys.shape[:2])
            found = self._found[encoder.name] = _FoundRows(keys, numbered, numbers)
        return found.numbers

    def columns(self) -> CachedColumns:
        """Resolve keys to row numbers: what the loaders work with.

        Raises:
            ConfigError: A budget is too small for all rows, though steps must not encode.
        """
        assert self.table is not None
        rows = {}
        for encoder in self.encoders:
            numbers = self.rows_of(encoder)
            encoder.refuse_misses(self.name, numbers.reshape(-1))
            rows[encoder.name] = torch.from_numpy(numbers)
        return CachedColumns(rows, self.table.targets if self.targets else None, LAYOUTS[self.table.layout])
