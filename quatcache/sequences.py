"""Sequences of different lengths in one batch: padded values and the mask that tells what is padding.

This is what token-level encoders give and what the layers above them take. The class looks like a tensor where a batch
of rows is handled (length, shape, selection, device), so that what hands rows on need not know which kind they are; a
named tuple, whose length is that of its fields, could not. ``torch.nested`` has such a type too, but the models that
consume token states take padded values and a mask, so every step would have to convert it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quatcache.errors import EncoderOutputError

__all__ = ["PaddedSequences"]


@dataclass(eq=False)
class PaddedSequences:
    """A batch of sequences, each of a length of its own.

    An encoder returns it from ``forward`` where the value of an item is a sequence, for instance the states of its
    tokens. What it puts into the padding is not kept: from a cache the padding is zeros, on the right, and as wide as
    the longest sequence of the batch needs. So a head must mind the mask, and an encoder does best to return zeros.

    Attributes:
        values: ``(B, L, *shape)``.
        mask: ``(B, L)`` bool, true where a value belongs to the sequence; zeros and ones of a whole-number dtype are
            taken, too.

    Raises:
        EncoderOutputError: Values and mask do not fit together.

    Example:
        >>> sequences = PaddedSequences(torch.ones(2, 3, 4), torch.tensor([[True, True, True], [True, False, False]]))
        >>> len(sequences), sequences.lengths.tolist(), sequences.elements.shape
        (2, [3, 1], torch.Size([4, 4]))
    """

    values: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        """Hold values and mask against each other."""
        if self.values.dim() < 2 or self.mask.shape != self.values.shape[:2] or self.mask.is_floating_point():
            raise EncoderOutputError(
                f"sequences of values {tuple(self.values.shape)} came with a {self.mask.dtype} mask "
                f"{tuple(self.mask.shape)}; give values (B, L, *shape) and a bool mask (B, L)."
            )
        self.mask = self.mask.bool()

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self.values)

    def __getitem__(self, which: slice | Tensor | npt.NDArray[Any]) -> PaddedSequences:
        """Select sequences, as wide as they are here."""
        return PaddedSequences(self.values[which], self.mask[which])

    __iter__ = None
    """Neither its sequences nor its fields are meant by taking it apart."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, ``(B, L, *shape)``."""
        return self.values.shape

    @property
    def row_shape(self) -> tuple[int | None, ...]:
        """``(None, *shape)``: None stands for the length."""
        return (None, *self.values.shape[2:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def lengths(self) -> Tensor:
        """How long each sequence is, int64 ``(B,)``."""
        return self.mask.sum(dim=1)

    @property
    def elements(self) -> Tensor:
        """The values less the padding, one sequence after the other: ``(sum of lengths, *shape)``, a copy."""
        return self.values[self.mask]

    def normalised(self) -> PaddedSequences:
        """Give the same sequences as a cache gives them: padded on the right, with zeros, to the longest of them."""
        lengths = self.lengths
        width = int(lengths.max()) if len(lengths) else 0
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        values = self.values.new_zeros((len(self), width, *self.shape[2:]))
        values[mask] = self.elements
        return PaddedSequences(values, mask)

    def to(self, *args: Any, **kwargs: Any) -> PaddedSequences:
        """Bring the values to a device or dtype, as ``Tensor.to`` does, and the mask to the same device."""
        values = self.values.to(*args, **kwargs)
        return PaddedSequences(values, self.mask.to(values.device, non_blocking=kwargs.get("non_blocking", False)))

    def cpu(self) -> PaddedSequences:
        """Bring the sequences into main memory."""
        return self.to("cpu")

    def detach(self) -> PaddedSequences:
        """Give the same values without gradient."""
        return PaddedSequences(self.values.detach(), self.mask)

    def pin_memory(self) -> PaddedSequences:
        """Copy the sequences where a GPU can fetch them without waiting."""
        return PaddedSequences(self.values.pin_memory(), self.mask.pin_memory())

    @classmethod
    def concatenate(cls, parts: Sequence[PaddedSequences]) -> PaddedSequences:
        """Put batches behind each other, all as wide as the widest.

        Args:
            parts: One or more batches of like shape, dtype and device.
        """
        width = max(part.shape[1] for part in parts)
        first, starts = parts[0], np.cumsum([0, *map(len, parts)]).tolist()
        values = first.values.new_zeros((starts[-1], width, *first.shape[2:]))
        mask = first.mask.new_zeros((starts[-1], width))
        for start, part in zip(starts, parts, strict=False):
            values[start : start + len(part), : part.shape[1]] = part.values
            mask[start : start + len(part), : part.shape[1]] = part.mask
        return cls(values, mask)
