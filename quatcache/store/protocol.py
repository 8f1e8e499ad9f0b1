"""What every store promises, whether it keeps Python objects in a dict or rows in a memory map.

A store maps keys to values. A *batch of keys* is a sequence of hashable objects (:class:`MemoryStore`) or a
:data:`~quatcache.keys.KeyArray` (the row stores); a *batch of values* is a list or a tensor accordingly. The store
knows which, so it also puts an answer together from parts: that is all ``read_through`` needs to serve both.

Absence is told by position, never by a value: ``None``, zeros and NaN can all be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from quatcache.keys import KeyArray
from quatcache.sequences import PaddedSequences

__all__ = ["Found", "Positions", "RowShape", "RowStore", "Store", "Values"]

Positions = npt.NDArray[np.int64]
"""Positions within one batch of keys: shape ``(n,)``, int64, ascending unless said otherwise."""

RowShape: TypeAlias = tuple[int | None, ...]
"""Shape of one row. Of sequences, each of a length of its own, the first size is None."""

Values: TypeAlias = torch.Tensor | PaddedSequences
"""A batch of rows: a tensor ``(B, *row_shape)``, or sequences."""

Keys_contra = TypeVar("Keys_contra", contravariant=True)
Batch = TypeVar("Batch")


class Found(NamedTuple):
    """The hits of one look-up: which positions were found, and their values in the same order."""

    positions: Positions
    values: Any


class Store(Protocol[Keys_contra, Batch]):
    """Keys to values, in batches."""

    def __len__(self) -> int:
        """Count the keys that are stored."""
        ...

    def missing(self, keys: Keys_contra) -> Positions:
        """Give the positions of the keys that are absent, reading no value."""
        ...

    def get_many(self, keys: Keys_contra) -> Found:
        """Give the hits only."""
        ...

    def put_many(self, keys: Keys_contra, values: Batch) -> None:
        """Store one value per key, the keys being distinct; a key that is present gets the new value.

        A store with a budget may decline or evict: only ``missing`` and ``get_many`` tell what it holds.
        """
        ...

    def assemble(self, size: int, parts: Sequence[Found]) -> Batch:
        """Put values in the order of their positions, which together are ``range(size)``."""
        ...


class RowStore(Store[KeyArray, Values], Protocol):
    """A store whose values are rows of one dtype, reachable by number once their keys were looked up.

    They have one shape, or are sequences: which of both, the first values decide.
    """

    @property
    def row_shape(self) -> RowShape | None:
        """Shape of one row; None while nothing was stored."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows, keys not counted."""
        ...

    @property
    def numbered(self) -> int:
        """Count the row numbers that were given out; as long as none is added, look-ups answer as they did."""
        ...

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent. Numbers stay valid while the store is open."""
        ...

    def gather(self, rows: torch.Tensor, device: torch.device | None = None) -> Any:
        """Read rows ``(B,)`` int64, none negative, in the encoder's dtype.

        Args:
            rows: Their numbers.
            device: Where they are needed; they travel in the storage dtype. None: where the store answers.

        Returns:
            A new tensor ``(B, *row_shape)``, or new :class:`~quatcache.sequences.PaddedSequences`.
        """
        ...
