"""Rows in the memory of one device, gathered by number.

One tensor holds all rows, because one ``index_select`` is what an epoch consists of. It grows by doubling, from a
capacity that a fill can give ahead (on the CPU, pages that are never written are never allocated).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from quatcache.errors import EncoderOutputError
from quatcache.keys import KeyArray, KeyIndex
from quatcache.store.protocol import Found, Positions

__all__ = ["TensorStore", "as_rows"]


def as_rows(values: torch.Tensor, row_shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> torch.Tensor:
    """Check a batch of values against the rows that are there, and cast it for storage.

    Args:
        values: ``(n, *shape)``, any device.
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
            "use CacheConfig(dtype=torch.bfloat16) or leave dtype unset."
        )
    return stored


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
        self.device = torch.device(device)
        self._dtype = dtype
        self.given_dtype: torch.dtype | None = None  # what the encoder gives, hence what a look-up returns
        self._capacity = capacity
        self._index = KeyIndex()
        self._rows: torch.Tensor | None = None
        self._used = 0

    @classmethod
    def of(
        cls,
        keys: KeyArray,
        numbers: npt.NDArray[np.int64],
        rows: torch.Tensor,
        given_dtype: torch.dtype | None = None,
    ) -> TensorStore:
        """Wrap rows that are in memory already, without a copy.

        Args:
            keys: Distinct keys ``(K, 2)``.
            numbers: The row of each key, ``(K,)``.
            rows: ``(N, *shape)``, on the device where they stay.
            given_dtype: The dtype that look-ups return; None: that of the rows.
        """
        store = cls(rows.device, rows.dtype)
        store._rows, store._used, store.given_dtype = rows, len(rows), given_dtype or rows.dtype
        store._index.add(keys, numbers)
        return store

    def __len__(self) -> int:
        """Count the stored keys."""
        return len(self._index)

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """Shape of one row; None while empty."""
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

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent."""
        return self._index.find(keys)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent keys."""
        return np.flatnonzero(self.rows_of(keys) < 0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Read rows ``(B,)`` into a new tensor ``(B, *row_shape)`` on the store's device, in the encoder's dtype."""
        if self._rows is None:
            return torch.empty(0, device=self.device)
        taken = self._rows.index_select(0, rows.to(self.device, non_blocking=True))
        return taken if taken.dtype == self.given_dtype else taken.to(self.given_dtype)

    def get_many(self, keys: KeyArray) -> Found:
        """Give the hits only, as ``(H, *row_shape)``."""
        rows = self.rows_of(keys)
        positions = np.flatnonzero(rows >= 0)
        return Found(positions, self.gather(torch.from_numpy(rows[positions])))

    def put_many(self, keys: KeyArray, values: torch.Tensor) -> None:
        """Store rows ``(n, *row_shape)`` for distinct keys; a present key gets the new row.

        Raises:
            EncoderOutputError: The rows have another shape or dtype than those stored, or do not fit the storage dtype.
        """
        if not len(keys):
            return
        if self.given_dtype not in {None, values.dtype}:
            raise EncoderOutputError(
                f"a row of {values.dtype} came after rows of {self.given_dtype}; every item must give one row of the "
                "same dtype."
            )
        given_dtype = values.dtype
        values = as_rows(values, self.row_shape, self._dtype)
        numbers = self._index.find(keys)
        fresh = numbers < 0
        numbers[fresh] = np.arange(self._used, self._used + int(fresh.sum()))
        self._reserve(self._used + int(fresh.sum()), values)
        assert self._rows is not None
        self._rows.index_copy_(
            0, torch.from_numpy(numbers).to(self.device), values.to(self.device, dtype=self._rows.dtype)
        )
        self._index.add(keys[fresh], numbers[fresh])
        self._used += int(fresh.sum())
        self.given_dtype = given_dtype

    def _reserve(self, needed: int, like: torch.Tensor) -> None:
        held = 0 if self._rows is None else len(self._rows)
        if needed <= held:
            return
        capacity = max(needed, self._capacity if self._rows is None else 2 * held)
        with torch.inference_mode(False):  # rows made in inference mode could not be written outside it
            grown = torch.empty((capacity, *like.shape[1:]), dtype=like.dtype, device=self.device)
        if self._rows is not None:
            grown[: self._used] = self._rows[: self._used]
        self._rows = grown

    def to(self, device: torch.device | str) -> TensorStore:
        """Bring the rows to a device; their numbers stay. On the device where they are they are shared.

        Returns:
            A new store, with room for the rows in use only.
        """
        keys, numbers = self._index.items()
        return TensorStore.of(keys, numbers, self.rows.to(device), self.given_dtype)

    def assemble(self, size: int, parts: Sequence[Found]) -> torch.Tensor:
        """Put rows in the order of their positions, on the store's device and in the encoder's dtype."""
        full = [part for part in parts if len(part.positions)]
        if not full:
            return torch.empty(0, device=self.device)
        dtype = self.given_dtype or full[0].values.dtype
        answer = torch.empty((size, *full[0].values.shape[1:]), dtype=dtype, device=self.device)
        for positions, values in full:
            answer[torch.from_numpy(positions).to(self.device)] = values.detach().to(self.device, dtype)
        return answer
