"""Extracted keys: the user says which items are alike, and the content of the items is held against it.

Items of one extracted key share a row, whatever they contain: that is what an extractor is for. But a key that stood
for another content in an earlier run is most likely an item that was edited, so its row is made anew; and unlike items
within one run are counted and shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch

from quatcache.errors import shorten
from quatcache.keys import KeyArray, distinct
from quatcache.store import DatasetTable, Positions, RowStore, TensorStore
from quatcache.training.keying import Chunk, KeyScheme

__all__ = ["ExtractedKeys", "Forgetful"]

logger = logging.getLogger(__name__)


class ExtractedKeys:
    """Compares the content of items that have one extracted key, within a run and with the runs before it.

    Args:
        scheme: A scheme with an extractor.
        tables: Index tables of earlier runs, newest first.
    """

    def __init__(self, scheme: KeyScheme, tables: Iterable[DatasetTable] = ()) -> None:
        """Learn what each key stood for."""
        self._scheme = scheme
        self._seen = TensorStore()  # extracted key -> content key of the first item that had it in this run
        self._recorded = TensorStore()  # the same of earlier runs
        self._ambiguous = TensorStore()  # extracted keys that stood for several contents in them
        for table in reversed(list(tables)):
            if scheme.content_column in table.keys:
                keys = table.keys[scheme.name].reshape(-1, 2)
                firsts, which = distinct(keys)
                content = table.keys[scheme.content_column].reshape(-1, 2)
                known, before = self._recorded.get_many(keys[firsts])
                differs = (content != content[firsts][which]).any(axis=1)
                changed = firsts[known][(content[firsts[known]] != before.numpy()).any(axis=1)] if len(known) else known
                several = keys[np.concatenate([np.flatnonzero(differs), changed])]
                several = several[distinct(several)[0]]
                self._ambiguous.put_many(several, torch.ones(len(several), 1, dtype=torch.bool))
                self._recorded.put_many(keys[firsts], torch.from_numpy(content[firsts]))
        self._conflicts = 0
        self._example: tuple[str, str] | None = None

    def look(self, chunk: Chunk) -> KeyArray:
        """Compare the items of a chunk with those met before under the same keys.

        Returns:
            Keys ``(n, 2)`` that stood for another content in an earlier run.
        """
        if self._scheme.content_column not in chunk.keys:
            return np.empty((0, 2), np.int64)
        keys = chunk.keys[self._scheme.name].reshape(-1, 2)
        content = chunk.keys[self._scheme.content_column].reshape(-1, 2)
        firsts, which = distinct(keys)
        fresh = firsts[self._seen.missing(keys[firsts])]
        self._seen.put_many(keys[fresh], torch.from_numpy(content[fresh]))
        self._count(chunk, which, (content != self._seen.get_many(keys[firsts]).values.numpy()[which]).any(axis=1))
        places, before = self._recorded.get_many(keys[fresh])
        if not len(places):
            return np.empty((0, 2), np.int64)
        edited: KeyArray = keys[fresh[places]][(content[fresh[places]] != before.numpy()).any(axis=1)]
        return edited

    def unambiguous(self, chunk: Chunk) -> Positions:
        """Find the items whose key never stood for anything but their content: their rows must be theirs.

        Returns:
            Positions among the items of the chunk.
        """
        if self._scheme.content_column not in chunk.keys:
            return np.empty(0, np.int64)
        keys = chunk.keys[self._scheme.name].reshape(-1, 2)
        content = chunk.keys[self._scheme.content_column].reshape(-1, 2)
        places, recorded = self._recorded.get_many(keys)
        if not len(places):
            return places
        same = places[(content[places] == recorded.numpy()).all(axis=1)]
        sure: Positions = same[self._ambiguous.missing(keys[same])]
        return sure

    def _count(self, chunk: Chunk, which: Positions, differs: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        self._conflicts += int(differs.sum())
        if self._example is None and differs.any():
            position = int(np.flatnonzero(differs)[0])
            alike = np.flatnonzero((which == which[position]) & ~differs)
            other = shorten(chunk.items[int(alike[0])]) if len(alike) else "an item of an earlier chunk"
            self._example = (other, shorten(chunk.items[position]))

    def warn(self) -> None:
        """Tell the user once how many items were affected, and show two of them."""
        if self._example is None:
            return
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


class Forgetful:
    """A row store for one fill, without the rows of some keys: they count as absent until they are put again.

    Args:
        store: The store.
        forgotten: The keys ``(n, 2)``, distinct.
    """

    def __init__(self, store: RowStore, forgotten: KeyArray) -> None:
        """Name the keys."""
        self._store = store
        self._forgotten = TensorStore()
        self._forgotten.put_many(forgotten, torch.zeros(len(forgotten), 1, dtype=torch.bool))

    def __len__(self) -> int:
        """Count the keys of the store."""
        return len(self._store)

    def missing(self, keys: KeyArray) -> Positions:
        """Give the positions of the absent and of the forgotten keys."""
        return np.flatnonzero((self._store.rows_of(keys) < 0) | (self._forgotten.rows_of(keys) >= 0))

    def put_many(self, keys: KeyArray, values: torch.Tensor) -> None:
        """Store the rows."""
        self._store.put_many(keys, values)
