"""Commits in the background: rows go on being put and found while those before them are written."""

import _thread
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatcache.errors import NotFrozenError, StoreError
from quatcache.store import DiskStore, commits
from tests.store.test_disk import DIGEST, held, keys_of, put, shards


@pytest.fixture
def slow(monkeypatch):
    """Let no shard be written before the test permits it."""
    permitted, write_shard = threading.Event(), commits.write_shard

    def waiting(*arguments, **settings):
        assert permitted.wait(60)
        return write_shard(*arguments, **settings)

    monkeypatch.setattr(commits, "write_shard", waiting)
    yield permitted
    permitted.set()


@pytest.fixture
def full(monkeypatch):
    """Have a disk that is full while the set that is given has something in it."""
    trouble, write_shard = {"full"}, commits.write_shard

    def failing(*arguments, **settings):
        if trouble:
            raise StoreError("the disk is full")
        return write_shard(*arguments, **settings)

    monkeypatch.setattr(commits, "write_shard", failing)
    return trouble


@pytest.fixture
def interruptible():
    """Have Ctrl-C raise KeyboardInterrupt, also in a worker of pytest-xdist, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def shard_of_two(directory):
    return DiskStore(directory, DIGEST, shard_bytes=16)


def test_rows_are_put_and_found_while_others_are_written(tmp_path, slow):
    store = shard_of_two(tmp_path)
    put(store, 1, 2)
    put(store, 3)
    assert shards(tmp_path) == [] and store.pending == 3 and len(store) == 3
    assert store.row_shape == (2,) and store.given_dtype == torch.float32 and store.nbytes == 24
    assert held(store, 3, 1, 4, 2) == [3, 1, 2]
    numbers = store.rows_of(keys_of(1, 2, 3))
    slow.set()
    store.flush()
    assert store.pending == 0 and store.rows_of(keys_of(1, 2, 3)).tolist() == numbers.tolist()
    assert held(store, 1, 2, 3) == held(DiskStore(tmp_path, DIGEST), 1, 2, 3) == [1, 2, 3]
    assert len(shards(tmp_path)) == 2


def test_rows_of_another_kind_are_refused_while_the_first_are_written(tmp_path, slow):
    store = shard_of_two(tmp_path)
    put(store, 1, 2)
    with pytest.raises(ValueError, match="holds rows of shape"):
        store.put_many(keys_of(3), torch.ones(1, 5))
    slow.set()
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 2, 3) == [1, 2]


def test_what_fails_in_the_background_is_told_at_the_next_put_and_loses_nothing(tmp_path, full):
    store = shard_of_two(tmp_path)
    put(store, 1, 2)
    numbers = store.rows_of(keys_of(1, 2)).tolist()
    for thread in threading.enumerate():
        if thread.name.startswith("quatcache-commit"):
            thread.join()
    with pytest.raises(StoreError, match="the disk is full"):
        put(store, 3)
    with pytest.raises(StoreError, match="the disk is full"):
        store.flush()
    assert held(store, 1, 2, 3) == [1, 2, 3] and shards(tmp_path) == []
    full.clear()
    store.flush()
    assert store.rows_of(keys_of(1, 2)).tolist() == numbers
    assert held(store, 1, 2, 3) == held(DiskStore(tmp_path, DIGEST), 1, 2, 3) == [1, 2, 3]


def test_marks_and_refreshes_come_after_what_is_being_written(tmp_path, slow):
    store = shard_of_two(tmp_path)
    put(store, 1, 2)
    threading.Timer(0.01, slow.set).start()
    store.mark_encoded(2, 1.5)
    store.flush()
    assert store.manifest.effort == (2, 1.5)
    assert DiskStore(tmp_path, DIGEST).manifest.effort == (2, 1.5) and held(DiskStore(tmp_path, DIGEST), 1, 2) == [1, 2]
    other = shard_of_two(tmp_path)
    put(other, 5, 6)
    other.flush()
    put(store, 3, 4)
    assert store.refresh() and held(store, *range(8)) == [1, 2, 3, 4, 5, 6]


def test_interrupt_while_a_commit_is_awaited_loses_nothing(tmp_path, monkeypatch, interruptible):
    ready, write_shard = threading.Event(), commits.write_shard

    def interrupting(*arguments, **settings):
        assert ready.wait(60)
        _thread.interrupt_main()
        return write_shard(*arguments, **settings)

    store = shard_of_two(tmp_path)
    monkeypatch.setattr(commits, "write_shard", interrupting)
    with pytest.raises(KeyboardInterrupt):
        put(store, 1, 2)
        put(store, 3)
        ready.set()
        store.flush()
        threading.Event().wait(60)  # it may come a moment after
    monkeypatch.setattr(commits, "write_shard", write_shard)
    store.flush()
    assert held(store, 1, 2, 3) == held(DiskStore(tmp_path, DIGEST), 1, 2, 3) == [1, 2, 3]


def test_rows_are_not_written_once_the_encoder_was_changed(tmp_path, slow):
    store = shard_of_two(tmp_path)
    put(store, 1, 2)

    def refuse():
        raise NotFrozenError("it was changed")

    store.before_commit = refuse
    slow.set()
    with pytest.raises(NotFrozenError):
        put(store, 3, 4)
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 2, 3, 4) == [1, 2]


def test_where_no_thread_can_be_started_rows_are_written_at_once(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    store = shard_of_two(tmp_path)
    put(store, 1, 2)
    assert len(shards(tmp_path)) == 1
    put(store, 3)
    store.flush()
    assert held(store, 1, 2, 3) == held(DiskStore(tmp_path, DIGEST), 1, 2, 3) == [1, 2, 3]


@settings(deadline=None, max_examples=40)
@given(
    puts=st.lists(st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=4), min_size=1, max_size=12),
    troubled=st.sets(st.integers(0, 11)),
)
def test_every_key_has_its_latest_row_whatever_is_being_written_or_fails(tmp_path_factory, puts, troubled):
    directory, step = tmp_path_factory.mktemp("store"), 0
    write_shard, fails = commits.write_shard, threading.Event()

    def sometimes(*arguments, **settings):
        if fails.is_set():
            raise StoreError("the disk is full")
        return write_shard(*arguments, **settings)

    latest, numbered = {}, {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(commits, "write_shard", sometimes)
        store = DiskStore(directory, DIGEST, shard_bytes=24)
        for step, names in enumerate(puts):
            fails.set() if step in troubled else fails.clear()
            values = torch.tensor([[float(name), float(step)] for name in names])
            try:
                store.put_many(keys_of(*names), values)
            except StoreError as error:
                assert str(error) == "the disk is full"
            for name, value in zip(names, values, strict=True):
                latest[name] = value
                numbered[int(store.rows_of(keys_of(name))[0])] = value
            found = store.get_many(keys_of(*latest))
            assert len(found.positions) == len(latest) and torch.equal(found.values, torch.stack([*latest.values()]))
        fails.clear()
        store.flush()
    assert torch.equal(store.gather(torch.tensor([*numbered])), torch.stack([*numbered.values()]))
    for opened in (store, DiskStore(directory, DIGEST)):
        assert torch.equal(opened.get_many(keys_of(*latest)).values, torch.stack([*latest.values()]))
