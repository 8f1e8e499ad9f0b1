"""A row store with a budget: what does not fit any more is declined, and nothing is ever evicted.

Rows are never evicted for others: in training every row is met once an epoch, in random order, so whichever rows are
kept serve equally well, and a row number that was given out stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.keys import KeyArray, distinct
from quatcache.store.protocol import Found, Positions, RowShape, RowStore, Values
from quatcache.store.rows import row_bytes

__all__ = ["BudgetStore"]


class BudgetStore:
    """A row store that takes rows as long as they fit.

    Args:
        store: Keeps the rows; what it holds already stays, also if that is more.
        max_size: Budget in bytes of rows, keys not counted.
        dtype: Storage dtype of the store; None: as values are given.

    Attributes:
        max_size: The budget.

    Example:
        >>> from quatcache.keys import content_keys
        >>> from quatcache.store import TensorStore
        >>> store = BudgetStore(TensorStore(), max_size=16)
        >>> store.put_many(content_keys(["a", "b", "c"]), torch.zeros(3, 2))
        >>> store.missing(content_keys(["a", "b", "c"])).tolist()
        [2]
    """

    def __init__(self, store: RowStore, max_size: int, dtype: torch.dtype | None = None) -> None:
        """Nothing is read."""
        self._store = store
        self.max_size = max_size
        self._dtype = dtype
        self._row_bytes: int | None = None

    @property
    def room(self) -> int | None:
        """How many rows still fit; None while their size is not known."""
        if self._row_bytes is None and len(self._store):
            self._row_bytes = max(self._store.nbytes // len(self._store), 1)
        if self._row_bytes is None:
            return None
        return max(self.max_size - self._store.nbytes, 0) // self._row_bytes

    def affordable(self, keys: KeyArray) -> Positions:
        """Give the positions of the keys that are present, or whose rows fit: of distinct absent ones the first."""
        room, missing = self.room, self._store.missing(keys)
        if room is None or room >= len(missing):
            return np.arange(len(keys))
        _, which = distinct(keys[missing])
        return np.delete(np.arange(len(keys)), missing[which >= room])

    def put_many(self, keys: KeyArray, values: Values) -> None:
        """Store rows ``(n, *row_shape)`` for distinct keys: of those that are absent the first, as many as fit."""
        absent, sizes = self._store.missing(keys), row_bytes(values, self._dtype).numpy()
        if self._row_bytes is None and len(keys):
            self._row_bytes = max(int(sizes.mean()), 1)
        left = max(self.max_size - self._store.nbytes, 0)
        declined = absent[np.searchsorted(np.cumsum(sizes[absent]), left, side="right") :]
        if len(declined):
            taken = np.delete(np.arange(len(keys)), declined)
            keys, values = keys[taken], values[torch.from_numpy(taken).to(values.device)]
        self._store.put_many(keys, values)

    def __len__(self) -> int:
        """Count the stored keys."""
        return len(self._store)

    @property
    def row_shape(self) -> RowShape | None:
        """Shape of one row; None while nothing was stored."""
        return self._store.row_shape

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows."""
        return self._store.nbytes

    @property
    def numbered(self) -> int:
        """Count the row numbers that were given out."""
        return self._store.numbered

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row number of each key, -1 where it is absent."""
        return self._store.rows_of(keys)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent keys."""
        return self._store.missing(keys)

    def gather(self, rows: torch.Tensor, device: torch.device | None = None) -> Any:
        """Read rows ``(B,)``, to a device if one is given."""
        return self._store.gather(rows, device)

    def get_many(self, keys: KeyArray) -> Found:
        """Give the hits only."""
        return self._store.get_many(keys)

    def assemble(self, size: int, parts: Sequence[Found]) -> Any:
        """Put rows in the order of their positions."""
        return self._store.assemble(size, parts)
