"""Where rows lie in memory, and how they get from there to the device that trains.

A GPU fetches from pinned memory while the processor goes on; a copy from other memory holds up both. So rows for a GPU
are gathered straight into pinned memory, in their storage dtype, and widened where they arrive: half the bytes cross
the bus. PyTorch's own allocator of pinned memory hands a block out again only once the copies from it are done, so it
already is the ring of reused buffers, each guarded by an event, that would else be written here.

On a CPU every batch gets memory of its own: whoever trains may keep batches, as ``predict`` and lists of embeddings do.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from quatcache.sequences import PaddedSequences

__all__ = ["empty_rows", "fetches", "send", "take_to", "touch_pages"]

CACHE_LINE = 64

Movable = TypeVar("Movable", torch.Tensor, PaddedSequences)


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Take memory for rows ``(N, *row_shape)``, which have any value.

    On the CPU NumPy takes it: it asks the system for large pages, PyTorch does not. Memory is then first touched in a
    half of the time, and random rows are found 10 to 20 percent faster.

    Example:
        >>> empty_rows((2, 3), torch.bfloat16, "cpu").shape
        torch.Size([2, 3])
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not size:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = np.empty(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[begin : begin + size]).view(dtype).view(tuple(shape))


def fetches(device: torch.device) -> bool:
    """Say whether a device copies from pinned memory by itself: CUDA does, MPS shares its memory with the processor."""
    return device.type == "cuda"


def send(values: Movable, device: torch.device | None) -> Movable:
    """Bring values to a device; from main memory to a GPU without waiting for the copy.

    Args:
        values: A tensor or sequences.
        device: Where to; None: they stay.

    Returns:
        The same values there; those that are there already are shared.

    Example:
        >>> send(torch.ones(1), torch.device("meta")).device
        device(type='meta')
    """
    if device is None or values.device == device:
        return values
    if values.device.type == "cpu" and fetches(device):
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def take_to(
    rows: torch.Tensor, numbers: torch.Tensor, dtype: torch.dtype | None, device: torch.device | None
) -> torch.Tensor:
    """Read rows by number, to where they are needed.

    Args:
        rows: ``(N, *row_shape)`` in the storage dtype, on any device.
        numbers: int64 ``(B,)``, on any device; on that of the rows nothing waits.
        dtype: Of the answer; None: as they are stored.
        device: Of the answer; None: where the rows are.

    Returns:
        A new tensor ``(B, *row_shape)``.

    Example:
        >>> take_to(torch.tensor([[1.0], [2.0]]).half(), torch.tensor([1]), torch.float32, None)
        tensor([[2.]])
    """
    numbers = send(numbers, rows.device)
    if device is None or rows.device.type != "cpu" or not fetches(device):
        taken = rows.index_select(0, numbers)
    else:
        taken = torch.empty((len(numbers), *rows.shape[1:]), dtype=rows.dtype, pin_memory=True)
        torch.index_select(rows, 0, numbers, out=taken)
    taken = send(taken, device)
    return taken if dtype is None else taken.to(dtype)


def touch_pages(rows: torch.Tensor, numbers: torch.Tensor) -> None:
    """Read a value from every page of some rows, so that a memory map has them when they are gathered.

    Args:
        rows: ``(N, *row_shape)``, memory-mapped.
        numbers: int64 ``(B,)``.
    """
    flat = rows.reshape(len(rows), -1)
    step = max(mmap.PAGESIZE // rows.element_size(), 1)
    flat[:, ::step].index_select(0, numbers)
    flat[:, -1:].index_select(0, numbers)  # a row begins anywhere in its first page
