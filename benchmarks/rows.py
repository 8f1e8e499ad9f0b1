"""A cache of any size whose every row can be checked without a second copy: its first three values say which it is.

They are the digits of its number to base 256, which every float type can hold. The other values are noise, drawn block
by block, so that a cache larger than memory can be written, and that nothing between here and the disk can compress it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quatcache.keys import KeyArray, content_keys
from quatcache.store import CacheDirectory, DatasetTable, DiskStore

__all__ = [
    "ENCODER",
    "WIDTH",
    "check_rows",
    "extend_cache",
    "keys_of",
    "mark",
    "numbers_of",
    "open_store",
    "random_batches",
    "row_blocks",
    "text_of",
    "write_cache",
]

WIDTH = 384
ENCODER = "default"
DIGEST = "0123456789abcdef" * 2
BLOCK = 1 << 13
BASE = 256
LARGEST = BASE**3


def text_of(index: int) -> str:
    """Give the text of item *index*."""
    return f"item {index}"


def keys_of(indices: Iterator[int] | range | list[int]) -> KeyArray:
    """Give the keys ``(n, 2)`` of some items."""
    return content_keys([text_of(index) for index in indices])


def row_blocks(rows: int) -> Iterator[tuple[int, Tensor]]:
    """Give all rows in blocks ``(n, 384)`` float32, each with the number of its first row.

    Args:
        rows: How many in all, at most 2^24.
    """
    if not 0 < rows <= LARGEST:
        raise SystemExit(f"{rows} rows cannot be told apart by three digits; ask for 1 to {LARGEST}")
    noise = torch.randn(BLOCK, WIDTH, generator=torch.Generator().manual_seed(0))
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        block = torch.roll(noise, start // BLOCK, dims=1)[:count].clone()
        mark(block, torch.arange(start, start + count))
        yield start, block


def mark(rows: Tensor, indices: Tensor) -> None:
    """Write its number into each row, in place.

    Args:
        rows: ``(B, 384)``.
        indices: ``(B,)`` int64, below 2^24.
    """
    for place in range(3):
        rows[:, place] = indices // BASE**place % BASE


def numbers_of(rows: Tensor) -> Tensor:
    """Read the numbers ``(B,)`` int64 of rows ``(B, 384)``."""
    digits = rows[:, :3].long()
    return digits[:, 0] + BASE * (digits[:, 1] + BASE * digits[:, 2])


def check_rows(rows: Tensor, indices: Tensor) -> None:
    """Stop unless these are the rows of these items.

    Args:
        rows: ``(B, 384)``.
        indices: ``(B,)``.
    """
    if rows.shape != (len(indices), WIDTH) or not torch.equal(numbers_of(rows), indices):
        raise SystemExit("wrong rows came back; no figure is given")


def open_store(folder: Path, *, checksums: bool = True) -> DiskStore:
    """Open the store of the benchmark as a run does."""
    return CacheDirectory(folder, verify_checksums=checksums).store(DIGEST, {"class": "benchmark"})


def write_cache(folder: Path, rows: int) -> None:
    """Write a store and the index table of its dataset."""
    store = open_store(folder)
    for start, block in row_blocks(rows):
        store.put_many(keys_of(range(start, start + len(block))), block)
    store.flush()
    keys = keys_of(range(rows)).reshape(rows, 1, 2)
    CacheDirectory(folder).write_table(DatasetTable({ENCODER: keys}, None, "group"))


def extend_cache(folder: Path, rows: int) -> None:
    """Let a cache that a fit of its first few items made have rows of many, at the cost of writing them.

    The encoder is not asked: the row of item *i* is the one of :func:`row_blocks`. The new items join the store and the
    dataset as if that fit had met them, with targets ``i % 2``.

    Args:
        folder: The ``save_dir`` of the fit; one encoder, samples ``(text_of(i), i % 2)``.
        rows: How many items there are to be.
    """
    directory = CacheDirectory(folder)
    (manifest,) = directory.manifests()
    (table,) = directory.tables([ENCODER])
    dtype = None if manifest.dtype == manifest.given_dtype else manifest.dtype
    store = directory.store(manifest.digest, manifest.facts, dtype)
    keys = np.empty((rows, 1, 2), np.int64)
    for start, block in row_blocks(rows):
        part = keys_of(range(start, start + len(block)))
        keys[start : start + len(block), 0] = part
        fresh = store.missing(part)
        store.put_many(part[fresh], block[torch.from_numpy(fresh)])
    store.flush()
    targets = None if table.targets is None else tuple((torch.arange(rows) % 2).to(t.dtype) for t in table.targets)
    directory.write_table(DatasetTable({ENCODER: keys}, targets, table.layout))


def random_batches(rows: int, size: int) -> Iterator[Tensor]:
    """Give every index once, in random batches."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(rows))
    yield from order.split(size)
