"""One computation per key in flight: threads, tasks, forks; and nobody waits for what was given up."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from quatcache import memoize_batch


class Gate:
    """A batch function that waits until it is let through, and counts."""

    def __init__(self):
        self.entered, self.open = threading.Event(), threading.Event()
        self.batches, self.fails = [], False

    def __call__(self, batch):
        self.batches.append(list(batch))
        self.entered.set()
        assert self.open.wait(60)
        if self.fails:
            self.fails = False
            raise RuntimeError("boom")
        return [item.upper() for item in batch]


def memoized(function, **settings):
    @memoize_batch("batch", **settings)
    def named(batch):
        return function(batch)

    return named


def test_two_threads_share_one_computation():
    gate = Gate()
    function = memoized(gate)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(function, ["a", "b"])
        assert gate.entered.wait(60)
        second = pool.submit(function, ["b", "a"])
        gate.open.set()
        assert first.result(60) == ["A", "B"] and second.result(60) == ["B", "A"]
    assert gate.batches == [["a", "b"]]


def test_what_another_thread_does_not_compute_is_computed_beside_it():
    gate, order = Gate(), []

    def compute(batch):
        if batch == ["c"]:
            order.append("beside")
            gate.open.set()
            return ["C"]
        return gate(batch)

    function = memoized(compute)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(function, ["a", "b"])
        assert gate.entered.wait(60)
        assert function(["b", "c"]) == ["B", "C"]  # opens the gate itself: it does not wait before it has computed
        assert first.result(60) == ["A", "B"]
    assert gate.batches == [["a", "b"]] and order == ["beside"]


def test_what_a_thread_gave_up_is_computed_by_the_one_that_waits():
    gate = Gate()
    gate.fails = True
    function = memoized(gate)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(function, ["a"])
        assert gate.entered.wait(60)
        second = pool.submit(function, ["a"])
        gate.open.set()
        with pytest.raises(RuntimeError, match="boom"):
            first.result(60)
        assert second.result(60) == ["A"]
    assert function._values.store._flights == {}


def test_value_that_is_evicted_at_once_still_reaches_those_who_wait():
    gate = Gate()
    function = memoized(gate, maxsize=0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(function, ["a"])
        assert gate.entered.wait(60)
        second = pool.submit(function, ["a"])
        gate.open.set()
        assert first.result(60) == second.result(60) == ["A"]


def test_eight_threads_compute_each_key_once():
    counts, lock = {}, threading.Lock()

    @memoize_batch("batch", batch_size=7)
    def square(batch):
        with lock:
            for item in batch:
                counts[item] = counts.get(item, 0) + 1
        return [item * item for item in batch]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:

        def hammer(seed):
            draw = random.Random(seed)
            for _ in range(150):
                batch = [draw.randrange(400) for _ in range(20)]
                assert square(batch) == [item * item for item in batch]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(hammer, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert set(counts.values()) == {1} and len(counts) == 400
    assert square._values.store._flights == {}


def test_eight_threads_with_failures_and_evictions_get_right_answers():
    draw_failure, lock = random.Random(0), threading.Lock()

    @memoize_batch("batch", maxsize=50, batch_size=5)
    def square(batch):
        with lock:
            fails = draw_failure.random() < 0.2
        if fails:
            raise RuntimeError("boom")
        return [item * item for item in batch]

    def hammer(seed):
        draw, answered = random.Random(seed), 0
        while answered < 60:
            batch = [draw.randrange(200) for _ in range(12)]
            try:
                assert square(batch) == [item * item for item in batch]
                answered += 1
            except RuntimeError:
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8)))
    assert square._values.store._flights == {}


# tasks


def test_async_function_is_one():
    @memoize_batch("batch")
    async def function(batch: list[str]) -> list[str]:
        return [item.upper() for item in batch]

    class Model:
        @memoize_batch("batch")
        async def predict(self, batch):
            return [item + "!" for item in batch]

    assert inspect.iscoroutinefunction(function) or asyncio.iscoroutinefunction(function)
    assert asyncio.run(function(["a", "b", "a"])) == ["A", "B", "A"]
    assert asyncio.run(function(["b"])) == ["B"] and function.cache_info() == (1, 2, None, 2)
    assert asyncio.run(Model().predict(["a"])) == ["a!"]


def test_tasks_share_one_computation_and_leave_the_loop_free():
    batches = []

    async def main():
        entered, opened = asyncio.Event(), asyncio.Event()

        @memoize_batch("batch")
        async def function(batch):
            batches.append(batch)
            entered.set()
            await opened.wait()
            return [item.upper() for item in batch]

        first = asyncio.create_task(function(["a", "b"]))
        await entered.wait()
        second = asyncio.create_task(function(["b"]))
        await asyncio.sleep(0)  # the second has asked, and waits; the loop goes on
        opened.set()
        return await asyncio.gather(first, second)

    assert asyncio.run(main()) == [["A", "B"], ["B"]]
    assert batches == [["a", "b"]]


@pytest.mark.parametrize("who", ["computes", "waits"])
def test_cancelled_task_leaves_the_others_their_answer(who):
    async def main():
        entered, opened, calls = asyncio.Event(), asyncio.Event(), []

        @memoize_batch("batch")
        async def function(batch):
            calls.append(batch)
            entered.set()
            await opened.wait()
            return [item.upper() for item in batch]

        first = asyncio.create_task(function(["a"]))
        await entered.wait()
        others = [asyncio.create_task(function(["a"])) for _ in range(2)]
        await asyncio.sleep(0)
        (first if who == "computes" else others[0]).cancel()
        await asyncio.sleep(0)
        opened.set()
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        return [one for one in answers if not isinstance(one, asyncio.CancelledError)], len(calls), function

    answers, calls, function = asyncio.run(main())
    assert answers == [["A"], ["A"]]
    assert calls == (2 if who == "computes" else 1)
    assert function._values.store._flights == {}


def test_event_loops_of_two_threads_share_one_computation():
    calls, entered, opened = [], threading.Event(), threading.Event()

    @memoize_batch("batch")
    async def function(batch):
        calls.append(batch)
        entered.set()
        while not opened.is_set():
            await asyncio.sleep(0)
        return [item.upper() for item in batch]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: asyncio.run(function(["a"])))
        assert entered.wait(60)
        second = pool.submit(lambda: asyncio.run(function(["a"])))
        opened.set()
        assert first.result(60) == second.result(60) == ["A"]
    assert len(calls) == 1


# forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_process_does_not_wait_for_a_thread_that_it_does_not_have():
    gate = Gate()
    function = memoized(gate)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(function, ["a"])
        assert gate.entered.wait(60)
        child = os.fork()
        if child == 0:
            gate.open.set()
            os._exit(0 if function(["a"]) == ["A"] else 1)
        _, status = os.waitpid(child, 0)
        gate.open.set()
        assert first.result(60) == ["A"]
    assert os.waitstatus_to_exitcode(status) == 0
