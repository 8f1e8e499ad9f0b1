"""One computation per key at a time: who asks for what another thread or task is computing waits for that.

Each call computes what it has claimed before it waits for others, and what it computed is there for all at once. So no
two calls wait for each other, unless a function calls itself or another one: a call that would be waited for by what it
waits for computes the value once more instead. What a call could not compute it gives up, and those who waited for it
compute it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import numpy as np

from quatcache.store import Found, Positions

__all__ = ["Abandoned", "Asker", "Claims", "Flight", "SharedStore"]


class Abandoned(Exception):
    """Whoever was computing a value gave it up. Internal: those who wait for it see it, and compute the value."""


class Asker:
    """One call that asks for values.

    Attributes:
        above: The call whose function made this one, be it in a task of its own; None: none did.
        overtaken: What it does not wait for, though another call computes it.
    """

    def __init__(self) -> None:
        """Ask from where the caller is."""
        self.above = _COMPUTING.get()
        self.overtaken: set[Future[Any]] = set()
        self._needs: list[list[Flight]] = []

    @property
    def line(self) -> Iterator[Asker]:
        """This call, the one above it, and so on."""
        one: Asker | None = self
        while one is not None:
            yield one
            one = one.above

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Have calls that the function makes meanwhile know that they are below this one."""
        token = _COMPUTING.set(self)
        try:
            yield
        finally:
            with suppress(ValueError):  # a task that was forgotten is closed wherever garbage is collected
                _COMPUTING.reset(token)

    @contextmanager
    def waiting(self, flights: Iterable[Flight]) -> Iterator[list[Future[Any]]]:
        """Give the outcomes to wait for; those that wait for this call, or for one above it, are overtaken."""
        line = list(self.line)
        with _WAITS:  # of calls that wait in a ring, the last one to start sees it
            flying = [flight for flight in flights if not flight.outcome.done()]
            ring = {owner for owner in {flight.owner for flight in flying} if owner._needs_one_of(line)}
            self.overtaken.update(flight.outcome for flight in flying if flight.owner in ring)
            waits = [flight for flight in flying if flight.owner not in ring]
            for one in line:
                one._needs.append(waits)
        try:
            yield [flight.outcome for flight in waits]
        finally:
            with _WAITS:
                for one in line:
                    one._needs.remove(waits)

    def _needs_one_of(self, line: list[Asker]) -> bool:
        seen: set[Asker] = set()
        to_see = [self]
        while to_see:
            one = to_see.pop()
            if one in line:
                return True
            if one not in seen:
                seen.add(one)
                to_see += [flight.owner for waits in one._needs for flight in waits if not flight.outcome.done()]
        return False


_COMPUTING: ContextVar[Asker | None] = ContextVar("quatcache_computing", default=None)


class Flight(NamedTuple):
    """The computation of one key.

    Attributes:
        owner: The call that computes it.
        outcome: Its value.
    """

    owner: Asker
    outcome: Future[Any]


class Claims(NamedTuple):
    """What is to be done about some keys that were missing.

    Attributes:
        own: Positions of those that the caller is to compute.
        others: What computes, or has computed, all others, by position.
    """

    own: Positions
    others: dict[int, Flight]


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
        >>> claims = shared.claim(["a", "b"], Asker())
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
        self._flights: dict[Hashable, Flight] = {}
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

    def claim(self, keys: Sequence[Hashable], asker: Asker) -> Claims:
        """Take over the computation of distinct keys that were missing, unless another has it, or has done it since.

        What is computed in a call further up has to be computed once more: that one waits for this.
        """
        own, others, line = [], {}, set(asker.line)
        with self.lock:
            found = self._store.get_many(keys)
            there = dict(zip(found.positions.tolist(), found.values, strict=True))
            for place, key in enumerate(keys):
                flight = self._flights.get(key)
                if place in there:
                    others[place] = Flight(asker, Future())
                    others[place].outcome.set_result(there[place])
                elif flight is None or flight.owner in line or flight.outcome in asker.overtaken:
                    if flight is None:
                        self._flights[key] = _flight(asker)
                    own.append(place)
                else:
                    others[place] = flight
        return Claims(np.array(own, np.int64), others)

    def release(self, keys: Iterable[Hashable], asker: Asker) -> None:
        """Give up what a call has claimed and not put."""
        with self.lock:
            left = [
                self._flights.pop(key) for key in keys if (flight := self._flights.get(key)) and flight.owner is asker
            ]
        for flight in left:
            flight.outcome.set_exception(Abandoned())

    @property
    def is_computing(self) -> bool:
        """Whether values are being computed."""
        with self.lock:
            return bool(self._flights)

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


def _flight(owner: Asker) -> Flight:
    outcome: Future[Any] = Future()
    outcome.set_running_or_notify_cancel()  # nobody who waits for it can cancel it
    return Flight(owner, outcome)


_WAITS = threading.Lock()
"""Held while it is noted, in all stores together, who waits for whom."""

_OF_THIS_PROCESS: weakref.WeakSet[SharedStore] = weakref.WeakSet()


def _after_fork() -> None:
    global _WAITS
    _WAITS = threading.Lock()
    for store in list(_OF_THIS_PROCESS):
        store._start_over()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
