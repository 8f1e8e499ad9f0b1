"""Rows of either kind as they are stored: of one shape, in a tensor, or sequences, in :class:`RaggedRows`.

Stores handle both by what these have in common: length, selection, ``dtype``, ``nbytes``, ``to``, ``clone``. The
functions here are for the rest, and nothing else asks which kind it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from quatcache.sequences import PaddedSequences
from quatcache.store.buffer import RowBuffer
from quatcache.store.protocol import Found, RowShape, Values
from quatcache.store.ragged import RaggedBuffer, RaggedRows, offsets_of
from quatcache.store.transfer import empty_rows, take_to

__all__ = [
    "Buffer",
    "Rows",
    "assemble",
    "concatenate",
    "copy_rows",
    "gather",
    "new_buffer",
    "no_rows",
    "room_for",
    "row_bytes",
    "row_shape_of",
    "take",
    "wrapped",
]

Rows: TypeAlias = torch.Tensor | RaggedRows
"""Rows as they are stored: of one shape, or sequences."""

Buffer: TypeAlias = RowBuffer | RaggedBuffer
"""What rows of either kind are gathered in."""


def new_buffer(values: Values, device: torch.device | str, dtype: torch.dtype | None, capacity: int) -> Buffer:
    """Make an empty buffer of the kind that the first values need; arguments as for :class:`RowBuffer`."""
    kind = RaggedBuffer if isinstance(values, PaddedSequences) else RowBuffer
    return kind(device, dtype, capacity)


def wrapped(rows: Rows, given_dtype: torch.dtype | None) -> Buffer:
    """Make a buffer of rows without a copy."""
    return RaggedBuffer.of(rows, given_dtype) if isinstance(rows, RaggedRows) else RowBuffer.of(rows, given_dtype)


def row_shape_of(rows: Rows | Values) -> RowShape:
    """Give the shape of one row; None in it stands for the length of a sequence.

    Example:
        >>> row_shape_of(torch.zeros(2, 3)), row_shape_of(RaggedRows.between(torch.zeros(5, 3), torch.tensor([0, 5])))
        ((3,), (None, 3))
    """
    return tuple(rows.shape[1:]) if isinstance(rows, torch.Tensor) else rows.row_shape


def row_bytes(values: Values, dtype: torch.dtype | None) -> torch.Tensor:
    """Count the bytes that each row of a batch takes once it is stored, keys not counted.

    Args:
        values: B rows or sequences.
        dtype: Storage dtype of floating values; None: theirs.

    Returns:
        int64 ``(B,)`` on the CPU.

    Example:
        >>> row_bytes(torch.zeros(2, 3), torch.float16)
        tensor([6, 6])
    """
    kept = values.dtype if dtype is None or not values.dtype.is_floating_point else dtype
    if isinstance(values, PaddedSequences):
        places = 2 * torch.int64.itemsize
        return (values.lengths * math.prod(values.shape[2:]) * kept.itemsize + places).cpu()
    return torch.full((len(values),), math.prod(values.shape[1:]) * kept.itemsize)


def no_rows(row_shape: RowShape, dtype: torch.dtype) -> Rows:
    """Give an empty batch of stored rows."""
    sizes = [size for size in row_shape if size is not None]
    empty = torch.empty(0, *sizes, dtype=dtype)
    return empty if len(sizes) == len(row_shape) else RaggedRows.between(empty, torch.zeros(1, dtype=torch.int64))


def take(rows: Rows, numbers: torch.Tensor) -> Rows:
    """Select rows ``(n,)`` by number; of sequences no element is copied."""
    return rows.index_select(0, numbers) if isinstance(rows, torch.Tensor) else rows[numbers]


def gather(rows: Rows, numbers: torch.Tensor, dtype: torch.dtype | None, device: torch.device | None = None) -> Any:
    """Read rows ``(B,)`` by number as look-ups give them: a tensor, or :class:`PaddedSequences`, in some dtype.

    Args:
        rows: As they are stored.
        numbers: On the same device.
        dtype: Of the answer; None: as they are stored.
        device: Of the answer; None: where the rows are.
    """
    if isinstance(rows, RaggedRows):
        return rows[numbers].padded(dtype, device)
    return take_to(rows, numbers, dtype, device)


def concatenate(parts: Sequence[Rows]) -> Any:
    """Put rows of one kind behind each other."""
    packed = [part.packed() for part in parts if isinstance(part, RaggedRows)]
    if not packed:
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    values = torch.cat([part.values for part in packed])
    return RaggedRows.between(values, offsets_of(torch.cat([part.lengths for part in packed])))


def assemble(size: int, parts: Sequence[Found], dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Any:
    """Put the rows of several parts in the order of their positions.

    Args:
        size: How many rows there are in all.
        parts: Their positions are together ``range(size)``; their values are tensors ``(n, *row_shape)``, or else
            :class:`PaddedSequences` or :class:`RaggedRows`.
        dtype: Of the answer; None: that of the first part.
        device: Of the answer.

    Returns:
        A tensor ``(size, *row_shape)``, or :class:`PaddedSequences`.
    """
    full = [part for part in parts if len(part.positions)]
    if not full:
        return torch.empty(0, device=device)
    first = full[0].values
    if isinstance(first, torch.Tensor):
        answer = torch.empty((size, *first.shape[1:]), dtype=dtype or first.dtype, device=device)
        if len(full) == 1 and (np.diff(full[0].positions) > 0).all():  # in order; copied, for who gave it may reuse it
            return answer.copy_(first.detach())
        for positions, values in full:
            answer[torch.from_numpy(positions).to(device)] = values.detach().to(answer)
        return answer
    rows = [values if isinstance(values, RaggedRows) else RaggedRows.of(values.detach()) for _, values in full]
    together = concatenate([part.to(device) for part in rows])
    order = torch.argsort(torch.cat([torch.from_numpy(positions) for positions, _ in full]))
    return gather(together, order.to(device), dtype)


def room_for(parts: Sequence[Rows], device: torch.device | str) -> Rows:
    """Take memory for rows of several parts together; :func:`copy_rows` fills slices of it."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return empty_rows((sum(map(len, parts)), *first.shape[1:]), first.dtype, device)
    offsets = offsets_of(torch.cat([part.lengths for part in parts if isinstance(part, RaggedRows)]))
    elements = empty_rows((int(offsets[-1]), *first.values.shape[1:]), first.dtype, device)
    return RaggedRows.between(elements, offsets.to(device))


def copy_rows(rows: Rows, room: Rows) -> None:
    """Copy rows into a slice of what :func:`room_for` gave."""
    if isinstance(rows, torch.Tensor) and isinstance(room, torch.Tensor):
        room.copy_(rows)
    elif isinstance(rows, RaggedRows) and isinstance(room, RaggedRows) and len(room):
        room.values[int(room.starts[0]) : int(room.ends[-1])] = rows.packed().values.to(room.device)
