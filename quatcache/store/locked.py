"""A row store that several threads use: each look-up and each put is done alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.keys import KeyArray
from quatcache.store.protocol import Found, Positions, RowShape, RowStore, Values

__all__ = ["LockedStore"]


class LockedStore:
    """A row store whose look-ups and puts wait for each other, and for nothing else: values are computed outside.

    Args:
        store: Keeps the rows.

    Attributes:
        lock: Held while the store is used; whoever uses it directly holds it too. The same thread may take it again.

    Example:
        >>> from quatcache.keys import content_keys
        >>> from quatcache.store import TensorStore
        >>> store = LockedStore(TensorStore())
        >>> store.put_many(content_keys(["a"]), torch.ones(1, 2))
        >>> store.missing(content_keys(["a", "b"])).tolist()
        [1]
    """

    def __init__(self, store: RowStore) -> None:
        """Nothing is read."""
        self._store = store
        self.lock = threading.RLock()

    def __len__(self) -> int:
        """Count the stored keys."""
        with self.lock:
            return len(self._store)

    @property
    def row_shape(self) -> RowShape | None:
        """Shape of one row; None while nothing was stored."""
        with self.lock:
            return self._store.row_shape

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows."""
        with self.lock:
            return self._store.nbytes

    @property
    def numbered(self) -> int:
        """Count the row numbers that were given out."""
        with self.lock:
            return self._store.numbered

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent."""
        with self.lock:
            return self._store.rows_of(keys)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent keys."""
        with self.lock:
            return self._store.missing(keys)

    def gather(self, rows: torch.Tensor, device: torch.device | None = None) -> Any:
        """Read rows ``(B,)``, to a device if one is given."""
        with self.lock:
            return self._store.gather(rows, device)

    def get_many(self, keys: KeyArray) -> Found:
        """Give the hits only."""
        with self.lock:
            return self._store.get_many(keys)

    def put_many(self, keys: KeyArray, values: Values) -> None:
        """Store rows ``(n, *row_shape)`` for distinct keys."""
        with self.lock:
            self._store.put_many(keys, values)

    def assemble(self, size: int, parts: Sequence[Found]) -> Any:
        """Put rows in the order of their positions."""
        with self.lock:
            return self._store.assemble(size, parts)
