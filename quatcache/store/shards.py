"""One shard: a safetensors file with the keys and rows of one commit, written once and never changed.

A shard can be judged alone. Its metadata name the encoder and digest what it holds, so a manifest that was lost is made
again from its shards; the manifest in turn has the checksum of the whole file, which any tool can compute.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from quatcache.errors import FormatError
from quatcache.keys import KeyArray
from quatcache.store.draft import ShardDraft
from quatcache.store.files import checksum, content_digest, open_tensors, read_tensors, write_tensors
from quatcache.store.protocol import RowShape
from quatcache.store.ragged import RaggedRows
from quatcache.store.rows import Rows, row_shape_of
from quatcache.store.safetensors_writer import DTYPES

__all__ = [
    "RowKind",
    "ShardEntry",
    "as_tensors",
    "is_shard_name",
    "judge_alone",
    "keys_and_rows",
    "new_shard_path",
    "open_shard",
    "opened_shards",
    "write_shard",
]

_SHARD, _SEQUENCES = "shard", "sequences"  # what the metadata call rows of one shape, and those that are sequences
_SHARD_NAME = re.compile(r"shard-[0-9a-f]{16}\.safetensors")  # a name from a file must not become a path


def is_shard_name(name: object) -> bool:
    """Say whether a file name may be that of a shard.

    Example:
        >>> is_shard_name("shard-0123456789abcdef.safetensors"), is_shard_name("../shard-0123456789abcdef.safetensors")
        (True, False)
    """
    return isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None


def new_shard_path(directory: Path) -> Path:
    """Name a shard that nobody has written yet."""
    return directory / f"shard-{secrets.token_hex(8)}.safetensors"


AT_ONCE = 4
"""Shards that are opened at the same time, at most: more do not come from a disk any sooner."""

OpenShard: TypeAlias = tuple[KeyArray, Rows, bool]
"""Keys ``(n, 2)``, n rows or sequences, and whether the rows were repacked from other shards."""


@dataclass(frozen=True)
class ShardEntry:
    """One committed shard, as its manifest has it.

    Attributes:
        file: Its name in the directory of the manifest.
        rows: How many rows it holds.
        bytes: Its size.
        xxh3: xxh3_128 of its bytes, 32 hex characters.
        longest: Length of its longest sequence; None for rows of one shape.
    """

    file: str
    rows: int
    bytes: int
    xxh3: str
    longest: int | None = None


@dataclass(frozen=True)
class RowKind:
    """What all shards of one store have in common.

    Attributes:
        row_shape: Shape of one row; of sequences the first size is None.
        dtype: Storage dtype.
        given_dtype: Dtype that the encoder gives.
    """

    row_shape: RowShape
    dtype: torch.dtype
    given_dtype: torch.dtype

    @property
    def ragged(self) -> bool:
        """Whether rows are sequences, each of a length of its own."""
        return self.row_shape[:1] == (None,)


def write_shard(
    directory: Path,
    identity: str,
    keys: KeyArray,
    rows: Rows,
    given_dtype: torch.dtype,
    *,
    repacked: bool = False,
    draft: ShardDraft | None = None,
) -> ShardEntry:
    """Write one shard; it counts once a manifest names it.

    Args:
        directory: The directory of the store.
        identity: Digest of the encoder.
        keys: Distinct keys ``(n, 2)``.
        rows: Rows ``(n, *row_shape)``, or sequences, in the storage dtype.
        given_dtype: Dtype that look-ups return.
        repacked: Whether the rows come from other shards, which this one takes the place of.
        draft: A file in which the first of these rows may lie; it is finished, or discarded.

    Raises:
        StoreError: The directory cannot be written.
    """
    kind = _SEQUENCES if isinstance(rows, RaggedRows) else _SHARD
    about = {"quatcache": kind, "identity": identity, "given_dtype": _name(given_dtype)}
    tensors = as_tensors(keys, rows)
    if repacked:
        about["repacked"] = "true"
    about["xxh3"] = content_digest(about, tensors)
    written = None if draft is None else draft.finish(tensors, about)
    if draft is not None and written is not None:
        path = draft.path
    else:  # never under the name of the draft: a commit that failed late may have left a shard there
        path = new_shard_path(directory)
        written = write_tensors(path, tensors, about)
    return ShardEntry(path.name, len(keys), written.bytes, written.xxh3, _longest(rows))


def open_shard(
    directory: Path,
    entry: ShardEntry,
    identity: str,
    kind: RowKind,
    *,
    verify_checksum: bool = True,
    memory_map: bool = True,
) -> OpenShard:
    """Open one shard, and hold it against its entry before a row of it is used.

    Args:
        directory: The directory of the store.
        entry: What the manifest says of it.
        identity: Digest of the encoder.
        kind: What its rows must be like.
        verify_checksum: Compare the bytes of the file with the checksum of the entry.
        memory_map: Map the file; false: read it whole, as network disks need it.

    Returns:
        Keys ``(n, 2)``, n rows or sequences, and whether the rows were repacked from other shards.

    Raises:
        FormatError: The shard is missing, damaged, or of another encoder.
        StoreError: It cannot be read.
    """
    path = directory / entry.file
    tensors, about = (open_tensors if memory_map else read_tensors)(path, entry.bytes)
    if about.get("identity") != identity:
        raise FormatError(f"{path} belongs to encoder {about.get('identity')}; its rows are encoded again.")
    if verify_checksum and checksum(path) != entry.xxh3:
        raise FormatError(f"{path} does not match its checksum; its rows are encoded again.")
    keys, rows = keys_and_rows(path, tensors, ragged=about.get("quatcache") == _SEQUENCES)
    if len(keys) != entry.rows:
        raise FormatError(f"{path} does not hold the {entry.rows} keys that its manifest counts; it is encoded again.")
    given, expected = about.get("given_dtype"), _name(kind.given_dtype)
    if given != expected:
        raise FormatError(f"{path} gives rows as {given} instead of {expected}; it is encoded again.")
    if (row_shape_of(rows), rows.dtype) != (kind.row_shape, kind.dtype):
        raise FormatError(
            f"{path} holds {rows.dtype} rows of shape {row_shape_of(rows)} instead of {kind.dtype} rows of shape "
            f"{kind.row_shape}; it is encoded again."
        )
    return keys.numpy(), rows, about.get("repacked") == "true"


@contextmanager
def opened_shards(
    directory: Path, entries: Sequence[ShardEntry], identity: str, kind: RowKind | None, **checks: bool
) -> Iterator[Iterable[tuple[ShardEntry, Callable[[], OpenShard]]]]:
    """Open some shards, several at once: checksums wait for the disk, and then for memory, without Python's lock.

    Args:
        directory: The directory of the store.
        entries: What the manifest says of them.
        identity: Digest of the encoder.
        kind: What their rows must be like; None only if there are no entries.
        checks: As for :func:`open_shard`.

    Yields:
        Each entry, in order, with a function that gives the shard or raises what :func:`open_shard` raises for it.
    """
    works = [partial(open_shard, directory, entry, identity, kind, **checks) for entry in entries]  # type: ignore[arg-type]
    threads = min(len(works), AT_ONCE, os.cpu_count() or 1)
    if threads < 2:
        yield zip(entries, works, strict=True)
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="quatcache-open")
    try:
        with suppress(RuntimeError):  # the system has no more threads: here, then, one after the other
            works = [executor.submit(work).result for work in works]  # type: ignore[misc]
        yield zip(entries, works, strict=True)
    finally:
        executor.shutdown(cancel_futures=True)


def judge_alone(path: Path, identity: str) -> tuple[ShardEntry, RowKind]:
    """Check a shard by its own digest, without a manifest.

    Returns:
        What a manifest says of it.

    Raises:
        FormatError: It is damaged, or of another encoder.
        StoreError: It cannot be read.
    """
    tensors, about = open_tensors(path)
    recorded = about.pop("xxh3", None)
    if about.get("quatcache") not in {_SHARD, _SEQUENCES} or about.get("identity") != identity:
        raise FormatError(f"{path} belongs to encoder {about.get('identity')}; it is left out.")
    if recorded is None or content_digest(about, tensors) != recorded:
        raise FormatError(f"{path} does not match its own digest; its rows are encoded again.")
    keys, rows = keys_and_rows(path, tensors, ragged=about["quatcache"] == _SEQUENCES)
    given_dtype = DTYPES.get(about.get("given_dtype", ""))
    if given_dtype is None or rows.dtype not in DTYPES.values():
        raise FormatError(f"{path} names no known dtype; its rows are encoded again.")
    entry = ShardEntry(path.name, len(keys), path.stat().st_size, checksum(path), _longest(rows))
    return entry, RowKind(row_shape_of(rows), rows.dtype, given_dtype)


def as_tensors(keys: KeyArray, rows: Rows) -> dict[str, torch.Tensor]:
    """Give keys ``(n, 2)`` and n rows, or sequences, as the tensors of a shard."""
    if isinstance(rows, torch.Tensor):
        return {"keys": torch.from_numpy(keys), "values": rows}
    packed = rows.packed()
    return {"keys": torch.from_numpy(keys), "offsets": packed.offsets, "values": packed.values}


def keys_and_rows(path: Path, tensors: Mapping[str, Any], *, ragged: bool) -> tuple[torch.Tensor, Rows]:
    """Check the tensors of a shard before a row is used.

    Args:
        path: Of their file, for messages.
        tensors: As :func:`as_tensors` gives them.
        ragged: Whether the rows are sequences.

    Raises:
        FormatError: They are not what a shard holds.
    """
    keys, rows = tensors.get("keys"), tensors.get("values")
    if keys is None or rows is None or keys.dtype != torch.int64 or keys.dim() != 2 or keys.shape[1] != 2:
        raise FormatError(f"{path} does not hold keys and values; its rows are encoded again.")
    if ragged:
        return keys, _sequences(path, rows, tensors.get("offsets"), len(keys))
    if not rows.dim() or len(rows) != len(keys):
        raise FormatError(f"{path} holds rows of shape {tuple(rows.shape)} for {len(keys)} keys; it is encoded again.")
    return keys, rows


def _sequences(path: Path, values: torch.Tensor, offsets: torch.Tensor | None, count: int) -> RaggedRows:
    """Check where sequences begin and end before one is read: a place outside the file would end the process."""
    if offsets is None or offsets.dtype != torch.int64 or offsets.shape != (count + 1,) or not values.dim():
        raise FormatError(f"{path} does not hold offsets for {count} sequences; they are encoded again.")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((offsets[1:] < offsets[:-1]).any()):
        raise FormatError(f"{path} has offsets that do not run from 0 to {len(values)}; it is encoded again.")
    return RaggedRows.between(values, offsets)


def _longest(rows: Rows) -> int | None:
    if isinstance(rows, torch.Tensor):
        return None
    return int(rows.lengths.max()) if len(rows) else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
