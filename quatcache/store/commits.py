"""One commit of rows: the shard first, then the manifest that names it, written while the encoder goes on.

Hashing, writing and flushing a full shard take some tenths of a second, for which an encoder or a training step would
wait. The lock of Python is not held in them, so a thread does them. There is one commit at a time: rows are committed
in the order in which they were put, and at most two shards' worth of them is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from quatcache.errors import FormatError, StoreError
from quatcache.keys import KeyArray, distinct
from quatcache.store.draft import ShardDraft
from quatcache.store.files import MANIFEST_LOCK, locked
from quatcache.store.manifest import Manifest
from quatcache.store.pending import PendingShard
from quatcache.store.recovery import sure_manifest
from quatcache.store.rows import Rows, row_shape_of
from quatcache.store.shards import RowKind, ShardEntry, open_shard, write_shard

__all__ = ["Commit", "Committed", "begin_commit", "disappeared"]

Result = TypeVar("Result")


class Committed(NamedTuple):
    """What a commit left behind.

    Attributes:
        entry: The new shard.
        rows: Its rows, memory-mapped.
        manifest: What the directory holds now.
        refused: Shards that still are damaged.
    """

    entry: ShardEntry
    rows: Rows
    manifest: Manifest
    refused: frozenset[str]


@dataclass(frozen=True)
class Commit:
    """Rows that are being written.

    Attributes:
        shard: Holds them until they are.
        count: How many they are.
        outcome: What comes of it.
    """

    shard: PendingShard
    count: int
    outcome: Future[Committed]


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Do something in a thread of its own, which the interpreter waits for when it ends; else here and now."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="quatcache-commit")
    try:
        return executor.submit(work)
    except RuntimeError:  # the system has no more threads, or the interpreter is about to end
        outcome: Future[Result] = Future()
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)
        return outcome
    finally:
        executor.shutdown(wait=False)


def begin_commit(
    directory: Path, expected: Manifest, environment: Mapping[str, str], refused: frozenset[str], shard: PendingShard
) -> Commit:
    """Have rows written that were put, at least one; arguments and errors are those of :func:`write_commit`."""
    keys, rows, kind = latest(shard)
    work = partial(write_commit, directory, expected, environment, refused, keys, rows, kind, shard.draft)
    return Commit(shard, len(shard), in_background(work))


def latest(shard: PendingShard) -> tuple[KeyArray, Rows, RowKind]:
    """Say what is to be written of rows that were put, at least one: of a key that was put again, its last row.

    Returns:
        Distinct keys ``(n, 2)``, n rows, and what they are like.
    """
    keys, given_dtype = np.concatenate(shard.keys), shard.buffer.given_dtype
    assert given_dtype is not None
    rows: Rows = shard.buffer.rows[: len(keys)]
    first = np.sort(keys[:, 0])
    if (first[1:] == first[:-1]).any():
        last = np.sort(len(keys) - 1 - distinct(keys[::-1])[0])
        keys, rows = keys[last], rows[torch.from_numpy(last)]
    return keys, rows, RowKind(row_shape_of(rows), rows.dtype, given_dtype)


def write_commit(
    directory: Path,
    expected: Manifest,
    environment: Mapping[str, str],
    refused: frozenset[str],
    keys: KeyArray,
    rows: Rows,
    kind: RowKind,
    draft: ShardDraft,
) -> Committed:
    """Write a shard, and then a manifest with it.

    Args:
        directory: The directory of the store.
        expected: A manifest of the encoder.
        environment: Library versions and hardware that made the rows.
        refused: Names of shards that were damaged when they were opened: their entries go unless they are whole now.
        keys: Distinct keys ``(n, 2)``.
        rows: n rows in the storage dtype.
        kind: What they are like.
        draft: The file of the shard, as far as it is written.

    Raises:
        FormatError: The directory has rows of another kind.
        StoreError: It cannot be written, or disappeared; what was committed before is kept.
    """
    if expected.shards and not directory.is_dir():  # the lock would make it again
        raise disappeared(directory)
    with locked(directory / MANIFEST_LOCK):  # other ranks and processes add their shards too
        current = sure_manifest(directory, expected)
        refused = _still_damaged(directory, current, refused)
        current = current.without(refused)
        if current.shards and environment not in (current.environment, *current.verified):
            current = replace(current, environment={}, verified=())  # rows of several environments lie here now
        try:
            entry = write_shard(directory, expected.digest, keys, rows, kind.given_dtype, draft=draft)
            manifest = current.with_shard(entry, kind)
            manifest.write(directory)
        except StoreError as error:
            if directory.is_dir():
                raise
            raise disappeared(directory) from error
    try:
        _, mapped, _ = open_shard(directory, entry, expected.digest, kind, verify_checksum=False)
    except FormatError as error:
        raise disappeared(directory) from error
    return Committed(entry, mapped, manifest, refused)


def _still_damaged(directory: Path, manifest: Manifest, refused: frozenset[str]) -> frozenset[str]:
    """Look at refused shards again: some were perhaps out of reach for a moment only."""
    damaged = set(refused)
    for entry in manifest.shards:
        if entry.file in refused and manifest.kind is not None:
            with suppress(FormatError):
                open_shard(directory, entry, manifest.digest, manifest.kind)
                damaged.discard(entry.file)
    return frozenset(damaged)


def disappeared(directory: Path) -> StoreError:
    """Say that a directory is not there any more."""
    return StoreError(
        f"{directory} disappeared while rows were being written to it; bring it back, or choose another "
        "save_dir, and run again: what was committed is found where it is."
    )
