"""Keys: 128-bit hashes as rows of an ``(N, 2)`` int64 array, and the index that finds them.

Three kinds exist. A *content* key is a hash of the canonical bytes of what an encoder sees. An *extracted* key is a
hash of what the user's key extractor returned. An *index* key stands for "item i of this one dataset object", for
items that have no canonical bytes; it is salted at random, so it can never be mistaken for an item of another run.

A Python dict of ten million keys costs about a gigabyte and 0.3 us a look-up. Sorted arrays cost 24 bytes a key and a
tenth of the time, so nothing here makes a Python object per key except the hashing itself.
"""

from __future__ import annotations

import dataclasses
import secrets
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from xxhash import xxh3_128_digest

from quatcache.canonical import canonical_bytes, plain_bytes, text_bytes

__all__ = [
    "KeyArray",
    "KeyExtractor",
    "KeyIndex",
    "content_keys",
    "distinct",
    "extracted_keys",
    "index_keys",
    "index_salt",
]

KeyArray = npt.NDArray[np.int64]
"""Keys of N items: shape ``(N, 2)``, int64, C order."""

_CONTENT, _TEXT, _EXTRACTED, _INDEX = b"c", b"t", b"e", b"i"

_BLOCK = 1 << 16
"""Keys looked up at once: what a look-up takes beside its answer stays at a few megabytes."""


def content_keys(items: Sequence[Any]) -> KeyArray:
    """Hash what each item contains.

    Content means str, bytes, numbers, tensors, arrays, PIL images, and tuples, lists, mappings and dataclasses of
    these. Equal content gives equal keys in every process; ``1``, ``1.0``, ``True`` and ``"1"`` differ.

    Args:
        items: N items.

    Returns:
        Keys of shape ``(N, 2)``, int64.

    Raises:
        KeyTypeError: An item holds an object without canonical bytes.

    Example:
        >>> first, again, other = content_keys(["a gloss", "a gloss", "another"])
        >>> bool((first == again).all()), bool((first == other).all())
        (True, False)
    """
    if all(type(item) is str for item in items):  # the common case, at more than a million texts a second
        digests: Iterable[bytes] = (xxh3_128_digest(_TEXT + text_bytes(item)) for item in items)
    else:
        digests = (_content_digest(item) for item in items)
    return _as_array(digests)


def extracted_keys(values: Sequence[Any]) -> KeyArray:
    """Hash what a key extractor returned for each item.

    Args:
        values: N values, each a str, bytes, int, float, bool, None or a tuple of these.

    Returns:
        Keys of shape ``(N, 2)``, int64. They never equal a content key.

    Raises:
        KeyTypeError: A value has another type.

    Example:
        >>> extracted_keys([17, ("a.jpg", 3)]).shape
        (2, 2)
    """
    return _as_array(xxh3_128_digest(_EXTRACTED + plain_bytes(value)) for value in values)


def index_keys(indices: Iterable[int], salt: bytes) -> KeyArray:
    """Stand-ins for items without canonical bytes: one key per index of one dataset object.

    Args:
        indices: N indices into the dataset.
        salt: Random bytes, drawn once per dataset object; see :func:`index_salt`.

    Returns:
        Keys of shape ``(N, 2)``, int64.

    Example:
        >>> salt = index_salt()
        >>> bool((index_keys([5], salt) == index_keys([5], salt)).all())
        True
    """
    return _as_array(xxh3_128_digest(_INDEX + salt + struct.pack("<q", int(index))) for index in indices)


def index_salt() -> bytes:
    """Draw the salt of one dataset object, without touching the random states that training depends on."""
    return secrets.token_bytes(16)


def _as_array(digests: Iterable[bytes]) -> KeyArray:
    read_only = np.frombuffer(b"".join(digests), dtype="<i8").reshape(-1, 2)
    return read_only.astype(np.int64)  # a copy: torch warns of arrays that cannot be written


def _content_digest(item: Any) -> bytes:
    if isinstance(item, str):  # the same bytes as the fast path: a str among other items keeps its key
        return xxh3_128_digest(_TEXT + text_bytes(item))
    return xxh3_128_digest(_CONTENT + canonical_bytes(item))


def distinct(keys: KeyArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the distinct keys of a batch, in the order of their first occurrence.

    Args:
        keys: Shape ``(N, 2)``.

    Returns:
        The positions of the U first occurrences, ascending, shape ``(U,)``; and for each of the N keys which of the
        U it equals, shape ``(N,)``. Both int64.

    Example:
        >>> firsts, which = distinct(content_keys(["b", "a", "b"]))
        >>> firsts.tolist(), which.tolist()
        ([0, 1], [0, 1, 0])
    """
    if len(keys) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ranked = keys[order]
    starts = np.concatenate([[True], (ranked[1:] != ranked[:-1]).any(axis=1)])
    group_of_rank = np.cumsum(starts) - 1
    firsts_by_key = order[starts]  # lexsort is stable: the first of a group is its first occurrence
    by_occurrence = np.argsort(firsts_by_key)
    position_of_group = np.empty_like(by_occurrence)
    position_of_group[by_occurrence] = np.arange(len(by_occurrence))
    which = np.empty(len(keys), np.int64)
    which[order] = position_of_group[group_of_rank]
    return firsts_by_key[by_occurrence], which


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Distinct keys sorted by their first word, with the row of each. Look-ups step over equal first words."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, keys: KeyArray, rows: npt.NDArray[np.int64], *, in_runs: bool = False) -> _Segment:
        """Sort keys; of equal ones the last counts. What consists of few sorted runs is merged in linear time."""
        order = np.argsort(keys[:, 0], kind="stable" if in_runs else None)
        first = keys[order, 0]
        if (first[1:] == first[:-1]).any():  # equal keys, or two that share 64 of their 128 bits
            latest = len(keys) - 1 - distinct(keys[::-1])[0]
            if len(latest) < len(keys):
                return cls.of(keys[latest], rows[latest])
        return cls(first, keys[order, 1], rows[order])

    @classmethod
    def merged(cls, older: _Segment, newer: _Segment) -> _Segment:
        first = np.concatenate([older.first, newer.first])
        keys = np.stack([first, np.concatenate([older.second, newer.second])], axis=1)
        return cls.of(keys, np.concatenate([older.rows, newer.rows]), in_runs=True)

    def find(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        first, second = np.ascontiguousarray(keys[:, 0]), keys[:, 1]
        places = torch.searchsorted(torch.from_numpy(self.first), torch.from_numpy(first)).numpy()
        rows = np.full(len(keys), -1, np.int64)
        pending = np.arange(len(keys))
        while len(pending):  # once, unless two keys share 64 of their 128 bits
            places_in = places[pending]
            inside = places_in < len(self.first)
            pending, places_in = pending[inside], places_in[inside]
            candidate = self.first[places_in] == first[pending]
            pending, places_in = pending[candidate], places_in[candidate]
            match = self.second[places_in] == second[pending]
            rows[pending[match]] = self.rows[places_in[match]]
            pending = pending[~match]
            places[pending] += 1
        return rows


class KeyIndex:
    """Finds the row of each key, vectorised; grows by sorted segments that are merged as they double.

    A key may be added again: its latest row is the one that is found. Adding N keys one batch at a time costs
    O(N log N) in all, and a look-up O(log N) for each of at most log N segments. What is added is sorted when the next
    look-up needs it: a fill puts many batches between two look-ups.

    Example:
        >>> index = KeyIndex()
        >>> index.add(content_keys(["a", "b"]), np.array([0, 1]))
        >>> index.find(content_keys(["b", "c"])).tolist()
        [1, -1]
    """

    def __init__(self) -> None:
        """Start empty."""
        self._segments: list[_Segment] = []
        self._added: list[tuple[KeyArray, npt.NDArray[np.int64]]] = []

    def __len__(self) -> int:
        """Count the distinct keys."""
        self._merge_all()
        return sum(len(segment.rows) for segment in self._segments)

    def find(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row of each key, shape ``(N,)`` int64, and -1 where a key is absent."""
        self._sort_added()
        rows = np.full(len(keys), -1, np.int64)
        for start in range(0, len(keys), _BLOCK):
            part = keys[start : start + _BLOCK]
            missing = np.arange(len(part))
            for segment in reversed(self._segments):  # newest first: a row added again hides the older one
                if not len(missing):
                    break
                found = segment.find(part[missing])
                rows[start + missing] = found
                missing = missing[found < 0]
        return rows

    def items(self) -> tuple[KeyArray, npt.NDArray[np.int64]]:
        """Give every key ``(K, 2)`` with its row ``(K,)``, in no particular order."""
        self._merge_all()
        if not self._segments:
            return np.empty((0, 2), np.int64), np.empty(0, np.int64)
        (whole,) = self._segments
        return np.stack([whole.first, whole.second], axis=1), whole.rows

    def add(self, keys: KeyArray, rows: npt.NDArray[np.int64]) -> None:
        """Add keys with their rows, both of length N; of equal keys the last counts."""
        if len(keys):
            self._added.append((keys, np.asarray(rows, np.int64)))

    def _sort_added(self) -> None:
        if not self._added:
            return
        keys, rows = zip(*self._added, strict=True)
        self._added = []
        self._segments.append(_Segment.of(np.concatenate(keys), np.concatenate(rows)))
        while len(self._segments) > 1 and len(self._segments[-2].rows) <= 2 * len(self._segments[-1].rows):
            self._merge_last()

    def _merge_all(self) -> None:
        self._sort_added()
        while len(self._segments) > 1:
            self._merge_last()

    def _merge_last(self) -> None:
        newer, older = self._segments.pop(), self._segments.pop()
        self._segments.append(_Segment.merged(older, newer))


KeyExtractor = Callable[[Any], Any]
"""A user's function from an item to a str, bytes, int, float, bool, None or tuple of these."""
