"""Extracted keys: the user says which items are alike; which row they share is decided by content.

Items of one extracted key share the row of the first of them, whatever they contain: that is what an extractor is for.
The row itself has the content key of that first item. So rows never change, and an item that was edited under its key,
or another dataset whose keys look the same, finds no row of something else: its content has a row of its own.

Items without canonical bytes have no content key; their rows go by the extracted keys alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import shorten
from quatcache.keys import KeyArray, KeyIndex, distinct
from quatcache.store import DatasetTable, Positions, RowStore, TensorStore

__all__ = ["ExpectedRows", "ExtractedKeys"]

logger = logging.getLogger(__name__)


class ExpectedRows:
    """The rows of a store, and those that will be there when items that were keyed are encoded.

    Args:
        store: What is there.
    """

    def __init__(self, store: RowStore) -> None:
        """Expect nothing yet."""
        self._store = store
        self._index = KeyIndex()

    def rows_of(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give a number of at least 0 for keys that have a row or will have one, else -1."""
        return np.maximum(self._store.rows_of(keys), self._index.find(keys))

    def expect(self, keys: KeyArray) -> None:
        """Expect rows for keys ``(N, 2)``."""
        firsts, _ = distinct(keys)
        fresh = keys[firsts[self.rows_of(keys[firsts]) < 0]]
        self._index.add(fresh, np.zeros(len(fresh), np.int64))


class ExtractedKeys:
    """Finds the row keys of items with extracted keys, and compares items that share one.

    Args:
        scheme: A scheme with an extractor.
    """

    def __init__(self, scheme: KeyScheme) -> None:
        """Know nothing yet."""
        self._scheme = scheme
        self._rows = TensorStore()  # extracted key -> row key: the content key of the first item that had it
        self._conflicts = 0
        self._example: tuple[str, str] | None = None

    def learn(self, table: DatasetTable) -> None:
        """Take over which rows the items of an indexed dataset share."""
        keys = table.keys[self._scheme.name].reshape(-1, 2)
        firsts, _ = distinct(keys)
        firsts = firsts[self._rows.missing(keys[firsts])]
        rows = table.keys[self._scheme.row_column].reshape(-1, 2)
        self._rows.put_many(keys[firsts], torch.from_numpy(rows[firsts]))

    def resolve(
        self,
        items: Sequence[Any],
        keys: KeyArray,
        content: KeyArray | None,
        store: RowStore | ExpectedRows,
    ) -> KeyArray:
        """Give the keys that the rows of items are stored under.

        Args:
            items: N items.
            keys: Their extracted keys ``(N, 2)``.
            content: Their content keys ``(N, 2)``; None: they have none.
            store: Where rows are: one that was lost is made anew from an item that is here.

        Returns:
            ``(N, 2)``.
        """
        if content is None:
            return keys
        firsts, which = distinct(keys)
        own = content[firsts]
        rows = own.copy()
        known, before = self._rows.get_many(keys[firsts])
        if len(known):
            rows[known] = before.numpy()
        lost = (store.rows_of(rows) < 0) & (rows != own).any(axis=1)
        rows[lost] = own[lost]
        self._rows.put_many(keys[firsts], torch.from_numpy(rows))
        self._count(items, which, (content != rows[which]).any(axis=1))
        shared: KeyArray = rows[which]
        return shared

    def _count(self, items: Sequence[Any], which: Positions, differs: npt.NDArray[np.bool_]) -> None:
        self._conflicts += int(differs.sum())
        if self._example is None and differs.any():
            position = int(np.flatnonzero(differs)[0])
            alike = np.flatnonzero((which == which[position]) & ~differs)
            other = shorten(items[int(alike[0])]) if len(alike) else "an item of an earlier chunk"
            self._example = (other, shorten(items[position]))

    def warn(self) -> bool:
        """Tell the user how many items were affected since the last time, and show two; give whether there were any."""
        if self._example is None:
            return False
        first, other = self._example
        logger.warning(
            "Encoder %r: %s items have the extracted key of another item but other content, and share its row: %s and "
            "%s; make the extractor tell them apart if they are not alike.",
            self._scheme.name,
            f"{self._conflicts:,}",
            first,
            other,
        )
        self._conflicts, self._example = 0, None
        return True
