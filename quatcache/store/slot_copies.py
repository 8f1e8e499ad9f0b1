"""Rows copied out of shared memory: into memory of the process, or into memory that another process will get.

A batch of images is large, and the memory for it is new each time. Measured for 64 rows of 150 kB on one core of a
virtual machine: 5.0 ms into new shared memory, each page of which is zeroed and mapped when it is first touched, and
2.5 ms when the kernel writes them there.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch.multiprocessing import get_sharing_strategy

from quatcache.store.protocol import Positions

__all__ = ["copied_rows"]

_WRITTEN_FROM = 1 << 12  # bytes of a row: of shorter ones the calls cost more than the pages
_AT_ONCE = 512  # rows in one call of the kernel, which takes 1,024 at most


def copied_rows(words: torch.Tensor, rows: Positions, *, shared: bool = False) -> torch.Tensor:
    """Copy rows.

    Args:
        words: Where they are, ``(N, width)`` int64 or uint8, contiguous.
        rows: Their numbers ``(n,)``.
        shared: Copy into shared memory, which a loader worker hands over without a further copy.

    Returns:
        A new tensor ``(n, width)``.

    Example:
        >>> copied_rows(torch.arange(6).view(3, 2), np.array([2, 0])).tolist()
        [[4, 5], [0, 1]]
    """
    shape = (len(rows), words.shape[1])
    if not shared or not len(rows):
        # NumPy asks for large pages, torch does not
        out = torch.from_numpy(np.empty(shape, np.uint8 if words.dtype == torch.uint8 else np.int64))
        return torch.index_select(words, 0, torch.from_numpy(rows), out=out)
    # as default_collate makes it; share_memory_() would copy
    storage = torch.UntypedStorage._new_shared(shape[0] * shape[1] * words.element_size())  # type: ignore[no-untyped-call]
    out = torch.empty(0, dtype=words.dtype).set_(storage, 0, shape, (shape[1], 1))
    if not _written(storage, words, rows):
        torch.index_select(words, 0, torch.from_numpy(rows), out=out)
    return out


def _written(storage: torch.UntypedStorage, words: torch.Tensor, rows: Positions) -> bool:
    """Have the kernel write rows into the file behind shared memory, where that is possible and worth it."""
    row_bytes = words.shape[1] * words.element_size()
    if row_bytes < _WRITTEN_FROM or not hasattr(os, "pwritev") or get_sharing_strategy() != "file_descriptor":  # type: ignore[no-untyped-call]
        return False
    descriptor, source = storage._share_fd_cpu_()[0], words.numpy()
    for start in range(0, len(rows), _AT_ONCE):
        part = [source[row] for row in rows[start : start + _AT_ONCE].tolist()]
        if os.pwritev(descriptor, part, start * row_bytes) != len(part) * row_bytes:
            return False
    return True
