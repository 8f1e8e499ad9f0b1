"""Rows of one shape and dtype in the memory of a device, by number.

One tensor holds all rows, because one ``index_select`` is what an epoch consists of. It grows by doubling, from a
capacity that a fill can give ahead (on the CPU, pages that are never written are never allocated).
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from quatcache.errors import EncoderOutputError
from quatcache.sequences import PaddedSequences
from quatcache.store.protocol import Values
from quatcache.store.transfer import empty_rows, take_to

__all__ = ["RowBuffer", "as_rows"]

Batch = TypeVar("Batch", torch.Tensor, PaddedSequences)


def as_rows(values: Batch, row_shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> Batch:
    """Check a batch of values against the rows that are there, and cast it for storage.

    Args:
        values: ``(n, *shape)``, any device; or sequences, of whose elements the rest is said.
        row_shape: The shape that rows have; None when these are the first.
        dtype: Storage dtype for floating values; None keeps theirs.

    Returns:
        The values without gradient, on their own device.

    Raises:
        EncoderOutputError: Another row shape, or a finite value that the storage dtype turns into infinity.

    Example:
        >>> as_rows(torch.ones(2, 3), None, torch.float16).dtype
        torch.float16
    """
    if isinstance(values, PaddedSequences):
        elements = as_rows(values.values.flatten(0, 1), row_shape, dtype)
        return PaddedSequences(elements.reshape(*values.shape[:2], *elements.shape[1:]), values.mask)
    assert isinstance(values, torch.Tensor)
    values = values.detach()
    if row_shape is not None and tuple(values.shape[1:]) != row_shape:
        raise EncoderOutputError(
            f"a row of shape {tuple(values.shape[1:])} came after rows of shape {row_shape}; "
            "every item must give one row of the same shape."
        )
    if dtype is None or dtype == values.dtype or not values.is_floating_point():
        return values
    stored = values.to(dtype)
    infinite = ~torch.isfinite(stored)
    if infinite.any() and (infinite := infinite & torch.isfinite(values)).any():
        raise EncoderOutputError(
            f"a value of {values[infinite].abs().max().item():.4g} does not fit the storage dtype {dtype}; "
            "use dtype=torch.bfloat16 or leave dtype unset."
        )
    return stored


class RowBuffer:
    """Rows that are appended, replaced and gathered by number.

    Args:
        device: Where the rows are kept.
        dtype: Storage dtype of floating rows; None keeps the dtype of the first batch.
        capacity: Rows to make room for ahead; the buffer grows beyond it as needed.

    Attributes:
        given_dtype: The dtype that rows are given in and gathered in; None while empty.

    Example:
        >>> buffer = RowBuffer(dtype=torch.float16)
        >>> buffer.append(buffer.checked(torch.tensor([[0.0, 0.0], [1.0, 2.0]])))
        >>> buffer.gather(torch.tensor([1, 0]))
        tensor([[1., 2.],
                [0., 0.]])
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, capacity: int = 0) -> None:
        """Start empty; memory is taken when the first rows tell their shape."""
        self.device = torch.device(device)
        self.given_dtype: torch.dtype | None = None
        self._dtype = dtype
        self._capacity = capacity
        self._rows: torch.Tensor | None = None
        self._used = 0

    @classmethod
    def of(cls, rows: torch.Tensor, given_dtype: torch.dtype | None) -> RowBuffer:
        """Wrap rows ``(N, *shape)`` without a copy; given_dtype None: that of the rows."""
        buffer = cls(rows.device, rows.dtype)
        buffer._rows, buffer._used, buffer.given_dtype = rows, len(rows), given_dtype or rows.dtype
        return buffer

    def __len__(self) -> int:
        """Count the rows in use."""
        return self._used

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """Shape of one row; None while nothing was appended."""
        return None if self._rows is None else tuple(self._rows.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        if self._rows is None:
            return 0
        return self._used * math.prod(self._rows.shape[1:]) * self._rows.element_size()

    @property
    def rows(self) -> torch.Tensor:
        """The rows in use ``(N, *row_shape)`` in the storage dtype: a view."""
        return torch.empty(0, device=self.device) if self._rows is None else self._rows[: self._used]

    def checked(self, values: Values) -> torch.Tensor:
        """Check a batch of rows against those that are there, and cast it for storage.

        Args:
            values: ``(n, *row_shape)``, any device.

        Raises:
            EncoderOutputError: The rows have another shape or dtype than those stored, do not fit the storage dtype, or
                are sequences.
        """
        if isinstance(values, PaddedSequences):
            raise EncoderOutputError(
                f"a sequence came after rows of shape {self.row_shape}; every item must give one row of the same shape."
            )
        if self.given_dtype not in {None, values.dtype}:
            raise EncoderOutputError(
                f"a row of {values.dtype} came after rows of {self.given_dtype}; every item must give one row of the "
                "same dtype."
            )
        rows = as_rows(values, self.row_shape, self._dtype)
        self.given_dtype = values.dtype
        return rows

    def append(self, rows: torch.Tensor) -> None:
        """Put checked rows behind those that are there."""
        self._reserve(self._used + len(rows), rows)
        assert self._rows is not None
        self._rows[self._used : self._used + len(rows)] = rows  # across devices too
        self._used += len(rows)

    def replace(self, numbers: torch.Tensor, rows: torch.Tensor) -> None:
        """Put checked rows in the place of others, by number ``(n,)``."""
        assert self._rows is not None
        self._rows.index_copy_(0, numbers.to(self.device), rows.to(self._rows))

    def gather(self, numbers: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Read rows ``(B,)`` into a new tensor ``(B, *row_shape)``, as they were given.

        Args:
            numbers: On any device.
            device: Of the answer; None: that of the buffer.
        """
        if self._rows is None:
            return torch.empty(0, device=device or self.device)
        return take_to(self._rows, numbers, self.given_dtype, device)

    def clear(self) -> None:
        """Forget all rows, and keep the memory for the next ones."""
        self._used = 0

    def _reserve(self, needed: int, like: torch.Tensor) -> None:
        held = 0 if self._rows is None else len(self._rows)
        if self._rows is not None and needed <= held:
            return
        capacity = max(needed, self._capacity if self._rows is None else 2 * held)
        with torch.inference_mode(False):  # rows made in inference mode could not be written outside it
            grown = empty_rows((capacity, *like.shape[1:]), like.dtype, self.device)
        if self._rows is not None:
            grown[: self._used] = self._rows[: self._used]
        self._rows = grown
