"""The one operation of the project: a read-through cache, in batches.

    look up the keys; compute each distinct miss once, in batches; store it; answer in the order asked

Everything else is this operation seen from another side. :func:`read_through` answers; :func:`fill_through` is the
same without the answer, for data that exceeds memory; :func:`reading_through` is the same for coroutines. All stand on
one loop over the distinct misses.

The answer is put together from what was found and what was computed, not by a second look-up: a store may evict or
decline what it was just given, and the caller must not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from quatcache.errors import BatchLengthError, ConfigError
from quatcache.keys import KeyArray, distinct
from quatcache.store.protocol import Found, Positions, Store

__all__ = ["Counts", "Dialogue", "fill_through", "read_through", "reading_through"]

Keys = TypeVar("Keys", bound="KeyArray | Sequence[Hashable]")
Values = TypeVar("Values")
Answer = TypeVar("Answer")

Batching = Callable[[Positions], Iterable[Positions]]
"""Splits the positions of the distinct misses into the batches that are computed; each exactly once, any order."""


@dataclass(frozen=True)
class Counts:
    """What one pass did: ``asked == hits + duplicates + computed``.

    Attributes:
        asked: Keys given.
        hits: Keys found in the store.
        duplicates: Misses that equal an earlier miss of the same call.
        computed: Distinct misses, each computed once.
    """

    asked: int = 0
    hits: int = 0
    duplicates: int = 0
    computed: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Add up two passes."""
        return Counts(
            self.asked + other.asked,
            self.hits + other.hits,
            self.duplicates + other.duplicates,
            self.computed + other.computed,
        )


class Dialogue:
    """A generator that says what it needs, as an object that is replied to.

    Args:
        steps: Yields what it needs, is sent what that gave, and returns a result.

    Attributes:
        need: What it needs now; None: nothing more.
        result: What it returned.

    Example:
        >>> from quatcache.store import MemoryStore
        >>> asked = Dialogue(reading_through(["one", "two"], MemoryStore()))
        >>> asked.need.tolist()
        [0, 1]
        >>> asked.reply([1, 2])
        >>> asked.need, asked.result
        (None, [1, 2])
    """

    def __init__(self, steps: Generator[Any, Any, Any]) -> None:
        """Have the first need said."""
        self._steps = steps
        self.need: Any = None
        self.result: Any = None
        self.reply(None)

    def reply(self, given: Any) -> None:
        """Give what was needed, and have the next need said."""
        try:
            self.need = self._steps.send(given)
        except StopIteration as end:
            self.need, self.result = None, end.value


def read_through(
    keys: Keys,
    compute: Callable[[Positions], Values],
    store: Store[Keys, Values],
    *,
    batches: int | Batching | None = None,
    found: Found | None = None,
) -> Values:
    """Answer for every key, computing what the store lacks.

    Args:
        keys: N keys: hashable objects for a :class:`~quatcache.store.MemoryStore`, an ``(N, 2)`` array for a row store.
        compute: Given n positions into ``keys``, returns their n values in the same order: a list, or a tensor
            ``(n, *row_shape)``. It is called once for each batch of distinct misses.
        store: Where values are looked up and put. Each finished batch is put at once, so that a failure in a later
            batch loses nothing.
        batches: At most so many keys a call; or a function that splits the positions of the misses; None: one call.
        found: What ``store.get_many`` has just given for the keys, if the caller had to know; None: it is asked.

    Returns:
        N values in the order of the keys, equal to computing each of them.

    Raises:
        BatchLengthError: ``compute`` returned another number of values than positions; nothing of it is stored.
        ConfigError: ``batches`` is less than 1, or a function that leaves positions out or repeats them.

    Example:
        >>> from quatcache.store import MemoryStore
        >>> words = ["one", "two", "one"]
        >>> read_through(words, lambda positions: [len(words[p]) for p in positions], MemoryStore())
        [3, 3, 3]
    """
    answer: Values = _run(reading_through(keys, store, batches=batches, found=found), compute)
    return answer


def reading_through(
    keys: Keys,
    store: Store[Keys, Values],
    *,
    batches: int | Batching | None = None,
    found: Found | None = None,
) -> Generator[Positions, Values, Values]:
    """Give the positions of each batch to compute, take their values, and return the answer.

    :func:`read_through` as a generator, for those who cannot compute in a call: a coroutine awaits in between.

    Example:
        >>> from quatcache.store import MemoryStore
        >>> steps = reading_through(["one", "two"], MemoryStore())
        >>> next(steps).tolist()
        [0, 1]
        >>> steps.send([1, 2])
        Traceback (most recent call last):
        StopIteration: [1, 2]
    """
    if found is None:
        found = store.get_many(keys)
    if len(found.positions) == len(keys):
        return found.values  # type: ignore[no-any-return]
    absent = np.ones(len(keys), bool)
    absent[found.positions] = False
    missing = np.flatnonzero(absent)
    firsts, which = _distinct_misses(keys, missing)
    computed: list[Found] = []
    yield from _compute(keys, firsts, store, batches, computed.append)
    values = store.assemble(len(firsts), [Found(np.searchsorted(firsts, part), out) for part, out in computed])
    if len(firsts) < len(missing):  # duplicates share the value of the first of them
        values = _take(values, which)
    return store.assemble(len(keys), [found, Found(missing, values)])


def fill_through(
    keys: Keys,
    compute: Callable[[Positions], Values],
    store: Store[Keys, Values],
    *,
    batches: int | Batching | None = None,
) -> Counts:
    """Compute and store what the store lacks, and return no values.

    The same operation as :func:`read_through` with the same arguments, for a fill whose values exceed memory: hits
    are not read, and a computed batch is given to the store and forgotten.

    Example:
        >>> from quatcache.store import MemoryStore
        >>> words = ["one", "two", "one"]
        >>> fill_through(words, lambda positions: [len(words[p]) for p in positions], MemoryStore())
        Counts(asked=3, hits=0, duplicates=1, computed=2)
    """
    missing = store.missing(keys)
    firsts, _ = _distinct_misses(keys, missing)
    _run(_compute(keys, firsts, store, batches, lambda found: None), compute)
    return Counts(len(keys), len(keys) - len(missing), len(missing) - len(firsts), len(firsts))


def _run(steps: Generator[Positions, Any, Answer], compute: Callable[[Positions], Any]) -> Answer:
    """Compute whatever is asked for, and give the answer."""
    asked = Dialogue(steps)
    while asked.need is not None:
        asked.reply(compute(asked.need))  # no name for the values: a fill has room for one batch at a time
    answer: Answer = asked.result
    return answer


def _compute(
    keys: Any,
    firsts: Positions,
    store: Store[Any, Any],
    batches: int | Batching | None,
    keep: Callable[[Found], None],
) -> Generator[Positions, Any, None]:
    """Have each batch of distinct misses computed, and store it before the next one starts."""
    times = np.zeros(len(keys), np.int64)
    for number, positions in enumerate(_split(firsts, batches), start=1):
        values = yield positions
        length = _length(values)
        if length != len(positions):
            got = f"a {type(values).__name__}" if length is None else f"{length} values"
            raise BatchLengthError(
                f"compute returned {got} for {len(positions)} items (batch {number}); return one per item, in order."
            )
        store.put_many(_take(keys, positions), values)
        np.add.at(times, positions, 1)
        keep(Found(positions, values))
        del values  # a fill has room for one batch at a time
    if times.sum() != len(firsts) or (times[firsts] != 1).any():  # an answer would have rows that nobody wrote
        raise ConfigError(
            f"batches gave {times.sum()} positions for {len(firsts)} distinct misses; give each exactly once, in any "
            "order."
        )


def _length(values: Any) -> int | None:
    try:
        return len(values)
    except TypeError:  # an iterator, or a tensor without dimensions
        return None


def _split(positions: Positions, batches: int | Batching | None) -> Iterable[Positions]:
    if callable(batches):
        return batches(positions) if len(positions) else ()
    if batches is not None and batches < 1:
        raise ConfigError(f"batches is {batches}; give the keys per call, at least 1, or None for one call.")
    size = len(positions) if batches is None else batches
    return (positions[start : start + size] for start in range(0, len(positions), max(size, 1)))


def _distinct_misses(keys: Any, missing: Positions) -> tuple[Positions, Positions]:
    """Give the positions of the first of each distinct missing key, and for each miss which of them it equals."""
    if isinstance(keys, np.ndarray):
        firsts, which = distinct(keys[missing])
        return missing[firsts], which
    seen: dict[Hashable, int] = {}
    which = np.array([seen.setdefault(keys[position], len(seen)) for position in missing.tolist()], np.int64)
    return missing[np.unique(which, return_index=True)[1]] if len(which) else missing, which


def _take(batch: Any, positions: Positions) -> Any:
    return batch[positions] if hasattr(batch, "shape") else [batch[position] for position in positions.tolist()]
