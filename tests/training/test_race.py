"""Any number of processes may start on one save_dir: one fills, the others wait and read, all of them train."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from quatcache.store import DiskStore
from tests.committed import committed_rows, only_store, texts_by_key
from tests.processes import Job, context, first_to_end, linux_only, run
from tests.training.killed_fit import ENCODED, KILLED, SAID, append, logged, run_fit, samples, steps

pytestmark = [pytest.mark.slow, linux_only]

COUNT = 600
PROCESSES = 8
COMMITTED = "committed"


@pytest.fixture
def race(tmp_path):
    """Start processes on one save_dir, and give the jobs; and what they encoded, once they have ended."""

    def start(count=PROCESSES, settings=lambda number: {}, **shared):
        return [
            Job(
                run_fit, tmp_path / f"{number}.json", save_dir=tmp_path / "cache", log=tmp_path / "log",
                attempt=number, count=COUNT, shard_bytes=4096, **shared, **settings(number),
            )
            for number in range(count)
        ]  # fmt: skip

    return start


@pytest.fixture
def uncached(tmp_path):
    """Fit without a cache, and give every step of it."""

    def fitted(seed=0):
        out, log = tmp_path / f"uncached-{seed}.json", tmp_path / "other-log"
        return steps(run(run_fit, out, save_dir=None, log=log, attempt=0, count=COUNT, seed=seed))

    return fitted


def encoded(tmp_path, of=lambda number: 0):
    """Count for each encoder how often each text was encoded, by all processes together."""
    counts = {}
    for number, texts in logged(tmp_path / "log", ENCODED).items():
        counts.setdefault(of(number), Counter()).update(texts)
    return counts


def once():
    return Counter(samples(COUNT)[2])


def tell_waiting(message, waiting):
    if "Another process is filling" in message:
        waiting.release()


def until_others_wait(call, waiting):
    """Encode the first batch only when all other processes have said that they wait for this one."""
    for other in range(PROCESSES - 1) if call == 1 else ():
        assert waiting.acquire(timeout=60), f"only {other} processes wait"


def test_eight_processes_that_start_at_once_encode_each_item_once_in_total_and_all_train(race, uncached, tmp_path):
    barrier = context().Barrier(PROCESSES, timeout=60)
    results = [job.result() for job in race(begins=barrier.wait)]
    assert encoded(tmp_path) == {0: once()}
    assert sorted(result["encoded"] for result in results) == [0] * (PROCESSES - 1) + [len(once())]
    expected = uncached()
    assert all(steps(result) == expected for result in results)
    assert run_alone(tmp_path)["encoded"] == 0


def run_alone(tmp_path):
    save_dir, log = tmp_path / "cache", tmp_path / "log"
    return run(run_fit, tmp_path / "alone.json", save_dir=save_dir, log=log, attempt=99, count=COUNT)


def test_seven_processes_wait_with_a_message_for_the_one_that_fills(race, uncached, tmp_path):
    waiting = context().Semaphore(0)
    said, happens = partial(tell_waiting, waiting=waiting), partial(until_others_wait, waiting=waiting)
    results = [job.result() for job in race(said=said, happens=happens)]
    assert encoded(tmp_path) == {0: once()}
    assert sorted(result["encoded"] for result in results) == [0] * (PROCESSES - 1) + [len(once())]
    expected = uncached()
    assert all(steps(result) == expected for result in results)


def die_once(call, number, log, save_dir, waiting):
    """Be killed in the middle of the fill, with the lock in hand and others waiting for it; but one process only."""
    if logged(log, KILLED):
        return
    until_others_wait(call, waiting)
    if call < 20:
        return
    locks = list(Path(save_dir).rglob(".fill.lock"))
    for lock in locks:
        with pytest.raises(Timeout):
            FileLock(lock).acquire(timeout=0)
    by_key = texts_by_key(samples(COUNT)[2])
    append(log, number, COMMITTED, *(by_key[key] for key in only_store(Path(save_dir))))
    append(log, number, KILLED, f"with {len(locks)} lock")
    os.kill(os.getpid(), signal.SIGKILL)


def test_others_go_on_where_the_process_that_filled_was_killed(race, uncached, tmp_path):
    log, save_dir = tmp_path / "log", tmp_path / "cache"

    waiting = context().Semaphore(0)

    def settings(number):
        return {"happens": partial(die_once, number=number, log=log, save_dir=save_dir, waiting=waiting)}

    jobs = race(settings=settings, said=partial(tell_waiting, waiting=waiting))
    statuses = [job.status() for job in jobs]
    assert sorted(statuses) == [-signal.SIGKILL] + [0] * (PROCESSES - 1)
    victim = statuses.index(-signal.SIGKILL)
    assert logged(log, KILLED) == {victim: ["with 1 lock"]}
    (committed,) = logged(log, COMMITTED).values()
    assert 64 <= len(committed) < len(once())
    by_victim = logged(log, ENCODED)[victim]
    assert encoded(tmp_path) == {0: once() + Counter(set(by_victim) - set(committed))}
    results = [job.result() for job in jobs if job.process.exitcode == 0]
    assert sorted(result["encoded"] for result in results) == [0] * (PROCESSES - 2) + [len(once()) - len(committed)]
    expected = uncached()
    assert all(steps(result) == expected for result in results)


def test_processes_with_different_encoders_share_a_save_dir_and_no_row(race, uncached, tmp_path):
    barrier = context().Barrier(6, timeout=60)
    jobs = race(6, lambda number: {"seed": number // 2}, begins=barrier.wait)
    results = [job.result() for job in jobs]
    assert encoded(tmp_path, lambda number: number // 2) == {seed: once() for seed in range(3)}
    for seed in range(3):
        assert steps(results[2 * seed]) == steps(results[2 * seed + 1]) == uncached(seed)
    stores = committed_rows(tmp_path / "cache")
    assert len(stores) == 3
    assert all(rows.keys() == texts_by_key(once()).keys() for rows in stores.values())


def hold(call, filling, done):
    if call == 1:
        filling.set()
        assert done.wait(60), "the fill of another encoder waited for this one"


def test_fills_of_different_encoders_do_not_wait_for_each_other(tmp_path):
    filling, done = context().Event(), context().Event()
    shared = {"save_dir": tmp_path / "cache", "log": tmp_path / "log", "count": COUNT}
    first = Job(run_fit, tmp_path / "0.json", attempt=0, happens=partial(hold, filling=filling, done=done), **shared)
    assert filling.wait(60)
    other = Job(run_fit, tmp_path / "1.json", attempt=1, seed=1, **shared)
    assert first_to_end([first, other]) is other
    done.set()
    assert other.result()["encoded"] == first.result()["encoded"] == len(once())


def pack(moment, times, wanted, save_dir):
    """Pack the small shards of the only store, as another process does at the end of its fill."""
    if (moment, times) == ("before opening a shard", wanted):
        (directory,) = save_dir.glob("encoders/*")
        DiskStore(directory, directory.name).compact()


@pytest.mark.parametrize("number", [1, 9, 20])
def test_shards_that_another_process_packs_while_they_are_opened_are_found_again(number, uncached, tmp_path):
    settings = {"save_dir": tmp_path / "cache", "log": tmp_path / "log", "count": COUNT}
    filled = run(run_fit, tmp_path / "0.json", attempt=0, shard_bytes=2, batch_size=32, **settings)
    assert len(list(tmp_path.glob("cache/encoders/*/shard-*"))) == 21  # one for each call; the first is a short one
    reached = partial(pack, wanted=number, save_dir=tmp_path / "cache")
    warm = run(run_fit, tmp_path / "1.json", attempt=1, reached=reached, **settings)
    assert len(list(tmp_path.glob("cache/encoders/*/shard-*"))) == 1
    assert (warm["encoded"], warm["read"]) == (0, 0)
    assert not [line for line in logged(tmp_path / "log", SAID)[1] if line.startswith("WARNING")]
    assert steps(warm) == steps(filled) == uncached()
