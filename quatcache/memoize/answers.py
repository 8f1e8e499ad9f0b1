"""One call, answered: what is stored is taken, what another call computes is waited for, the rest is computed.

A function may be a coroutine, which has to be awaited, while the loop over the misses is one for all
(:func:`~quatcache.read_through.reading_through`). So the answering is a generator that says what it needs next, and two
drivers that get it: one waits, the other awaits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np

from quatcache.memoize.flights import Abandoned, SharedStore
from quatcache.read_through import reading_through
from quatcache.store import Found, Positions

__all__ = ["answer", "answer_async", "answering"]

Futures: TypeAlias = list[concurrent.futures.Future[Any]]
Need: TypeAlias = "Positions | Futures | Callable[[], None]"
Steps: TypeAlias = Generator[Need, Any, list[Any]]


class _Turn:
    """The turn of a call to compute, among processes; given up for good when it ends, however late it comes."""

    def __init__(self, alone: Callable[[], AbstractContextManager[None]] | None) -> None:
        self._alone = alone
        self._mutex = threading.Lock()
        self._held: AbstractContextManager[None] | None = None
        self._over = False

    @property
    def is_to_come(self) -> bool:
        """Whether it has to be waited for."""
        return self._alone is not None and self._held is None

    def wait(self) -> None:
        """Wait for it."""
        assert self._alone is not None
        held = self._alone()
        held.__enter__()
        with self._mutex:
            if not self._over:
                self._held = held
                return
        held.__exit__(None, None, None)  # a task that was cancelled meanwhile

    def end(self) -> None:
        """Let others compute."""
        with self._mutex:
            self._over, held, self._held = True, self._held, None
        if held is not None:
            held.__exit__(None, None, None)


def answering(keys: Sequence[Hashable], store: SharedStore, batch_size: int | None) -> Steps:
    """Say what is needed to answer, one after the other, and return the values.

    Args:
        keys: N keys.
        store: Where values are looked up, claimed and put.
        batch_size: Most positions that are asked for at once; None: all.

    Yields:
        Positions into the keys, whose values are to be sent back; or futures, which are to be waited for; or what is
        to be called, and may take long.
    """
    claimed: list[Hashable] = []
    waiting: dict[int, concurrent.futures.Future[Any]] = {}

    def batches(missing: Positions) -> Iterator[Positions]:
        claims = store.claim([keys[place] for place in missing.tolist()])
        own = missing[claims.own]
        claimed.extend(keys[place] for place in own.tolist())
        waiting.update((int(missing[place]), outcome) for place, outcome in claims.others.items())
        size = max(len(own) if batch_size is None else batch_size, 1)
        yield from (own[start : start + size] for start in range(0, len(own), size))
        if waiting:  # last: others may wait for what is computed here
            yield np.fromiter(waiting, np.int64)

    steps: Generator[Positions, Any, list[Any]] = reading_through(keys, store, batches=batches)
    values, turn = None, _Turn(store.alone)
    try:
        while True:
            try:
                positions = steps.send(values)
            except StopIteration as end:
                done: list[Any] = end.value
                return done
            if waiting and int(positions[0]) in waiting:
                turn.end()
                values = yield from _others(keys, store, batch_size, waiting)
                continue
            if turn.is_to_come:
                yield turn.wait
            values = yield from _still_missing(keys, store, positions)
    finally:
        turn.end()
        store.release(claimed)


def _still_missing(keys: Sequence[Hashable], store: SharedStore, positions: Positions) -> Steps:
    """Have computed what other processes have not computed meanwhile."""
    if store.alone is None:
        computed: list[Any] = yield positions
        return computed
    found = store.peek([keys[place] for place in positions.tolist()])
    rest = np.delete(np.arange(len(positions)), found.positions)
    values = (yield positions[rest]) if len(rest) else []
    return store.assemble(len(positions), [found, Found(rest, values)])


def _others(
    keys: Sequence[Hashable],
    store: SharedStore,
    batch_size: int | None,
    waiting: dict[int, concurrent.futures.Future[Any]],
) -> Steps:
    """Wait for values that others compute, and compute those that they gave up."""
    yield list(waiting.values())
    given_up = [place for place, outcome in waiting.items() if isinstance(outcome.exception(), Abandoned)]
    again = yield from _within(given_up, answering([keys[place] for place in given_up], store, batch_size))
    values = dict(zip(given_up, again, strict=True))
    return [values[place] if place in values else outcome.result() for place, outcome in waiting.items()]


def _within(places: list[int], steps: Steps) -> Steps:
    """Answer for some of the keys: positions among these become positions among all."""
    where, reply = np.array(places, np.int64), None
    try:
        while True:
            try:
                need = steps.send(reply)
            except StopIteration as end:
                done: list[Any] = end.value
                return done
            reply = yield where[need] if isinstance(need, np.ndarray) else need
    finally:
        steps.close()


def answer(steps: Steps, compute: Callable[[Positions], list[Any]]) -> list[Any]:
    """Get what is needed, and give the values."""
    reply = None
    try:
        while True:
            try:
                need = steps.send(reply)
            except StopIteration as end:
                done: list[Any] = end.value
                return done
            reply = None
            if isinstance(need, np.ndarray):
                reply = compute(need)
            elif isinstance(need, list):
                concurrent.futures.wait(need)
            else:
                need()
    finally:
        steps.close()  # what was claimed is given up now, and not when the garbage is collected


async def answer_async(steps: Steps, compute: Callable[[Positions], Awaitable[list[Any]]]) -> list[Any]:
    """Get what is needed, and give the values, without keeping the event loop waiting."""
    reply = None
    try:
        while True:
            try:
                need = steps.send(reply)
            except StopIteration as end:
                done: list[Any] = end.value
                return done
            reply = None
            if isinstance(need, np.ndarray):
                reply = await compute(need)
            elif isinstance(need, list):  # a cancelled wait leaves the futures to others
                done_waiting, _ = await asyncio.wait([asyncio.wrap_future(outcome) for outcome in need])
                for outcome in done_waiting:
                    outcome.exception()  # seen: else it would be logged as one that nobody looked at
            else:
                await asyncio.to_thread(need)
    finally:
        steps.close()
