"""One computation per key at a time: who asks for what another thread or task is computing waits for that.

Each call computes what it has claimed before it waits for others, and what it computed is there for all at once. So no
two calls wait for each other. What a call could not compute it gives up, and those who waited for it compute it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from quatcache.store import Found, Positions

__all__ = ["Abandoned", "Claims", "SharedStore"]


class Abandoned(Exception):
    """Whoever was computing a value gave it up. Internal: those who wait for it see it, and compute the value."""


class _Flight(NamedTuple):
    """The computation of one key.

    Attributes:
        owner: The thread or task that computes it.
        outcome: Its value.
    """

    owner: object
    outcome: Future[Any]


class Claims(NamedTuple):
    """What is to be done about some keys that were missing.

    Attributes:
        own: Positions of those that the caller is to compute.
        others: Futures of the values of all others, by position.
    """

    own: Positions
    others: dict[int, Future[Any]]


def _me() -> object:
    """Name the task that runs, or else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return task or threading.get_ident()


class ValueStore(Protocol):
    """Keeps values of Python by hashable keys."""

    def __len__(self) -> int:
        """Count the values."""
        ...

    def missing(self, keys: Any) -> Positions:
        """Give the positions of absent keys."""
        ...

    def get_many(self, keys: Any) -> Found:
        """Give the hits only."""
        ...

    def put_many(self, keys: Any, values: Any) -> None:
        """Store one value per key."""
        ...

    def assemble(self, size: int, parts: Sequence[Found]) -> list[Any]:
        """Put values in the order of their positions."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


class SharedStore:
    """A store for several threads and tasks, with the claims on what it lacks.

    Args:
        store: Keeps the values; it is used under a lock.
        alone: What is entered before anything is computed, where other processes compute for the same store; then the
            store has what they have put.

    Attributes:
        lock: Held while the store is used.
        alone: As given.
        hits: Keys that were found.
        computed: Values that were computed.

    Example:
        >>> from quatcache.store import MemoryStore
        >>> shared = SharedStore(MemoryStore())
        >>> claims = shared.claim(["a", "b"])
        >>> claims.own.tolist(), claims.others
        ([0, 1], {})
        >>> shared.put_many(["a", "b"], [1, 2])
        >>> shared.get_many(["b"]).values
        [2]
    """

    def __init__(self, store: ValueStore, alone: Callable[[], AbstractContextManager[None]] | None = None) -> None:
        """Nothing is claimed."""
        self._store = store
        self.alone = alone
        self.lock = threading.RLock()
        self.hits = self.computed = 0
        self._flights: dict[Hashable, _Flight] = {}
        _OF_THIS_PROCESS.add(self)

    def __len__(self) -> int:
        """Count the values that are stored now."""
        with self.lock:
            return len(self._store)

    def missing(self, keys: Sequence[Hashable]) -> Positions:
        """Give the positions of absent keys."""
        with self.lock:
            return self._store.missing(keys)

    def get_many(self, keys: Sequence[Hashable]) -> Found:
        """Give the hits only."""
        with self.lock:
            found = self._store.get_many(keys)
            self.hits += len(found.positions)
            return found

    def peek(self, keys: Sequence[Hashable]) -> Found:
        """Give the hits only, and count none."""
        with self.lock:
            return self._store.get_many(keys)

    def put_many(self, keys: Sequence[Hashable], values: Sequence[Any]) -> None:
        """Store one value per key, and give it to those who wait for it."""
        with self.lock:
            self._store.put_many(keys, values)
            landed = [(self._flights.pop(key, None), value) for key, value in zip(keys, values, strict=True)]
        for flight, value in landed:
            if flight is not None:
                flight.outcome.set_result(value)

    def assemble(self, size: int, parts: Sequence[Found]) -> list[Any]:
        """Put values in the order of their positions."""
        return self._store.assemble(size, parts)

    def claim(self, keys: Sequence[Hashable]) -> Claims:
        """Take over the computation of distinct keys that were missing, unless another has it, or has done it since.

        What the caller is computing already, in a call further up, it has to compute once more: nobody else would.
        """
        me, own, others = _me(), [], {}
        with self.lock:
            found = self._store.get_many(keys)
            there = dict(zip(found.positions.tolist(), found.values, strict=True))
            for place, key in enumerate(keys):
                flight = self._flights.get(key)
                if place in there:
                    others[place] = _done(there[place])
                elif flight is None or flight.owner == me:
                    if flight is None:
                        self._flights[key] = _flight(me)
                    own.append(place)
                else:
                    others[place] = flight.outcome
        return Claims(np.array(own, np.int64), others)

    def release(self, keys: Iterable[Hashable]) -> None:
        """Give up what the caller has claimed and not put."""
        me = _me()
        with self.lock:
            left = [self._flights.pop(key) for key in keys if (flight := self._flights.get(key)) and flight.owner == me]
        for flight in left:
            flight.outcome.set_exception(Abandoned())

    def count_computed(self, number: int) -> None:
        """Note that values were computed."""
        with self.lock:
            self.computed += number

    def clear(self) -> None:
        """Forget all values; what is being computed is stored once it is there."""
        with self.lock:
            self._store.clear()
            self.hits = self.computed = 0

    def _start_over(self) -> None:
        """Be without the threads of the process that this one was forked from: none of them will put anything here."""
        self.lock = threading.RLock()
        self._flights = {}


def _flight(owner: object) -> _Flight:
    outcome: Future[Any] = Future()
    outcome.set_running_or_notify_cancel()  # nobody who waits for it can cancel it
    return _Flight(owner, outcome)


def _done(value: Any) -> Future[Any]:
    outcome: Future[Any] = Future()
    outcome.set_result(value)
    return outcome


_OF_THIS_PROCESS: weakref.WeakSet[SharedStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_OF_THIS_PROCESS):
        store._start_over()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
