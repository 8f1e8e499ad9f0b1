"""Rows in safetensors shards, memory-mapped.

Rows that were put are gathered in memory until they fill a shard, or until some seconds have passed since the last
commit: a slow encoder must not lose an hour because its rows are small. A committed shard is never touched again.

Row numbers belong to one open store: they run through its shards in the order in which it came to know them, and then
through the rows not yet committed, so they stay valid when those are committed and when others add shards of theirs.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.errors import FormatError
from quatcache.keys import KeyArray, KeyIndex
from quatcache.store.files import checksum, locked, open_tensors, write_tensors
from quatcache.store.manifest import Manifest, ShardEntry
from quatcache.store.protocol import Found, Positions
from quatcache.store.tensor import TensorStore

__all__ = ["DiskStore"]

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
COMMIT_SECONDS = 30.0


class DiskStore:
    """A row store in one directory, shared by processes and runs.

    Args:
        directory: Made at the first commit; reading needs no right to write.
        digest: Identity of the encoder whose rows these are.
        facts: What the identity was made from, written into the manifest.
        environment: Library versions and hardware, written into the manifest.
        dtype: Storage dtype of floating rows; None keeps the encoder's.
        shard_bytes: Size at which a shard is committed.
        commit_seconds: Time after which rows are committed though they fill no shard.
        verify_checksums: Compare the bytes of each shard with its checksum when it is opened.
        time_func: Clock in seconds, for tests.

    Raises:
        FormatError: The manifest is damaged, or of a newer version. A damaged shard is no error: it is left out with
            a warning, and its rows count as absent.

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
        shard_bytes: int = SHARD_BYTES,
        commit_seconds: float = COMMIT_SECONDS,
        verify_checksums: bool = True,
        time_func: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the manifest and the keys of every shard; rows are read when they are asked for."""
        self.directory = directory
        self.manifest = Manifest(digest, dict(facts or {}), dict(environment or {}))
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._commit_seconds = commit_seconds
        self._verify_checksums = verify_checksums
        self._time = time_func
        self._index = KeyIndex()
        self._shards: list[torch.Tensor] = []  # memory-mapped rows, in row order
        self._opened: set[str] = set()
        self._refused: set[str] = set()  # damaged shards: their rows are absent, their entries go at the next commit
        self._starts: list[int] = []
        self._committed = 0
        self._pending = TensorStore(dtype=dtype)
        self._pending_keys: list[KeyArray] = []
        self._last_commit = self._time()
        self.refresh()

    def __len__(self) -> int:
        """Count the stored keys, committed or not."""
        return len(self._index)

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """Shape of one row; None while nothing was stored."""
        known = self.manifest.row_shape
        return self._pending.row_shape if known is None else known  # () is a shape too

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, committed or not."""
        return sum(shard.numel() * shard.element_size() for shard in self._shards) + self._pending.nbytes

    @property
    def given_dtype(self) -> torch.dtype | None:
        """The dtype that look-ups return."""
        return self.manifest.given_dtype or self._pending.given_dtype

    def refresh(self) -> bool:
        """Take in shards that other processes committed since the store was opened.

        Returns:
            Whether there were any.

        Raises:
            FormatError: The manifest is damaged, of a newer version, or of another encoder.
        """
        self.flush()  # the numbers of uncommitted rows are given out already: they come before what is new
        manifest = self._read_manifest()
        if manifest is None:
            return False
        before = len(self._opened)
        self.manifest = manifest
        for entry in manifest.shards:
            if entry.file not in self._opened | self._refused:
                self._open(entry)
        return len(self._opened) > before

    def _read_manifest(self) -> Manifest | None:
        manifest = Manifest.read(self.directory)
        if manifest is not None and manifest.digest != self.manifest.digest:
            raise FormatError(
                f"{self.directory} belongs to encoder {manifest.digest}, not {self.manifest.digest}; "
                "do not rename cache directories: delete it, or point save_dir elsewhere."
            )
        return manifest

    def _open(self, entry: ShardEntry) -> None:
        path = self.directory / entry.file
        try:
            tensors, about = open_tensors(path, entry.bytes)
            if about.get("identity") != self.manifest.digest:
                raise FormatError(f"{path} belongs to encoder {about.get('identity')}; its rows are encoded again.")
            if self._verify_checksums and checksum(path) != entry.xxh3:
                raise FormatError(f"{path} does not match its checksum; its rows are encoded again.")
            keys, rows = _checked(path, tensors, entry, self.manifest)
        except FormatError as error:
            self._refused.add(entry.file)
            logger.warning("%s", error)
            return
        self._attach(entry.file, keys, rows)

    def _attach(self, file: str, keys: KeyArray, rows: torch.Tensor) -> None:
        self._index.add(keys, np.arange(self._committed, self._committed + len(keys)))
        self._starts.append(self._committed)
        self._shards.append(rows)
        self._opened.add(file)
        self._committed += len(keys)

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent."""
        return self._index.find(keys)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent keys."""
        return np.flatnonzero(self.rows_of(keys) < 0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Read rows ``(B,)`` into a new tensor ``(B, *row_shape)`` on the CPU, in the encoder's dtype."""
        if not len(rows) or self.row_shape is None:
            return torch.empty((0, *(self.row_shape or ())), dtype=self.given_dtype)
        rows = rows.cpu()
        if len(self._shards) == 1 and self._committed > int(rows.max()):
            return self._widen(self._shards[0].index_select(0, rows))
        answer = torch.empty((len(rows), *self.row_shape), dtype=self.given_dtype)
        blocks = torch.bucketize(rows, torch.tensor([*self._starts[1:], self._committed]), right=True)
        if not self._shards:
            blocks = torch.zeros_like(rows)
        for block in torch.unique(blocks).tolist():
            positions = (blocks == block).nonzero().reshape(-1)
            if block < len(self._shards):
                answer[positions] = self._widen(
                    self._shards[block].index_select(0, rows[positions] - self._starts[block])
                )
            else:
                answer[positions] = self._pending.gather(rows[positions] - self._committed)
        return answer

    def _widen(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.given_dtype in {None, rows.dtype} else rows.to(self.given_dtype)

    def get_many(self, keys: KeyArray) -> Found:
        """Give the hits only, as ``(H, *row_shape)``."""
        rows = self.rows_of(keys)
        positions = np.flatnonzero(rows >= 0)
        return Found(positions, self.gather(torch.from_numpy(rows[positions])))

    def put_many(self, keys: KeyArray, values: torch.Tensor) -> None:
        """Store rows ``(n, *row_shape)`` for distinct keys; they are durable after the next commit.

        A present key gets a new row, which look-ups find from then on; the old one stays on disk, unreferenced.

        Raises:
            EncoderOutputError: The rows have another shape or dtype than those put before, or do not fit the storage
                dtype.
            FormatError: They have another shape or dtype than those in the directory.
            StoreError: A shard cannot be written; what was committed before is kept.
        """
        if not len(keys):
            return
        held, given = (self.manifest.row_shape, self.manifest.given_dtype), (tuple(values.shape[1:]), values.dtype)
        if self._shards and held != given:
            raise FormatError(
                f"{self.directory} holds rows of shape {held[0]} and {held[1]}, the encoder gave shape {given[0]} and "
                f"{given[1]}; delete that directory to have it filled again."
            )
        if not self._pending_keys:
            row_bytes = math.prod(values.shape[1:]) * (self._dtype or values.dtype).itemsize
            room = max(len(keys), self._shard_bytes // max(row_bytes, 1) + len(keys))
            self._pending = TensorStore(dtype=self._dtype, capacity=room)
            self._last_commit = self._time()
        before = len(self._pending)
        self._pending.put_many(keys, values.cpu())
        local = self._pending.rows_of(keys)
        fresh = local >= before
        self._pending_keys.append(keys[fresh])
        self._index.add(keys, self._committed + local)
        due = self._time() - self._last_commit >= self._commit_seconds
        if due or self._pending.nbytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Commit what was put: the shard first, then the manifest that names it.

        Raises:
            StoreError: The directory cannot be written; what was committed before is kept.
        """
        if not self._pending_keys:
            return
        keys, rows, given_dtype = np.concatenate(self._pending_keys), self._pending.rows, self._pending.given_dtype
        assert given_dtype is not None
        entry = self._write(keys, rows)
        with locked(self.directory / ".manifest.lock"):  # other ranks and processes add their shards too
            current = (self._read_manifest() or self.manifest).without(self._refused)
            self.manifest = current.with_shard(entry, tuple(rows.shape[1:]), rows.dtype, given_dtype)
            self.manifest.write(self.directory)
        tensors, _ = open_tensors(self.directory / entry.file, entry.bytes)
        self._starts.append(self._committed)
        self._shards.append(tensors["values"])
        self._opened.add(entry.file)
        self._committed += len(keys)
        self._pending, self._pending_keys = TensorStore(dtype=self._dtype), []

    def _write(self, keys: KeyArray, rows: torch.Tensor) -> ShardEntry:
        path = self.directory / f"shard-{secrets.token_hex(8)}.safetensors"
        about = {
            "quatcache": "shard",
            "identity": self.manifest.digest,
            "given_dtype": str(self._pending.given_dtype).removeprefix("torch."),
        }
        write_tensors(path, {"keys": torch.from_numpy(keys), "values": rows}, about)
        return ShardEntry(path.name, len(keys), path.stat().st_size, checksum(path))

    def assemble(self, size: int, parts: Sequence[Found]) -> torch.Tensor:
        """Put rows in the order of their positions, on the CPU and in the encoder's dtype."""
        return self._pending.assemble(size, parts)

    def load(self, device: torch.device | str = "cpu") -> TensorStore:
        """Read every row into the memory of a device.

        Returns:
            A store whose row numbers are those of this one; peak memory is that of the rows once.
        """
        self.flush()
        if not self._shards:
            return TensorStore(device, self._dtype)
        rows = torch.empty((self._committed, *(self.row_shape or ())), dtype=self.manifest.dtype, device=device)
        for start, shard in zip(self._starts, self._shards, strict=True):
            rows[start : start + len(shard)] = shard.to(device)
        keys, numbers = self._index.items()
        return TensorStore.of(keys, numbers, rows, self.given_dtype)


def _checked(
    path: Path, tensors: Mapping[str, torch.Tensor], entry: ShardEntry, manifest: Manifest
) -> tuple[KeyArray, torch.Tensor]:
    """Hold a shard against its entry before a row of it is used."""
    keys, rows = tensors.get("keys"), tensors.get("values")
    if keys is None or rows is None or keys.dtype != torch.int64 or tuple(keys.shape) != (entry.rows, 2):
        raise FormatError(f"{path} does not hold the {entry.rows} keys that its manifest counts; it is encoded again.")
    if (tuple(rows.shape), rows.dtype) != ((entry.rows, *(manifest.row_shape or ())), manifest.dtype):
        raise FormatError(
            f"{path} holds {rows.dtype} rows of shape {tuple(rows.shape)} instead of {entry.rows} {manifest.dtype} "
            f"rows of shape {manifest.row_shape}; it is encoded again."
        )
    return keys.numpy(), rows
