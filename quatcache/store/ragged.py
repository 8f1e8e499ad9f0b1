"""Rows that are sequences of different lengths, stored without padding.

All elements of all sequences lie in one tensor, one sequence after the other; where each begins and ends stands beside
it. So a selection of sequences is a selection of such places and copies no element, a batch is gathered in one
``index_select``, and what is on disk can be used from its memory map as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from quatcache.errors import EncoderOutputError
from quatcache.sequences import PaddedSequences
from quatcache.store.buffer import RowBuffer
from quatcache.store.protocol import RowShape, Values
from quatcache.store.transfer import send, touch_pages

__all__ = ["RaggedBuffer", "RaggedRows", "offsets_of"]


@dataclass(frozen=True, eq=False)
class RaggedRows:
    """Sequences as places in one tensor.

    Attributes:
        values: Elements ``(E, *shape)``.
        starts: Place of the first element of each sequence, int64 ``(n,)``.
        ends: Place behind its last.

    Example:
        >>> rows = RaggedRows.between(torch.arange(5.0), torch.tensor([0, 2, 2, 5]))
        >>> rows[torch.tensor([2, 0])].padded().values
        tensor([[2., 3., 4.],
                [0., 1., 0.]])
    """

    values: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def between(cls, values: torch.Tensor, offsets: torch.Tensor) -> RaggedRows:
        """Take sequences that lie behind each other, *i* from ``offsets[i]`` to ``offsets[i + 1]``."""
        return cls(values, offsets[:-1], offsets[1:])

    @classmethod
    def of(cls, sequences: PaddedSequences) -> RaggedRows:
        """Drop the padding."""
        return cls.between(sequences.elements, offsets_of(sequences.lengths))

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self.starts)

    def __getitem__(self, which: Any) -> RaggedRows:
        """Select sequences by a slice, a mask or numbers; their elements stay where they are."""
        return RaggedRows(self.values, self.starts[which], self.ends[which])

    @property
    def row_shape(self) -> RowShape:
        """``(None, *shape)``: None stands for the length."""
        return (None, *self.values.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the elements are."""
        return self.values.device

    @property
    def lengths(self) -> torch.Tensor:
        """How long each sequence is, int64 ``(n,)``."""
        return self.ends - self.starts

    @property
    def nbytes(self) -> int:
        """Bytes of the elements of these sequences, and of their places."""
        element = math.prod(self.values.shape[1:]) * self.values.element_size()
        return int(self.lengths.sum()) * element + self.starts.nbytes + self.ends.nbytes

    @property
    def offsets(self) -> torch.Tensor:
        """Where each sequence begins once they are packed, and where the last one ends: int64 ``(n + 1,)``."""
        return offsets_of(self.lengths)

    def packed(self) -> RaggedRows:
        """Bring the elements of these sequences behind each other; those that are already are not copied."""
        offsets = self.offsets
        if int(offsets[-1]) == len(self.values) and torch.equal(self.starts, offsets[:-1]):
            return self
        steps = torch.arange(int(offsets[-1]), device=self.device)
        places = torch.repeat_interleave(self.starts - offsets[:-1], self.lengths) + steps
        return RaggedRows.between(self.values.index_select(0, places), offsets)

    def clone(self) -> RaggedRows:
        """Copy these sequences."""
        packed = self.packed()
        return RaggedRows.between(packed.values.clone(), packed.offsets)

    def to(self, device: torch.device | str) -> RaggedRows:
        """Bring these sequences to a device; on the one where they are they are shared."""
        if self.device == torch.device(device):
            return self
        packed = self.packed()
        return RaggedRows.between(packed.values.to(device), packed.offsets.to(device))

    def padded(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> PaddedSequences:
        """Copy the sequences into one batch, padded with zeros on the right to the longest of them.

        Args:
            dtype: Of the values; None: as they are.
            device: Of the batch; None: where the sequences are.
        """
        if device is not None and device != self.device:
            there = send(self.padded(), device)  # in the storage dtype
            return there if dtype is None else there.to(dtype)
        places, mask = self._places()
        elements = self.values.index_select(0, places)
        shape = self.values.shape[1:]
        values = torch.zeros((mask.numel(), *shape), dtype=dtype or self.dtype, device=self.device)
        values.index_copy_(0, mask.reshape(-1).nonzero().reshape(-1), elements.to(values.dtype))
        return PaddedSequences(values.reshape(*mask.shape, *shape), mask)

    def touch(self) -> None:
        """Read a value from every page of the elements; see :func:`~quatcache.store.transfer.touch_pages`."""
        touch_pages(self.values, self._places()[0])

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the places of all elements, and the mask of the sequences once they are padded."""
        lengths = self.lengths
        steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=self.device)
        mask = steps < lengths[:, None]
        return (self.starts[:, None] + steps)[mask], mask


def offsets_of(lengths: torch.Tensor) -> torch.Tensor:
    """Say where sequences begin that lie behind each other, and where the last one ends: int64 ``(n + 1,)``."""
    offsets = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


class RaggedBuffer:
    """Sequences that are appended, replaced and gathered by number.

    One that is put in the place of another goes behind all others, as it may be longer; the old elements stay.

    Args:
        device: Where the sequences are kept.
        dtype: Storage dtype of floating elements; None keeps the dtype of the first batch.
        capacity: Sequences to make room for ahead, each of one element; the buffer grows beyond it as needed.

    Example:
        >>> buffer = RaggedBuffer(dtype=torch.float16)
        >>> given = PaddedSequences(torch.ones(2, 3, 1), torch.tensor([[1, 1, 1], [1, 0, 0]]))
        >>> buffer.append(buffer.checked(given))
        >>> buffer.gather(torch.tensor([1])).values.shape
        torch.Size([1, 1, 1])
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, capacity: int = 0) -> None:
        """Start empty; memory is taken when the first sequences tell what their elements are like."""
        self.device = torch.device(device)
        self._elements = RowBuffer(device, dtype, capacity)
        self._starts = RowBuffer(device, capacity=capacity)
        self._ends = RowBuffer(device, capacity=capacity)

    @classmethod
    def of(cls, rows: RaggedRows, given_dtype: torch.dtype | None) -> RaggedBuffer:
        """Wrap sequences without a copy; given_dtype None: that of their elements."""
        buffer = cls(rows.device)
        buffer._elements = RowBuffer.of(rows.values, given_dtype)
        buffer._starts, buffer._ends = RowBuffer.of(rows.starts, None), RowBuffer.of(rows.ends, None)
        return buffer

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self._starts)

    @property
    def given_dtype(self) -> torch.dtype | None:
        """The dtype that sequences are given in and gathered in; None while empty."""
        return self._elements.given_dtype

    @property
    def row_shape(self) -> RowShape | None:
        """``(None, *shape)``; None while nothing was appended."""
        shape = self._elements.row_shape
        return None if shape is None else (None, *shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements and their places, those of replaced sequences included."""
        return self._elements.nbytes + self._starts.nbytes + self._ends.nbytes

    @property
    def rows(self) -> RaggedRows:
        """The sequences in the storage dtype: a view."""
        return RaggedRows(self._elements.rows, self._starts.rows, self._ends.rows)

    def checked(self, values: Values) -> RaggedRows:
        """Check a batch against the sequences that are there, drop its padding, and cast it for storage.

        Raises:
            EncoderOutputError: They are rows of one shape, their elements have another shape or dtype than those
                stored, or they do not fit the storage dtype.
        """
        if not isinstance(values, PaddedSequences):
            raise EncoderOutputError(
                f"a row of shape {tuple(values.shape[1:])} came after sequences; every item must give a sequence, in "
                "PaddedSequences."
            )
        rows = RaggedRows.of(values.detach())
        return RaggedRows(self._elements.checked(rows.values), rows.starts, rows.ends)

    def append(self, rows: RaggedRows) -> None:
        """Put checked sequences behind those that are there."""
        starts, ends = self._placed(rows)
        self._starts.append(starts)
        self._ends.append(ends)

    def replace(self, numbers: torch.Tensor, rows: RaggedRows) -> None:
        """Put checked sequences in the place of others, by number ``(n,)``."""
        starts, ends = self._placed(rows)
        self._starts.replace(numbers, starts)
        self._ends.replace(numbers, ends)

    def _placed(self, rows: RaggedRows) -> tuple[torch.Tensor, torch.Tensor]:
        used, packed = len(self._elements), rows.packed()
        self._elements.append(packed.values)
        return packed.starts + used, packed.ends + used

    def gather(self, numbers: torch.Tensor, device: torch.device | None = None) -> PaddedSequences:
        """Read sequences ``(B,)`` into a new batch, as they were given; arguments as for :class:`RowBuffer`."""
        return self.rows[send(numbers, self.device)].padded(self.given_dtype, device)

    def clear(self) -> None:
        """Forget all sequences, and keep the memory for the next ones."""
        for part in (self._elements, self._starts, self._ends):
            part.clear()
