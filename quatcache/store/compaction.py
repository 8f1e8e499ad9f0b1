"""Packing: many small shards of a slow fill become few big ones.

A slow encoder commits every half minute, and each commit is a file. A day of that is thousands of shards to open at
every start and to gather from at every step. So runs of small neighbours are written once more as one shard, the
manifest is switched to it in one rename, and only then are the old files deleted. Whoever has them open keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quatcache.errors import FormatError
from quatcache.keys import distinct
from quatcache.store.manifest import Manifest
from quatcache.store.rows import concatenate
from quatcache.store.shards import ShardEntry, open_shard, write_shard

__all__ = ["pack"]

logger = logging.getLogger(__name__)

FEWEST = 8
"""Runs of fewer small shards are left: rewriting them at each run would cost more than it saves."""


def pack(directory: Path, manifest: Manifest, shard_bytes: int) -> Manifest:
    """Write runs of small neighbouring shards as one shard each; the caller holds the lock of the manifest.

    Args:
        directory: The directory of the store.
        manifest: What is there.
        shard_bytes: Size of a full shard; those of less than half of it are small.

    Returns:
        The manifest that is there now.

    Raises:
        StoreError: The directory cannot be written; every row is still where it was.
    """
    packed: list[ShardEntry] = []
    gone: list[ShardEntry] = []
    for run in _runs(manifest.shards, shard_bytes):
        if len(run) < FEWEST:
            packed.extend(run)
            continue
        try:
            packed.append(_merged(directory, manifest, run))
        except FormatError as error:  # a damaged shard is for the next run to find and to fill again
            logger.warning("%s", error)
            packed.extend(run)
        else:
            gone.extend(run)
    if not gone:
        return manifest
    manifest = replace(manifest, shards=tuple(packed))
    manifest.write(directory)
    for entry in gone:
        with suppress(OSError):  # Windows does not delete what is mapped; an orphan is harmless, and pruned later
            (directory / entry.file).unlink()
    return manifest


def _runs(shards: Sequence[ShardEntry], shard_bytes: int) -> Iterator[list[ShardEntry]]:
    """Split shards into runs of small neighbours that fit one shard together, and single big ones."""
    run: list[ShardEntry] = []
    for entry in shards:
        small = entry.bytes < shard_bytes // 2
        if run and (not small or sum(one.bytes for one in run) + entry.bytes > shard_bytes):
            yield run
            run = []
        if small:
            run.append(entry)
        else:
            yield [entry]
    if run:
        yield run


def _merged(directory: Path, manifest: Manifest, run: Sequence[ShardEntry]) -> ShardEntry:
    kind = manifest.kind
    assert kind is not None
    opened = [open_shard(directory, entry, manifest.digest, kind) for entry in reversed(run)]
    keys = np.concatenate([keys for keys, _, _ in opened])
    rows = concatenate([rows for _, rows, _ in opened])
    firsts, _ = distinct(keys)  # newest first: a key that was put again keeps its latest row
    return write_shard(
        directory, manifest.digest, keys[firsts], rows[torch.from_numpy(firsts)], kind.given_dtype, repacked=True
    )
