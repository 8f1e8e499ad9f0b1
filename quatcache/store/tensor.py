"""A row store in the memory of one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.keys import KeyArray, KeyIndex
from quatcache.store.buffer import RowBuffer
from quatcache.store.protocol import Found, Positions, RowShape, Values
from quatcache.store.rows import Buffer, Rows, assemble, new_buffer, wrapped

__all__ = ["TensorStore"]


class TensorStore:
    """A row store in memory, on the CPU or on a GPU.

    Args:
        device: Where the rows are kept.
        dtype: Storage dtype of floating rows; None keeps the dtype of the first batch.
        capacity: Rows to make room for ahead; the store grows beyond it as needed.

    Example:
        >>> from quatcache.keys import content_keys
        >>> store = TensorStore()
        >>> store.put_many(content_keys(["a", "b"]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
        >>> store.gather(torch.from_numpy(store.rows_of(content_keys(["b", "a"]))))
        tensor([[1., 2.],
                [0., 0.]])
    """

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, capacity: int = 0) -> None:
        """Start empty; memory is taken when the first rows tell their shape."""
        self._new_buffer: Callable[[Values], Buffer] = partial(
            new_buffer, device=device, dtype=dtype, capacity=capacity
        )
        self._buffer: Buffer = RowBuffer(device)
        self._index = KeyIndex()

    @classmethod
    def of(
        cls,
        keys: KeyArray,
        numbers: npt.NDArray[np.int64],
        rows: Rows,
        given_dtype: torch.dtype | None = None,
    ) -> TensorStore:
        """Wrap rows that are in memory already, without a copy.

        Args:
            keys: Distinct keys ``(K, 2)``.
            numbers: The row of each key, ``(K,)``.
            rows: N rows, on the device where they stay.
            given_dtype: The dtype that look-ups return; None: that of the rows.
        """
        store = cls()
        store._buffer = wrapped(rows, given_dtype)
        store._index.add(keys, numbers)
        return store

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._buffer.device

    @property
    def given_dtype(self) -> torch.dtype | None:
        """The dtype that the encoder gives, and that look-ups return; None while empty."""
        return self._buffer.given_dtype

    def __len__(self) -> int:
        """Count the stored keys."""
        return len(self._index)

    @property
    def row_shape(self) -> RowShape | None:
        """Shape of one row; None while empty."""
        return self._buffer.row_shape

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return self._buffer.nbytes

    @property
    def rows(self) -> Any:
        """The rows in use ``(N, *row_shape)`` in the storage dtype: a view; of sequences, as they lie in memory."""
        return self._buffer.rows

    @property
    def numbered(self) -> int:
        """Count the row numbers that were given out."""
        return len(self._buffer)

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent."""
        return self._index.find(keys)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent keys."""
        return np.flatnonzero(self.rows_of(keys) < 0)

    def gather(self, rows: torch.Tensor, device: torch.device | None = None) -> Any:
        """Read rows ``(B,)`` in the encoder's dtype.

        Args:
            rows: int64, none negative.
            device: Of the answer; None: that of the store.

        Returns:
            A new tensor ``(B, *row_shape)``, or new :class:`~quatcache.sequences.PaddedSequences`.
        """
        return self._buffer.gather(rows, device)

    def get_many(self, keys: KeyArray) -> Found:
        """Give the hits only."""
        rows = self.rows_of(keys)
        positions = np.flatnonzero(rows >= 0)
        return Found(positions, self.gather(torch.from_numpy(rows[positions])))

    def put_many(self, keys: KeyArray, values: Values) -> None:
        """Store rows ``(n, *row_shape)``, or sequences, for distinct keys; a present key gets the new row.

        Raises:
            EncoderOutputError: The rows have another shape or dtype than those stored, or do not fit the storage dtype.
        """
        if not len(keys):
            return
        if self._buffer.row_shape is None:
            self._buffer = self._new_buffer(values)
        rows: Any = self._buffer.checked(values)
        numbers = self._index.find(keys)
        fresh, used = numbers < 0, len(self._buffer)
        if not fresh.all():
            present = torch.from_numpy(~fresh)
            self._buffer.replace(torch.from_numpy(numbers[~fresh]), rows[present.to(rows.device)])
            keys, rows = keys[fresh], rows[torch.from_numpy(fresh).to(rows.device)]
        self._buffer.append(rows)
        self._index.add(keys, np.arange(used, len(self._buffer)))

    def to(self, device: torch.device | str) -> TensorStore:
        """Bring the rows to a device; their numbers stay. On the device where they are they are shared.

        Returns:
            A new store, with room for the rows in use only.
        """
        keys, numbers = self._index.items()
        return TensorStore.of(keys, numbers, self.rows.to(device), self.given_dtype)

    def assemble(self, size: int, parts: Sequence[Found]) -> Any:
        """Put rows in the order of their positions, on the store's device and in the encoder's dtype."""
        return assemble(size, parts, self.given_dtype, self.device)
