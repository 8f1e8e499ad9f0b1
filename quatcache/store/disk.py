"""Rows in safetensors shards, memory-mapped.

Rows that were put are gathered in memory until they fill a shard, or until some seconds have passed since the last
commit: a slow encoder must not lose an hour because its rows are small. A committed shard is never touched again; many
small ones are packed into a big one at the end of a fill.

Row numbers belong to one open store: they run through its shards in the order in which it came to know them, and then
through the rows not yet committed, so they stay valid when those are committed and when others add shards of theirs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.errors import FormatError, StoreError
from quatcache.keys import KeyArray, KeyIndex
from quatcache.store.commits import Commit, begin_commit, disappeared
from quatcache.store.compaction import pack
from quatcache.store.files import MANIFEST_LOCK, locked
from quatcache.store.manifest import Manifest
from quatcache.store.pending import PendingShard
from quatcache.store.placed import PlacedRows
from quatcache.store.protocol import Found, Positions, RowShape, Values
from quatcache.store.recovery import change_manifest, mended_manifest, read_manifest, sure_manifest
from quatcache.store.rows import Buffer, Rows, assemble, row_shape_of
from quatcache.store.shards import ShardEntry, new_shard_path, opened_shards
from quatcache.store.tensor import TensorStore

__all__ = ["LAST_USED", "DiskStore"]

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
COMMIT_SECONDS = 30.0
LAST_USED = ".last-used"


class DiskStore:
    """A row store in one directory, shared by processes and runs.

    Args:
        directory: Made at the first commit; reading needs no right to write.
        digest: Identity of the encoder whose rows these are.
        facts: What the identity was made from, written into the manifest.
        environment: Library versions and hardware, written into the manifest.
        dtype: Storage dtype of floating rows; None keeps the encoder's.
        shard_bytes: Size at which a shard is committed; None: 256 MiB.
        commit_seconds: Time after which rows are committed though they fill no shard; None: 30 seconds.
        verify_checksums: Compare the bytes of each shard with its checksum when it is opened.
        memory_map: Map shards into memory; false: read them whole when they are opened, for network disks.
        time_func: Clock in seconds, for tests.

    Attributes:
        before_commit: Called before rows are written; if it raises, neither these nor later ones are.

    Raises:
        FormatError: The manifest is of a newer version, or of another encoder. Damage is no error: a manifest is made
            again from its shards; a shard is left out with a warning, and its rows count as absent.
        StoreError: The directory cannot be read.

    Example:
        >>> import tempfile
        >>> from quatcache.keys import content_keys
        >>> directory = Path(tempfile.mkdtemp())
        >>> store = DiskStore(directory, digest="0" * 32)
        >>> store.put_many(content_keys(["a"]), torch.ones(1, 3))
        >>> store.flush()
        >>> DiskStore(directory, digest="0" * 32).get_many(content_keys(["a", "b"])).positions.tolist()
        [0]
    """

    def __init__(
        self,
        directory: Path,
        digest: str,
        *,
        facts: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        shard_bytes: int | None = None,
        commit_seconds: float | None = None,
        verify_checksums: bool = True,
        memory_map: bool = True,
        time_func: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the manifest and the keys of every shard; rows are read when they are asked for."""
        self.directory = directory
        self.manifest = Manifest(digest, dict(facts or {}), dict(environment or {}))
        self._environment = self.manifest.environment
        self._dtype = dtype
        self._shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
        self._commit_seconds = COMMIT_SECONDS if commit_seconds is None else commit_seconds
        self._reading = {"verify_checksum": verify_checksums, "memory_map": memory_map}
        self._time = time_func
        self._index = KeyIndex()
        self._placed = PlacedRows()  # of the shards in row order, memory-mapped unless told otherwise
        self._opened: set[str] = set()
        self._refused: set[str] = set()  # damaged shards: their rows are absent, their entries go at the next commit
        self._spare: Buffer | None = None  # memory of the commit before, for the rows after the next one
        self._pending = self._new_pending()
        self._writing: Commit | None = None  # its rows are the last of the shards meanwhile
        self.before_commit: Callable[[], None] = lambda: None
        self._distrusted = False
        self.refresh()

    def _new_pending(self, buffer: Buffer | None = None) -> PendingShard:
        path = new_shard_path(self.directory)
        return PendingShard(path, self._shard_bytes, self._dtype, buffer, time_func=self._time)

    def __len__(self) -> int:
        """Count the stored keys, committed or not."""
        return len(self._index)

    @property
    def row_shape(self) -> RowShape | None:
        """Shape of one row; None while nothing was stored."""
        known = self.manifest.row_shape
        return self._newest.row_shape if known is None else known  # () is a shape too

    @property
    def _newest(self) -> Buffer:
        """Rows that no manifest knows of, if there are any."""
        return (self._pending if self._writing is None else self._writing.shard).buffer

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, committed or not."""
        return self._placed.nbytes + self._pending.buffer.nbytes

    @property
    def pending(self) -> int:
        """Count the rows that are not committed."""
        return len(self._pending) + (0 if self._writing is None else self._writing.count)

    @property
    def numbered(self) -> int:
        """Count the row numbers that were given out."""
        return self._placed.count + len(self._pending.buffer)

    @property
    def given_dtype(self) -> torch.dtype | None:
        """The dtype that look-ups return."""
        return self.manifest.given_dtype or self._newest.given_dtype

    def refresh(self) -> bool:
        """Take in shards that other processes committed since the store was opened.

        Returns:
            Whether there were any.

        Raises:
            FormatError: The manifest is of a newer version, or of another encoder.
        """
        self.flush()  # the numbers of uncommitted rows are given out already: they come before what is new
        manifest = mended_manifest(self.directory, self.manifest)
        if manifest is None:
            return False
        before = len(self._opened)
        self.manifest = manifest
        unknown = [entry for entry in manifest.shards if entry.file not in self._opened | self._refused]
        with opened_shards(self.directory, unknown, manifest.digest, manifest.kind, **self._reading) as shards:
            for entry, shard in shards:
                try:
                    self._take_in(entry, *shard())
                except FormatError as error:
                    gone = not (self.directory / entry.file).exists()
                    if gone and read_manifest(self.directory, manifest) != manifest:
                        return self.refresh() or len(self._opened) > before  # packed into another shard just now
                    self._refused.add(entry.file)
                    logger.warning("%s", error)
        return len(self._opened) > before

    def _take_in(self, entry: ShardEntry, keys: KeyArray, rows: Rows, repacked: bool) -> None:
        self._opened.add(entry.file)
        if repacked:  # most of its rows are here already, in the shards that it replaced
            fresh = self._index.find(keys) < 0
            keys, rows = (keys, rows) if fresh.all() else (keys[fresh], rows[torch.from_numpy(fresh)])
        if len(keys):
            self._index.add(keys, self._placed.count + np.arange(len(keys)))
            self._placed.add(rows)

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent."""
        return self._index.find(keys)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent keys."""
        return np.flatnonzero(self.rows_of(keys) < 0)

    def gather(self, rows: torch.Tensor, device: torch.device | None = None) -> Any:
        """Read rows ``(B,)`` int64, none negative, in the encoder's dtype, to a device or on the CPU.

        Returns:
            A new tensor ``(B, *row_shape)``, or new :class:`~quatcache.sequences.PaddedSequences`.
        """
        return self._placed.read(rows.cpu(), self.given_dtype, device, self._pending.rows)

    def touch(self, rows: torch.Tensor) -> None:
        """Bring the pages of rows ``(B,)`` into memory; a thread may do it beside one that puts and gathers rows."""
        self._placed.touch(rows)

    def get_many(self, keys: KeyArray) -> Found:
        """Give the hits only."""
        rows = self.rows_of(keys)
        positions = np.flatnonzero(rows >= 0)
        return Found(positions, self.gather(torch.from_numpy(rows[positions])))

    def put_many(self, keys: KeyArray, values: Values) -> None:
        """Store rows ``(n, *row_shape)``, or sequences, for distinct keys; they are durable after the next commit.

        A present key gets a new row, which look-ups find from then on; the old one stays on disk, unreferenced.

        Raises:
            EncoderOutputError: The rows have another shape or dtype than those put before, or do not fit the storage
                dtype.
            FormatError: They have another shape or dtype than those in the directory.
            StoreError: A shard cannot be written; what was committed before is kept.
        """
        if not len(keys):
            return
        held, given = (self.row_shape, self.given_dtype), (row_shape_of(values), values.dtype)
        if self._placed.parts and held != given:
            raise FormatError(
                f"{self.directory} holds rows of shape {held[0]} and {held[1]}, the encoder gave shape {given[0]} and "
                f"{given[1]}; delete that directory to have it filled again."
            )
        rows = self._pending.checked(values)
        self._index.add(keys, self.numbered + np.arange(len(keys)))
        self._pending.append(keys, rows)
        if self._pending.is_full or self._pending.seconds >= self._commit_seconds:
            self._commit()
        elif self._writing is not None and self._writing.outcome.done():  # an error is told soon
            self.settle()

    def flush(self) -> None:
        """Commit what was put: the shard first, then the manifest that names it.

        Raises:
            StoreError: The directory cannot be written, or disappeared; what was committed before is kept.
        """
        with suppress(StoreError):
            self.settle()  # what failed in the background is tried again
        self._commit()
        self.settle()
        self._spare, self._pending = None, self._new_pending()  # no memory is needed until more is put

    def _commit(self) -> None:
        """Have what was put written, once what was put before it is."""
        self.settle()
        if not self._pending.keys or self._distrusted:
            return
        try:
            self.before_commit()
        except BaseException:
            self._distrusted = True
            self._pending.draft.discard()
            raise
        if self._placed.count and not self.directory.is_dir():
            raise disappeared(self.directory)
        shard, pending = self._pending, self._new_pending(self._spare)
        placed = self._placed.with_part(shard.buffer.rows[: len(shard)])
        commit = begin_commit(self.directory, self.manifest, self._environment, frozenset(self._refused), shard)
        # nothing is called in between, so that Ctrl-C comes before or after all of it
        self._placed, self._writing, self._pending, self._spare = placed, commit, pending, None

    def settle(self) -> None:
        """Wait for the commit that is on its way, if one is, and read its rows from their file from then on.

        Raises:
            StoreError: It failed; its rows are again among those to be committed.
        """
        commit = self._writing
        if commit is None:
            return
        error = commit.outcome.exception()
        if error is not None:
            self._writing = None
            self._placed.take_back()
            commit.shard.append_all(self._pending)  # before the rows that were put since: numbers stay
            self._pending = commit.shard
            raise error
        done, self._writing = commit.outcome.result(), None
        self.manifest = done.manifest
        self._refused = set(done.refused)  # the next refresh takes in what is whole again
        self._opened.add(done.entry.file)
        # a row that was put again is not in the file, but its number was given out
        whole = len(done.rows) == commit.count
        self._placed.parts[-1] = done.rows if whole else commit.shard.buffer.rows[: commit.count].clone()
        commit.shard.buffer.clear()
        self._spare = commit.shard.buffer

    def compact(self) -> None:
        """Pack runs of small shards into big ones; rows and their numbers stay.

        Raises:
            StoreError: The directory cannot be written; it is as it was.
        """
        self.flush()
        if not self._placed.count:
            return
        with locked(self.directory / MANIFEST_LOCK):
            before = sure_manifest(self.directory, self.manifest)
            self.manifest = pack(self.directory, before, self._shard_bytes)
        known = {entry.file for entry in before.shards} <= self._opened | self._refused
        if known:  # else it also has rows of others, which the next refresh takes in
            self._opened.update(entry.file for entry in self.manifest.shards)

    def mark_used(self) -> None:
        """Leave a note that the rows were of use now, where that is permitted: pruning goes by it."""
        with suppress(OSError):
            (self.directory / LAST_USED).touch()

    def mark_verified(self, environment: Mapping[str, str]) -> None:
        """Record that the encoder gives the rows that are here in another environment too, where that is permitted."""
        self._note(lambda manifest: manifest.with_environment(environment))

    def mark_encoded(self, rows: int, seconds: float) -> None:
        """Record how long encoding took, where that is permitted: a later run tells by it what it saved."""
        self._note(lambda manifest: manifest.with_effort(rows, seconds))

    def _note(self, change: Callable[[Manifest], Manifest]) -> None:
        with suppress(StoreError):
            self.settle()
            self.manifest = change_manifest(self.directory, self.manifest, change)

    def assemble(self, size: int, parts: Sequence[Found]) -> Any:
        """Put rows in the order of their positions, on the CPU and in the encoder's dtype."""
        return assemble(size, parts, self.given_dtype)

    def load(self, device: torch.device | str = "cpu") -> TensorStore:
        """Read every row into the memory of a device.

        Returns:
            A store whose row numbers are those of this one; peak memory is that of the rows once.
        """
        self.flush()
        if not self._placed.parts:
            return TensorStore(device, self._dtype)
        rows = self._placed.load(device, let_go=not self._reading["memory_map"])
        keys, numbers = self._index.items()
        return TensorStore.of(keys, numbers, rows, self.given_dtype)
