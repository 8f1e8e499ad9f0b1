"""Keys: 128-bit hashes as rows of an ``(N, 2)`` int64 array, and the index that finds them.

Three kinds exist. A *content* key is a hash of the canonical bytes of what an encoder sees. An *extracted* key is a
hash of what the user's key extractor returned. An *index* key stands for "item i of this one dataset object", for
items that have no canonical bytes; it is salted at random, so it can never be mistaken for an item of another run.

A Python dict of ten million keys costs about a gigabyte and 0.3 us a look-up. Arrays of keys, rows and places cost 32
to 40 bytes a key and a fifth of the time, so nothing here makes a Python object per key except the hashing itself.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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
"""Keys looked up or added at once: what that takes beside its result stays at a few megabytes."""

_FEW = 64
"""So many keys are looked up or added one by one: NumPy takes as long for a single key as for these."""


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
    if set(map(type, items)) <= {str}:  # the common case, at more than a million texts a second
        # text_bytes, without a call for each
        digests: Iterable[bytes] = [xxh3_128_digest(_TEXT + item.encode("utf-8", "surrogatepass")) for item in items]
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


class KeyIndex:
    """Finds the row of each key, vectorised: a hash table with open addressing over the keys in the order they came.

    Binary search in sorted arrays took five times as long among a million keys: it misses the processor's cache twenty
    times for a key, and this two or three times. At most half of the places are taken, and which are is drawn anew for
    each index, so that no file can be made whose keys all meet in one place.

    A key may be added again: its latest row is the one that is found. Adding N keys one batch at a time costs O(N) in
    all. What is added is taken in when the next look-up needs it: a fill puts many batches between two look-ups.

    Example:
        >>> index = KeyIndex()
        >>> index.add(content_keys(["a", "b"]), np.array([0, 1]))
        >>> index.find(content_keys(["b", "c"])).tolist()
        [1, -1]
    """

    def __init__(self) -> None:
        """Start empty."""
        self._keys = np.empty((0, 2), np.int64)  # with room for more; an entry is never changed
        self._rows = np.empty(0, np.int64)
        self._used = 0
        self._count = 0
        self._table: npt.NDArray[Any] = np.full(1, -1, np.int32)  # which entry is at each place; -1: none
        self._salt = np.frombuffer(secrets.token_bytes(16), np.uint64) | np.uint64(1)
        self._added: list[tuple[KeyArray, npt.NDArray[np.int64]]] = []

    def __len__(self) -> int:
        """Count the distinct keys."""
        self._take_in()
        return self._count

    def find(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the row of each key, shape ``(N,)`` int64, and -1 where a key is absent."""
        self._take_in()
        rows = np.full(len(keys), -1, np.int64)
        for start in range(0, len(keys) if self._count else 0, _BLOCK):
            part = keys[start : start + _BLOCK]
            self._find(part, rows[start : start + len(part)])
        return rows

    def items(self) -> tuple[KeyArray, npt.NDArray[np.int64]]:
        """Give every key ``(K, 2)`` with its row ``(K,)``, in the order in which they were last added."""
        self._take_in()
        return self._entries()

    def add(self, keys: KeyArray, rows: npt.NDArray[np.int64]) -> None:
        """Add keys with their rows, both of length N; of equal keys the last counts."""
        if len(keys):
            self._added.append((keys, np.asarray(rows, np.int64)))

    def _take_in(self) -> None:
        if not self._added:
            return
        coming = sum(len(keys) for keys, _ in self._added)
        if self._used + coming > len(self._keys):
            before = self._entries()
            if len(before[1]):
                self._added.insert(0, before)
            self._make_room(len(before[1]) + max(coming, len(before[1]) // 2))  # few keys at a time must cost little
        start = self._used
        for keys, rows in self._added:
            self._keys[self._used : self._used + len(keys)] = keys
            self._rows[self._used : self._used + len(keys)] = rows
            self._used += len(keys)
        for begin in range(start, self._used, _BLOCK):
            self._place(np.arange(begin, min(begin + _BLOCK, self._used), dtype=self._table.dtype))
        self._added = []  # last: what Ctrl-C comes in between of is taken in again

    def _entries(self) -> tuple[KeyArray, npt.NDArray[np.int64]]:
        """Give the keys that are in the table, with their rows."""
        entries = np.sort(self._table[self._table >= 0])
        if len(entries) == self._used:
            return self._keys[: self._used], self._rows[: self._used]
        return self._keys[entries], self._rows[entries]

    def _make_room(self, entries: int) -> None:
        """Start anew, with room for so many entries."""
        places = 1 << (2 * entries - 1).bit_length()
        keys, rows = np.empty((places // 2, 2), np.int64), np.empty(places // 2, np.int64)
        table = np.full(places, -1, np.int32 if places <= 1 << 31 else np.int64)
        self._keys, self._rows, self._table, self._used, self._count = keys, rows, table, 0, 0

    def _home(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Give the place where the search for each key begins: the upper bits of a random linear mix of its words."""
        words, bits = keys.view(np.uint64), len(self._table).bit_length() - 1
        mixed = words[:, 0] * self._salt[0] + words[:, 1] * self._salt[1]
        home: npt.NDArray[np.int64] = (mixed >> np.uint64(64 - bits)).astype(np.int64)
        return home

    def _next(self, places: npt.NDArray[np.int64], step: int) -> npt.NDArray[np.int64]:
        """Give the place to try after so many: steps that grow by one reach all places of a table of this size."""
        return (places + step) & (len(self._table) - 1)

    def _held(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]:
        """Say which places are free, and give the entries at the others."""
        held = self._table.take(places)
        return held < 0, held

    def _are(self, entries: npt.NDArray[Any], keys: KeyArray) -> npt.NDArray[np.bool_]:
        held = self._keys.take(entries, axis=0)
        same: npt.NDArray[np.bool_] = (held[:, 0] == keys[:, 0]) & (held[:, 1] == keys[:, 1])
        return same

    def _search(self, keys: KeyArray) -> Iterator[tuple[int, int]]:
        """Give the place where the search for each key ends, one by one, and the entry that it finds there or -1."""
        entry_at, word_at, last = self._table.item, self._keys.item, len(self._table) - 1
        for place, (first, second) in zip(self._home(keys).tolist(), keys.tolist(), strict=True):
            step, entry = 0, entry_at(place)
            while entry >= 0 and (word_at(entry, 0) != first or word_at(entry, 1) != second):
                step += 1
                place = (place + step) & last  # as _next does
                entry = entry_at(place)
            yield place, entry

    def _place(self, entries: npt.NDArray[Any]) -> None:
        """Put entries into the table; one with the key of an older one takes its place."""
        keys = self._keys[entries[0] : entries[-1] + 1]
        if len(keys) <= _FEW:
            for entry, (place, before) in zip(entries.tolist(), self._search(keys), strict=True):
                self._table[place] = entry
                self._count += before < 0
            return
        places, step = self._home(keys), 0
        while len(entries):  # equal keys come to the same places in the same rounds
            free, held = self._held(places)
            taken = np.flatnonzero(~free)
            same = taken[self._are(held.take(taken), keys.take(taken, axis=0))]
            for own in (np.flatnonzero(free), same):
                self._table[places.take(own)] = entries.take(own)  # where several want one place, NumPy keeps the last
            held = self._table.take(places)
            here = held == entries
            self._count += int(np.count_nonzero(here & free))
            others = np.flatnonzero(~here)
            others = others[~self._are(held.take(others), keys.take(others, axis=0))]
            step += 1
            entries, keys = entries.take(others), keys.take(others, axis=0)
            places = self._next(places.take(others), step)

    def _find(self, keys: KeyArray, rows: npt.NDArray[np.int64]) -> None:
        """Write the row of each key to its place in ``rows``."""
        if len(keys) <= _FEW:
            rows[:] = [self._rows.item(entry) if entry >= 0 else -1 for _, entry in self._search(keys)]
            return
        places, step, where = self._home(keys), 0, np.arange(len(keys))
        while len(where):
            free, held = self._held(places)
            match = self._are(held, keys) & ~free  # where a place is free, the last entry is looked at in vain
            found = np.flatnonzero(match)
            rows[where.take(found)] = self._rows.take(held.take(found))
            others = np.flatnonzero(~(free | match))
            step += 1
            where, keys = where.take(others), keys.take(others, axis=0)
            places = self._next(places.take(others), step)


KeyExtractor = Callable[[Any], Any]
"""A user's function from an item to a str, bytes, int, float, bool, None or tuple of these."""
