"""Segments: one for a name on a host, gone with who made it, and nothing is left behind by whoever was killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from quatcache import SharedCache
from quatcache.errors import ConfigError, StoreError
from quatcache.store import segment_files
from quatcache.store.segment import open_segment, remove_leftovers
from quatcache.store.segment_files import own_files, segment_path
from tests.store import slot_workers

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]


@pytest.fixture
def name(request):
    """A name that no other test has."""
    return f"test-{os.getpid()}-{abs(hash(request.node.name)):x}"


def start(method, function, *arguments):
    process = multiprocessing.get_context(method).Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def ended(process):
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("a process was stuck")
    return process.exitcode


def test_file_is_there_as_long_as_the_cache_or_a_view_of_it(name):
    cache = SharedCache(1, 10, (4,), name=name)
    cache.set_slot(3, torch.ones(4, dtype=torch.uint8))
    view, path = cache.get_slot(3), segment_path(name)
    del cache
    assert path.exists()
    assert view.tolist() == [1, 1, 1, 1]
    del view
    assert not path.exists()


def test_one_process_maps_a_segment_once(name):
    first = SharedCache(1, 10, (4,), name=name)
    again = SharedCache(1, 10, (4,), name=name)
    copied = pickle.loads(pickle.dumps(first))
    assert first.array.data_ptr() == again.array.data_ptr() == copied.array.data_ptr()
    del first, again
    copied.set_slot(0, torch.zeros(4, dtype=torch.uint8))
    assert segment_path(name).exists()


def test_pickle_of_a_cache_is_small_and_says_when_the_memory_is_gone(name):
    cache = SharedCache(1, 1000, (400,), name=name)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 500
    del cache
    with pytest.raises(StoreError, match=r"not there any more.*keep the SharedCache"):
        pickle.loads(pickled)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_give_one_name_share_one_cache(name, method):
    context = multiprocessing.get_context(method)
    answers, barrier = context.Queue(), context.Barrier(2)
    ranks = [start(method, slot_workers.rank, name, own, answers, barrier) for own in range(2)]
    found = [answers.get(timeout=SECONDS) for _ in ranks]
    assert [ended(rank) for rank in ranks] == [0, 0]
    expected = [[1000 + index] * 5 for index in range(40)]
    assert sorted(own for own, _, _ in found) == [0, 1]
    assert all(values == expected and present == 40 for _, values, present in found)
    assert not segment_path(name).exists()


def test_processes_that_make_one_cache_at_the_same_moment_get_the_same(name):
    context = multiprocessing.get_context("fork" if "fork" in METHODS else "spawn")
    for attempt in range(5):
        answers, barrier = context.Queue(), context.Barrier(6)
        racers = [
            start(context.get_start_method(), slot_workers.race, f"{name}-{attempt}", number, answers, barrier)
            for number in range(6)
        ]
        assert [answers.get(timeout=SECONDS) for _ in racers] == [[0, 1, 2, 3, 4, 5]] * 6
        assert [ended(racer) for racer in racers] == [0] * 6


@pytest.mark.parametrize("method", METHODS)
def test_leftover_of_a_killed_owner_is_removed_when_the_next_cache_is_made(name, method, caplog):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    owner = start(method, slot_workers.hold, name, ready)
    assert ready.wait(SECONDS)
    path = segment_path(name)
    SharedCache(1, 10, (4,))
    assert path.exists()  # its owner lives
    os.kill(owner.pid, signal.SIGKILL)
    ended(owner)
    assert path.exists()
    with caplog.at_level("INFO", logger="quatcache"):
        SharedCache(1, 10, (4,))
    assert not path.exists()
    assert "removed" in caplog.text and name in caplog.text


def test_leftover_of_a_killed_owner_is_not_taken_for_the_cache_of_that_name(name):
    context = multiprocessing.get_context(METHODS[0])
    ready = context.Event()
    owner = start(METHODS[0], slot_workers.hold, name, ready)
    assert ready.wait(SECONDS)
    os.kill(owner.pid, signal.SIGKILL)
    ended(owner)
    cache = SharedCache(1, 10, (4,), name=name)
    assert cache.stats().present == 0


def test_cache_whose_owner_was_killed_lives_on_with_the_others(name):
    context = multiprocessing.get_context(METHODS[0])
    ready = context.Event()
    owner = start(METHODS[0], slot_workers.hold, name, ready)
    assert ready.wait(SECONDS)
    cache = SharedCache(1, 10, (4,), name=name)
    os.kill(owner.pid, signal.SIGKILL)
    ended(owner)
    remove_leftovers()
    assert segment_path(name).exists()
    assert cache.get_slot(1).tolist() == [1, 1, 1, 1]
    del cache  # the last one that has it removes it
    assert not segment_path(name).exists()


@pytest.mark.parametrize("method", METHODS)
def test_child_that_made_a_cache_removes_it_when_it_ends(name, method):
    assert ended(start(method, slot_workers.make_and_end, name)) == 0
    assert not segment_path(name).exists()


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_forked_child_that_ends_leaves_the_cache_to_its_parent(name):
    cache = SharedCache(1, 10, (4,), torch.int64, name=name)
    assert ended(start("fork", slot_workers.write_some, cache, [2], 5)) == 0
    assert segment_path(name).exists()
    assert cache.get_slot(2).tolist() == [7] * 4


def test_processes_print_nothing_and_leave_nothing(tmp_path):
    """Trackers of multiprocessing would print of leaked memory, or remove it under the others."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import torch
        from quatcache import SharedCache
        from quatcache.store.segment_files import own_files
        from tests.store.slot_workers import write_some

        if __name__ == "__main__":
            cache = SharedCache(1, 20, (4,), torch.int64)
            for method in ("spawn", "forkserver"):
                workers = [
                    multiprocessing.get_context(method).Process(target=write_some, args=(cache, range(i, 20, 2), 0))
                    for i in range(2)
                ]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                    assert worker.exitcode == 0
                print(cache.stats().present, any(cache.name in path.name for path in own_files()))
                cache.clear()
            print(cache.name)
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stderr == ""
    *counts, name = done.stdout.splitlines()
    assert counts == ["20 True", "20 True"]
    assert not segment_path(name).exists()


def test_too_little_memory_is_told_before_any_is_taken(monkeypatch, name):
    monkeypatch.setattr(segment_files, "free_bytes", lambda: 1_000_000)
    with pytest.raises(
        StoreError, match=r"4\.\d MB of shared memory do not fit into .*1\.0 MB.* free.*size_limit_gib.*--shm-size"
    ):
        SharedCache(1, 1000, (1000,), torch.float32, name=name)
    assert not segment_path(name).exists()
    SharedCache(1, 100, (1000,), torch.float32, name=name)  # the name is free


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="memory is taken at once where that is possible")
def test_memory_that_somebody_else_took_meanwhile_is_an_error_and_no_crash_later(monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="do not fit"):
        SharedCache(1, 10, (4,), name=name)
    assert not segment_path(name).exists()


def test_unlimited_shared_memory_is_enough(monkeypatch):
    monkeypatch.setattr(segment_files, "free_bytes", lambda: None)
    assert len(SharedCache(1, 10, (4,))) == 10


def test_memory_is_taken_when_the_cache_is_made(name):
    cache = SharedCache(1, 100, (10_000,), name=name)
    if hasattr(os, "posix_fallocate") and Path("/dev/shm").is_dir():
        assert segment_path(name).stat().st_blocks * 512 >= 1_000_000
    assert cache.stats().bytes >= 1_000_000


def test_segments_lie_in_the_folder_for_temporary_files_where_there_is_no_dev_shm(monkeypatch, tmp_path, name):
    monkeypatch.setattr(segment_files, "shared_directory", lambda: tmp_path)
    cache = SharedCache(1, 10, (4,), name=name)
    cache.set_slot(1, torch.ones(4, dtype=torch.uint8))
    assert [path.name for path in tmp_path.iterdir()] == [f"quatcache-{os.getuid()}-{name}"]
    assert pickle.loads(pickle.dumps(cache)).get_slot(1).tolist() == [1] * 4
    del cache
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["", "../etc", "a/b", ".hidden", "a" * 151, "ü", "a b"])
def test_name_that_could_be_a_path_is_refused(wrong):
    with pytest.raises(ConfigError, match="cannot name shared memory"):
        SharedCache(1, 10, (4,), name=wrong)


def test_link_in_the_place_of_a_segment_is_not_followed(name, tmp_path):
    target, path = tmp_path / "target", segment_path(name)
    target.write_bytes(b"mine")
    path.symlink_to(target)
    try:
        with pytest.raises(StoreError, match="cannot open"):
            SharedCache(1, 10, (4,), name=name)
        assert target.read_bytes() == b"mine"
    finally:
        path.unlink()


def test_file_of_another_user_is_refused(name, monkeypatch):
    path = segment_path(name)
    path.write_bytes(b"")
    stat = os.fstat
    other = lambda descriptor: os.stat_result([*stat(descriptor)[:4], 12345, *stat(descriptor)[5:]])  # noqa: E731
    monkeypatch.setattr(segment_files.os, "fstat", other)
    try:
        with pytest.raises(StoreError, match="belongs to another user"):
            SharedCache(1, 10, (4,), name=name)
    finally:
        monkeypatch.undo()
        path.unlink()


def test_segment_whose_making_failed_is_made_by_the_next(name):
    def fails(segment):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        open_segment(name, 4096, fails)
    assert not segment_path(name).exists()
    segment, new = open_segment(name, 4096, lambda segment: None)
    assert new and len(segment) == 4096


def test_file_that_is_no_whole_segment_is_made_anew(name):
    segment_path(name).write_bytes(b"of a process that was killed while it made it")
    cache = SharedCache(1, 10, (4,), name=name)
    assert cache.stats().present == 0


def test_locks_exclude_threads_of_one_process(name):
    segment, _ = open_segment(name, 4096, lambda segment: None)
    entered = threading.Event()

    def enter():
        with segment.locked(3):
            entered.set()

    thread = threading.Thread(target=enter)
    with segment.locked(3):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(SECONDS)
    thread.join()


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_locks_outlast_the_making_of_other_caches(name):
    """Whoever closes any descriptor of a file gives up all locks that the process has on it."""
    segment, _ = open_segment(name, 4096, lambda segment: None)
    assert segment.claim(5)
    other = SharedCache(1, 10, (4,))
    pickle.loads(pickle.dumps(other))
    assert ended(start("fork", slot_workers.claim_in_vain, segment, 5)) == 0


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_process_forked_while_a_thread_writes_can_write(name):
    cache = SharedCache(1, 10, (4,), torch.int64, name=name)
    held, done = threading.Event(), threading.Event()

    def hold():
        with cache._segment.locked(9):
            held.set()
            done.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(SECONDS)
    try:
        assert ended(start("fork", slot_workers.write_some, cache, [2], 5)) == 0
    finally:
        done.set()
        thread.join()
    assert cache.get_slot(2).tolist() == [7] * 4


@pytest.fixture
def apart(monkeypatch):
    """Be on a system where locks on bytes wait for a lock on their file, also for that of the same process."""
    monkeypatch.setattr(segment_files, "LOCKS_APART", True)


def test_locks_on_bytes_have_a_file_of_their_own_where_they_would_wait_for_the_lock_on_theirs(name, apart, monkeypatch):
    from quatcache.store import segment as module

    held, real = set(), module.fcntl.flock
    monkeypatch.setattr(module.fcntl, "flock", lambda file, how: (held.add(os.fstat(file).st_ino), real(file, how))[1])
    cache = SharedCache(1, 10, (4,), torch.int64, name=name)
    real_lock, locked = module.fcntl.lockf, set()
    monkeypatch.setattr(
        module.fcntl, "lockf", lambda file, *how: (locked.add(os.fstat(file).st_ino), real_lock(file, *how))[1]
    )
    cache.set_slot(1, torch.ones(4, dtype=torch.int64))
    assert cache.get_slot(1) is not None
    assert held and locked and not held & locked


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_locks_of_a_file_of_their_own_exclude_other_processes_and_go_with_the_segment(name, apart):
    cache = SharedCache(1, 10, (4,), torch.int64, name=name)
    locks = segment_files.locks_path(segment_path(name))
    assert cache._segment.claim(5)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    asks = start("fork", slot_workers.claim_by_name, pickle.dumps(cache), 5, answers)
    assert answers.get(timeout=SECONDS) == [False, True]
    assert ended(asks) == 0
    assert locks.exists() and locks not in own_files()
    files = Path("/proc/self/fd")
    before = len(list(files.iterdir())) if files.is_dir() else None
    del cache
    assert not locks.exists() and not segment_path(name).exists()
    if before is not None:
        assert len(list(files.iterdir())) == before - 3  # that of the map too


def test_leftover_goes_with_its_locks(name, apart):
    path = segment_path(name)
    for left in (path, segment_files.locks_path(path)):
        left.write_bytes(b"")
    assert path.name in remove_leftovers()
    assert not path.exists() and not segment_files.locks_path(path).exists()


def test_suspected_deadlock_is_tried_again(name, monkeypatch):
    from quatcache.store import segment as module

    segment, _ = open_segment(name, 4096, lambda segment: None)
    real, calls = module.fcntl.lockf, []

    def lockf(descriptor, command, *place):
        calls.append(command)
        if len(calls) == 1:
            raise OSError(errno.EDEADLK, "Resource deadlock avoided")
        return real(descriptor, command, *place)

    monkeypatch.setattr(module.fcntl, "lockf", lockf)
    with segment.locked(1):
        pass
    assert calls == [module.fcntl.LOCK_EX, module.fcntl.LOCK_EX, module.fcntl.LOCK_UN]


def test_no_segment_of_these_tests_is_left():
    remove_leftovers()
    assert not [path for path in own_files() if f"test-{os.getpid()}" in path.name]
