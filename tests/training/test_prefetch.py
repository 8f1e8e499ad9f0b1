"""Pages that are read ahead of the step: no batch changes, and no thread stays, however an epoch ends."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, WeightedRandomSampler

from quatcache import CacheConfig, CacheType
from quatcache.store import DiskStore
from quatcache.training import prefetch
from quatcache.training.prefetch import AHEAD, CALM, PROBE, PageReader
from tests.fits import Failing, Model, Texts, fit, loader, same_run, texts
from tests.training.test_unfreezing import Thawable, ThawsAtStep


def reading():
    return [thread for thread in threading.enumerate() if thread.name.startswith("quatcache-pages")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    assert not reading()
    yield
    assert not reading()


@pytest.fixture
def touched(monkeypatch):
    """The rows that were touched, by call; every page counts as read from the disk."""
    calls = []
    touch = DiskStore.touch

    def note(store, rows):
        calls.append(rows.tolist())
        touch(store, rows)

    monkeypatch.setattr(DiskStore, "touch", note)
    monkeypatch.setattr(prefetch, "CALM", 10**9)
    return calls


def run(cache, callbacks=(), data=None, epochs=2, **settings):
    model = Model({"default": Thawable()}, cache)
    train = data or loader(Texts(texts(60)), shuffle=True)
    fit(model, train, loader(Texts(texts(10))), callbacks=list(callbacks), max_epochs=epochs, **settings)
    return model


def on_disk(tmp_path, **settings):
    return CacheConfig(CacheType.DISK, save_dir=tmp_path, **settings)


def test_losses_are_those_without(tmp_path, touched, monkeypatch):
    ahead = run(on_disk(tmp_path))
    assert touched
    del touched[:]
    monkeypatch.setattr(prefetch, "AHEAD", 0)
    assert same_run(ahead, run(on_disk(tmp_path)))
    assert not touched
    assert same_run(ahead, run(None))


def test_rows_of_several_shards_are_touched(tmp_path, touched, monkeypatch):
    monkeypatch.setattr("quatcache.store.disk.SHARD_BYTES", 1000)
    assert same_run(run(on_disk(tmp_path, dtype="float16")), run(CacheConfig(dtype="float16")))
    assert {row for rows in touched for row in rows} <= set(range(60)) and touched


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(CacheType.CPU), None])
def test_rows_in_memory_start_no_thread(touched, cache):
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, *args):
            seen.extend(reading())

    run(cache, [Looks()])
    assert not touched and not seen


def test_nothing_is_drawn_ahead_for_a_sampler_that_draws_as_it_goes(tmp_path, touched):
    def weighted():
        return loader(Texts(texts(60)), sampler=WeightedRandomSampler([1.0] * 60, 60))

    models = []
    for cache in (None, on_disk(tmp_path)):
        models.append(Model({"default": Thawable()}, cache))
        fit(models[-1], weighted)
    assert same_run(*models)
    assert not touched


class Watches(Callback):
    """Notes the threads that read while steps are done, and those that are left when a whole epoch has ended."""

    def __init__(self, whole):
        self.whole, self.within, self.after = whole, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.within.extend(reading())

    def on_train_epoch_end(self, trainer, pl_module):
        for thread in reading() if self.whole else ():
            thread.join(30)  # they were told to end when the last batch was
            self.after.extend([thread] * thread.is_alive())


@pytest.mark.parametrize("ending", ["epochs", "break", "error", "ctrl-c", "aside"])
def test_threads_end_however_the_epoch_does(tmp_path, touched, ending):
    watches = Watches(ending == "epochs")
    settings = {"limit_train_batches": 3} if ending == "break" else {}
    error = {"error": RuntimeError("boom"), "ctrl-c": KeyboardInterrupt()}.get(ending)
    callbacks = [watches, *([Failing(error)] if error else []), *([ThawsAtStep(2)] if ending == "aside" else [])]
    handler = signal.getsignal(signal.SIGINT)
    try:
        run(on_disk(tmp_path), callbacks, epochs=2, **settings)
    except (RuntimeError, SystemExit):
        assert error is not None
    finally:
        signal.signal(signal.SIGINT, handler)
    assert watches.within and not watches.after


def test_stepping_aside_in_the_middle_of_an_epoch_ends_the_threads_at_once(tmp_path, touched):
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(bool(reading()))

    data = loader(Texts(texts(160)), shuffle=True)  # so many that threads would go on reading
    ahead = run(on_disk(tmp_path), [ThawsAtStep(3), Looks()], data, epochs=1)
    assert seen[0] and not any(seen[3:])
    assert same_run(ahead, run(None, [ThawsAtStep(3)], data, epochs=1))


def test_an_error_in_a_thread_changes_nothing_and_one_in_the_step_is_told(tmp_path, monkeypatch, touched):
    plain = run(None)

    def fails(store, rows):
        touched.append(rows)
        raise OSError("no such page")

    monkeypatch.setattr(DiskStore, "touch", fails)
    assert same_run(plain, run(on_disk(tmp_path)))
    assert touched
    gather, calls = DiskStore.gather, []

    def fails_later(store, rows, device=None):
        calls.append(rows)
        if len(calls) == 5:
            raise OSError("the disk is gone")
        return gather(store, rows, device)

    monkeypatch.setattr(DiskStore, "gather", fails_later)
    with pytest.raises(OSError, match="the disk is gone"):
        run(on_disk(tmp_path))


def test_workers_that_are_forked_beside_the_threads_do_their_work(tmp_path, touched):
    sums = []

    class Forks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                assert reading()
                sums.append(sum(int(part.sum()) for part in DataLoader(range(10), batch_size=5, num_workers=2)))

    run(on_disk(tmp_path), [Forks()], epochs=2)
    assert sums == [45, 45]


class AtOnce:
    """Does what a pool of threads is given when it is given."""

    def __init__(self, *args, **kwargs):
        pass

    def submit(self, work, *args):
        work(*args)

    def shutdown(self, **kwargs):
        pass


def indices(count):
    return list(torch.arange(count).split(1))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", AtOnce)


def read_epoch(count, reads):
    done = []
    with PageReader(lambda batch: done.append(int(batch)), reads) as pages:
        for begun in range(1, count + 1):
            pages.read_ahead(indices(count), begun)
            assert max(done) < begun + AHEAD  # bounded
    return done


def test_each_batch_is_touched_once_and_before_its_step_while_pages_come_from_the_disk(at_once):
    counts = iter(range(10**6))
    assert read_epoch(100, lambda: next(counts)) == list(range(1, 100))


def test_where_the_system_does_not_count_reads_all_are_touched(at_once):
    assert read_epoch(100, lambda: None) == list(range(1, 100))


def test_while_all_pages_are_in_memory_few_batches_are_touched(at_once):
    done = read_epoch(200, lambda: 0)
    assert done[:CALM] == list(range(1, CALM + 1))
    assert done[CALM:] == list(range(-(-(CALM + 1) // PROBE) * PROBE, 200, PROBE))


def test_one_read_from_the_disk_has_all_touched_again(at_once):
    done = []
    disk = iter([0] * (2 * CALM + 2) + list(range(1, 10**6)))
    with PageReader(lambda batch: done.append(int(batch)), lambda: next(disk)) as pages:
        for begun in range(1, 101):
            pages.read_ahead(indices(100), begun)
    assert done[-20:] == list(range(80, 100))


def test_a_batch_that_the_step_has_begun_is_left(monkeypatch):
    waiting = []

    class Later(AtOnce):
        def submit(self, work, *args):
            waiting.append((work, args))

    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", Later)
    done = []
    with PageReader(lambda batch: done.append(int(batch)), lambda: None) as pages:
        pages.read_ahead(indices(10), 1)
        pages.read_ahead(indices(10), 4)
        for work, args in waiting:
            work(*args)
    assert done == [4, 5, 6, 7]
