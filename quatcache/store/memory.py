"""Python objects in a bounded mapping: the store behind memoised functions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from cachetools import Cache

from quatcache.store.protocol import Found, Positions

__all__ = ["MemoryStore", "assembled"]

_ABSENT = object()


class MemoryStore:
    """Any mutable mapping as a store: a dict, or a cachetools cache with its own size, time and eviction rules.

    Args:
        mapping: Where values are kept; a new dict when None.

    Example:
        >>> from cachetools import LRUCache
        >>> store = MemoryStore(LRUCache(maxsize=2))
        >>> store.put_many(["a", "b", "c"], [1, None, 3])
        >>> store.missing(["a", "b", "c"]).tolist()
        [0]
    """

    def __init__(self, mapping: MutableMapping[Hashable, Any] | None = None) -> None:
        """Wrap the mapping; it stays the caller's."""
        self._mapping: MutableMapping[Hashable, Any] = {} if mapping is None else mapping
        # what a mapping makes up for an absent key is no hit
        self._tells_absence = getattr(type(self._mapping), "__missing__", None) in (None, Cache.__missing__)

    def __len__(self) -> int:
        """Count the keys that are stored now."""
        return len(self._mapping)

    def missing(self, keys: Sequence[Hashable]) -> Positions:
        """Give the positions of absent keys; an expired or evicted key is absent."""
        mapping = self._mapping
        return np.array([position for position, key in enumerate(keys) if key not in mapping], np.int64)

    def get_many(self, keys: Sequence[Hashable]) -> Found:
        """Give the hits only."""
        mapping = self._mapping
        if self._tells_absence:
            with suppress(KeyError):  # mostly all are there: half the time that asking for each takes
                return Found(np.arange(len(keys)), list(map(mapping.__getitem__, keys)))
        values = [mapping.get(key, _ABSENT) for key in keys]
        positions = [position for position, value in enumerate(values) if value is not _ABSENT]
        if len(positions) < len(values):
            values = [values[position] for position in positions]
        return Found(np.array(positions, np.int64), values)

    def put_many(self, keys: Sequence[Hashable], values: Iterable[Any]) -> None:
        """Store one value per key; a value larger than the whole budget is declined."""
        for key, value in zip(keys, values, strict=True):
            try:
                self._mapping[key] = value
            except ValueError:  # cachetools: "value too large"; the caller still has its answer
                self._mapping.pop(key, None)  # what the key had before is its value no longer

    def assemble(self, size: int, parts: Sequence[Found]) -> list[Any]:
        """Put values in the order of their positions."""
        return assembled(size, parts)

    def clear(self) -> None:
        """Forget everything."""
        self._mapping.clear()


def assembled(size: int, parts: Sequence[Found]) -> list[Any]:
    """Put values of parts in the order of their positions, which together are ``range(size)``."""
    answer: list[Any] = [None] * size
    for positions, values in parts:
        for position, value in zip(positions.tolist(), values, strict=True):
            answer[position] = value
    return answer
