"""One computation per key in flight: threads, tasks, forks; and nobody waits for what was given up."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from quatcache import memoize_batch
from quatcache.memoize import flights
from quatcache.memoize.answers import answer_async, answering
from quatcache.memoize.flights import Asker, SharedStore
from quatcache.store import MemoryStore


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


def in_threads(*calls):
    """Answers of calls that are made at the same time, in threads that nobody has to wait for."""
    answers = [concurrent.futures.Future() for _ in calls]

    def run(call, answer):
        answer.set_result(call())

    for pair in zip(calls, answers, strict=True):
        threading.Thread(target=run, args=pair, daemon=True).start()
    return [answer.result(20) for answer in answers]


class Together:
    """Two that go on when both have come."""

    def __init__(self):
        self.came = threading.Event(), threading.Event()

    def wait(self, which):
        self.came[which].set()
        assert self.came[not which].wait(20)


def test_threads_whose_recursions_need_each_other_do_not_wait_for_ever():
    together = Together()

    @memoize_batch("numbers")
    def total(numbers):
        if numbers in ([5, 3], [4]):  # 5 needs 4, which the other thread computes, and that needs 3
            together.wait(numbers == [4])
        return [number + (total([number - 1])[0] if number else 0) for number in numbers]

    assert in_threads(lambda: total([5, 3]), lambda: total([4])) == [[15, 6], [10]]
    assert total._values.store._flights == {}


def test_threads_in_functions_that_need_each_other_do_not_wait_for_ever():
    together = Together()

    @memoize_batch("numbers")
    def one(numbers):
        if len(numbers) == 2:
            together.wait(True)
        return [number + (other([number - 1])[0] if number else 0) for number in numbers]

    @memoize_batch("numbers")
    def other(numbers):
        if len(numbers) == 2:
            together.wait(False)
        return [number * (one([number - 1])[0] if number else 1) for number in numbers]

    assert in_threads(lambda: one([5, 3]), lambda: other([4, 1])) == [[25, 5], [20, 0]]


def test_what_is_computed_further_up_is_computed_again_with_the_rest():
    batches = []

    @memoize_batch("numbers")
    def function(numbers):
        batches.append(list(numbers))
        return [-one for one in numbers] if 3 not in numbers else [sum(function([1, 2])), -2]

    assert function([3, 2]) == [-3, -2] and batches == [[3, 2], [1, 2]]


# tasks


def test_tasks_that_a_function_starts_do_not_wait_for_what_it_computes():
    @memoize_batch("numbers")
    async def fibonacci(numbers):
        async def one(number):
            if number < 2:
                return number
            (before,), (first,) = await asyncio.gather(fibonacci([number - 1]), two(number))
            return before + first

        async def two(number):
            return await fibonacci([number - 2])

        return [await one(number) for number in numbers]

    assert asyncio.run(asyncio.wait_for(fibonacci([9, 7, 8]), 20)) == [34, 13, 21]


@pytest.mark.filterwarnings("error")
def test_task_that_was_forgotten_with_its_loop_gives_up_what_it_computed():
    forgotten = True

    @memoize_batch("batch")
    async def function(batch):
        if forgotten:
            await asyncio.Event().wait()
        return batch

    async def start():
        task = asyncio.ensure_future(function([1]))
        await asyncio.sleep(0)
        assert not task.done()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    loop.close()
    del loop
    gc.collect()
    forgotten = False
    assert asyncio.run(asyncio.wait_for(function([1]), 20)) == [1]


def test_cancelled_wait_for_what_was_given_up_is_not_logged():
    logged = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: logged.append(context))
        entered, opened = asyncio.Event(), asyncio.Event()

        @memoize_batch("batch")
        async def function(batch):
            entered.set()
            await opened.wait()
            raise RuntimeError("boom")

        first = asyncio.create_task(function(["a"]))
        await entered.wait()
        second = asyncio.create_task(function(["a"]))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        opened.set()
        await asyncio.wait([first, second])
        assert isinstance(first.exception(), RuntimeError) and second.cancelled()
        del first, second
        for _ in range(3):
            await asyncio.sleep(0)
            gc.collect()

    asyncio.run(main())
    assert logged == []


def test_turn_that_comes_after_its_task_was_cancelled_is_passed_on():
    entered, opened, passed_on = threading.Event(), threading.Event(), threading.Event()

    @contextmanager
    def alone():
        entered.set()
        assert opened.wait(20)
        yield
        passed_on.set()

    async def compute(positions):
        raise AssertionError("it was cancelled")

    async def main():
        steps = answering(["a"], SharedStore(MemoryStore(), alone), None)
        task = asyncio.create_task(answer_async(steps, compute))
        while not entered.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        opened.set()

    asyncio.run(main())
    assert passed_on.wait(20)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_process_may_wait_though_another_thread_was_about_to():
    with flights._WAITS:
        child = os.fork()
        if child == 0:
            os._exit(0 if flights._WAITS.acquire(timeout=20) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_who_gives_up_leaves_what_another_has_claimed_since():
    store, first, second = SharedStore(MemoryStore()), Asker(), Asker()
    store.claim(["a"], first)
    store.put_many(["a"], [1])
    store.clear()
    store.claim(["a"], second)
    store.release(["a"], first)
    assert not store.claim(["a"], Asker()).others[0].outcome.done()
