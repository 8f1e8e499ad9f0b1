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

from quatcache.memoize.flights import Abandoned, Asker, Flight, SharedStore
from quatcache.read_through import Dialogue, reading_through
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


def answering(
    keys: Sequence[Hashable],
    store: SharedStore,
    batch_size: int | None,
    asker: Asker | None = None,
    places: Positions | None = None,
) -> Steps:
    """Say what is needed to answer, one after the other, and return the values.

    Args:
        keys: N keys.
        store: Where values are looked up, claimed and put.
        batch_size: Most positions that are asked for at once; None: all.
        asker: The call; None: a new one.
        places: Positions that stand for the keys; None: their own.

    Yields:
        Positions, whose values are to be sent back; or futures, which are to be waited for; or what is to be called,
        and may take long.
    """
    found = store.get_many(keys)
    if len(found.positions) == len(keys):  # mostly: what follows takes as long as some ten look-ups
        hits: list[Any] = found.values
        return hits
    asker = asker or Asker()
    claimed: list[Hashable] = []
    waiting: dict[int, Flight] = {}

    def batches(missing: Positions) -> Iterator[Positions]:
        claims = store.claim([keys[place] for place in missing.tolist()], asker)
        own = missing[claims.own]
        claimed.extend(keys[place] for place in own.tolist())
        waiting.update((int(missing[place]), flight) for place, flight in claims.others.items())
        size = max(len(own) if batch_size is None else batch_size, 1)
        yield from (own[start : start + size] for start in range(0, len(own), size))
        if waiting:  # last: others may wait for what is computed here
            yield np.fromiter(waiting, np.int64)

    turn = _Turn(store.alone)
    try:
        asked = Dialogue(reading_through(keys, store, batches=batches, found=found))
        while asked.need is not None:
            needed = asked.need if places is None else places[asked.need]
            wanted = [keys[place] for place in asked.need.tolist()]
            if waiting and int(asked.need[0]) in waiting:
                asked.reply((yield from _others(wanted, store, batch_size, asker, needed, list(waiting.values()))))
                continue
            if turn.is_to_come:
                yield turn.wait
            asked.reply((yield from _still_missing(wanted, store, asker, needed)))
        done: list[Any] = asked.result
        return done
    finally:
        turn.end()
        store.release(claimed, asker)


def _still_missing(keys: Sequence[Hashable], store: SharedStore, asker: Asker, places: Positions) -> Steps:
    """Have computed what other processes have not computed meanwhile."""
    found = Found(np.empty(0, np.int64), []) if store.alone is None else store.peek(keys)
    rest = np.delete(np.arange(len(keys)), found.positions)
    values: list[Any] = []
    if len(rest):
        with asker.computing():  # whoever drives this generator computes in its context
            values = yield places[rest]
    return store.assemble(len(keys), [found, Found(rest, values)]) if len(rest) < len(keys) else values


def _others(
    keys: Sequence[Hashable],
    store: SharedStore,
    batch_size: int | None,
    asker: Asker,
    places: Positions,
    flights: Sequence[Flight],
) -> Steps:
    """Wait for values that others compute, and compute those that they gave up or that wait for this call."""
    with asker.waiting(flights) as outcomes:
        yield outcomes
    left = [
        number
        for number, (_, outcome) in enumerate(flights)
        if not outcome.done() or isinstance(outcome.exception(), Abandoned)
    ]
    again = yield from answering([keys[number] for number in left], store, batch_size, asker, places[left])
    values = dict(zip(left, again, strict=True))
    return [values[number] if number in values else flight.outcome.result() for number, flight in enumerate(flights)]


def answer(steps: Steps, compute: Callable[[Positions], list[Any]]) -> list[Any]:
    """Get what is needed, and give the values."""
    try:
        asked = Dialogue(steps)
        while asked.need is not None:
            reply = None
            if isinstance(asked.need, np.ndarray):
                reply = compute(asked.need)
            elif isinstance(asked.need, list):
                concurrent.futures.wait(asked.need)
            else:
                asked.need()
            asked.reply(reply)
        done: list[Any] = asked.result
        return done
    finally:
        steps.close()  # what was claimed is given up now, and not when the garbage is collected


async def answer_async(steps: Steps, compute: Callable[[Positions], Awaitable[list[Any]]]) -> list[Any]:
    """Get what is needed, and give the values, without keeping the event loop waiting."""
    try:
        asked = Dialogue(steps)
        while asked.need is not None:
            reply = None
            if isinstance(asked.need, np.ndarray):
                reply = await compute(asked.need)
            elif isinstance(asked.need, list):
                await _all_done(asked.need)
            else:
                await _in_a_thread(asked.need)
            asked.reply(reply)
        done: list[Any] = asked.result
        return done
    finally:
        steps.close()


async def _all_done(outcomes: Futures) -> None:
    """Wait for futures; a cancelled wait leaves them to others."""
    own = [asyncio.wrap_future(outcome) for outcome in outcomes]
    try:
        if own:
            await asyncio.wait(own)
    finally:
        for one in own:  # else what went wrong would be logged as what nobody looked at
            if not one.cancel():
                one.exception()


async def _in_a_thread(wait: Callable[[], None]) -> None:
    """Call what may take long, not in the threads of the event loop: who is waited for may need one of those."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        await asyncio.wrap_future(pool.submit(wait))
    finally:
        pool.shutdown(wait=False)
