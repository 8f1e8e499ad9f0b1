"""Shards whose rows are written while more of them are put: the same file in the end, or the whole one instead."""

import errno
import gc
import os
import threading
from concurrent.futures import wait

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from quatcache.errors import FormatError, StoreError
from quatcache.sequences import PaddedSequences
from quatcache.store import DiskStore, draft
from quatcache.store.draft import ShardDraft
from quatcache.store.files import checksum
from quatcache.store.shards import judge_alone
from quatcache.store.unfinished import is_temporary
from tests.store.test_disk import DIGEST, keys_of, shards

ROWS = torch.arange(64 * 6, dtype=torch.float32).reshape(64, 6)


def drafted(path, rows=ROWS, times=4):
    """Give a draft that was handed the beginning of some rows, in several pieces."""
    made = ShardDraft(path, step=1)
    for time in range(1, times):
        made.advance(rows[: len(rows) * time // times])
        if made._writing is not None:
            made._writing.result()
    return made


def temporary_in(folder):
    return [path for path in folder.iterdir() if is_temporary(path.name)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard-0123456789abcdef.safetensors"


def written(path, rows=ROWS):
    return {"keys": keys_of(*range(len(rows))), "values": rows}


class TestDraft:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int16])
    def test_file_is_what_safetensors_reads_and_what_its_checksum_says(self, path, dtype):
        rows = ROWS[:, :4].to(dtype).contiguous()
        tensors = {"keys": torch.from_numpy(keys_of(*range(64))), "values": rows}
        found = drafted(path, rows).finish(tensors, {"note": "ü"})
        assert found == (path.stat().st_size, checksum(path))
        read = load_file(path)
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"note": "ü"}
        assert temporary_in(path.parent) == []

    def test_rows_are_in_the_file_before_the_shard_is_finished(self, path):
        made = drafted(path)
        (temporary,) = temporary_in(path.parent)
        assert temporary.stat().st_size > ROWS.nbytes // 2 and not path.exists()
        made.discard()
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize(
        "rows",
        [ROWS.clone(), ROWS[:16], ROWS.to(torch.int32), ROWS.flip(0)],
        ids=["elsewhere in memory", "fewer", "of another dtype", "in another order"],
    )
    def test_rows_that_do_not_begin_with_those_handed_over_are_not_written(self, path, rows):
        made = drafted(path)
        assert made.finish({"keys": torch.zeros(len(rows), 2), "values": rows}, {}) is None
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("rows", [ROWS[:, :3].contiguous(), torch.ones(64, 2, dtype=torch.complex64)])
    def test_rows_after_which_keys_would_lie_askew_are_left_to_the_end(self, path, rows):
        made = drafted(path, rows)
        assert list(path.parent.iterdir()) == []
        assert made.finish({"values": rows}, {}) is None

    def test_header_without_room_is_left_to_the_end(self, path):
        assert drafted(path).finish({"values": ROWS}, {"long": "x" * draft.HEADER_ROOM}) is None
        assert list(path.parent.iterdir()) == []

    def test_nothing_is_written_behind_a_piece_that_could_not_be(self, path, monkeypatch):
        def full_once(*arguments):
            if not failed:
                failed.append(True)
                raise OSError(errno.ENOSPC, "No space left on device")
            append(*arguments)

        failed, append = [], draft._append
        monkeypatch.setattr(draft, "_append", full_once)
        made = ShardDraft(path, step=1)
        for stop in (16, 32, 48):  # there is space again after the first
            made.advance(ROWS[:stop])
            if made._writing is not None:
                wait([made._writing])
        assert failed and made.finish({"values": ROWS}, {}) is None
        assert list(path.parent.iterdir()) == []

    def test_draft_that_is_forgotten_leaves_nothing(self, path):
        made = drafted(path)
        assert temporary_in(path.parent)
        del made
        gc.collect()
        assert list(path.parent.iterdir()) == []

    def test_process_that_was_forked_leaves_the_file_of_the_other(self, path):
        made = drafted(path)
        child = os.fork()
        if not child:
            made.discard()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert made.finish({"values": ROWS}, {}) is not None and torch.equal(load_file(path)["values"], ROWS)

    def test_where_no_thread_can_be_started_the_shard_is_left_to_the_end(self, path, monkeypatch):
        def refuses(*args):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(draft.ThreadPoolExecutor, "submit", refuses)
        assert drafted(path).finish({"values": ROWS}, {}) is None
        assert list(path.parent.iterdir()) == []


def store_with_drafts(directory, shard_bytes=16 * 24):
    directory.mkdir(exist_ok=True)  # a fill makes it for its lock
    return DiskStore(directory, DIGEST, shard_bytes=shard_bytes)


def put_rows(store, start, stop):
    store.put_many(keys_of(*range(start, stop)), ROWS[start:stop])


def held_in(store):
    found = store.get_many(keys_of(*range(64)))
    return len(found.positions) == 64 and torch.equal(found.values, ROWS)


@pytest.fixture
def finished(monkeypatch):
    """Count shards that came of drafts, and shards that were written as a whole."""
    counts, finish = {"draft": 0, "whole": 0}, ShardDraft.finish

    def counted(self, *arguments):
        result = finish(self, *arguments)
        counts["whole" if result is None else "draft"] += 1
        return result

    monkeypatch.setattr(ShardDraft, "finish", counted)
    return counts


def test_store_writes_full_shards_while_they_are_put(tmp_path, finished):
    store = store_with_drafts(tmp_path / "store")
    for start in range(0, 64, 4):
        put_rows(store, start, start + 4)
    store.flush()
    assert finished == {"draft": 4, "whole": 0}
    assert held_in(store) and held_in(DiskStore(tmp_path / "store", DIGEST))
    assert temporary_in(tmp_path / "store") == []


def test_rows_stay_in_their_memory_though_the_first_batch_was_short(tmp_path, finished):
    store = store_with_drafts(tmp_path / "store", shard_bytes=40 * 24)
    for start, stop in ((0, 1), (1, 30), (30, 39), (39, 48)):  # the last one goes beyond the shard
        put_rows(store, start, stop)
    store.flush()
    assert finished == {"draft": 1, "whole": 0}


def test_shard_that_was_drafted_can_be_judged_alone(tmp_path, finished):
    store = store_with_drafts(tmp_path / "store")
    put_rows(store, 0, 32)
    put_rows(store, 32, 64)
    store.flush()
    for path in shards(tmp_path / "store"):
        entry, _ = judge_alone(path, DIGEST)
        assert entry in store.manifest.shards
    (tmp_path / "store" / "manifest.json").unlink()
    assert finished["draft"] == 2 and held_in(DiskStore(tmp_path / "store", DIGEST))


def test_small_commits_are_written_as_a_whole(tmp_path, finished):
    store = store_with_drafts(tmp_path / "store", shard_bytes=1 << 20)
    put_rows(store, 0, 64)
    store.flush()
    assert finished == {"draft": 0, "whole": 1} and held_in(DiskStore(tmp_path / "store", DIGEST))


def test_key_that_is_put_again_makes_a_shard_of_the_latest_rows(tmp_path, finished):
    store = store_with_drafts(tmp_path / "store", shard_bytes=1024)
    store.put_many(keys_of(*range(16)), -ROWS[:16])
    put_rows(store, 0, 64)
    store.flush()
    assert finished == {"draft": 0, "whole": 1}
    assert held_in(store) and held_in(DiskStore(tmp_path / "store", DIGEST))


def test_sequences_are_drafted_too(tmp_path, finished):
    store = store_with_drafts(tmp_path / "store", shard_bytes=64 * 24)
    values, mask = ROWS.reshape(8, 8, 6), torch.arange(8) < torch.arange(1, 9)[:, None]
    for start in range(0, 8, 2):
        part = slice(start, start + 2)
        store.put_many(keys_of(start, start + 1), PaddedSequences(values[part], mask[part].long()))
    store.flush()
    assert finished == {"draft": 1, "whole": 0}
    found = DiskStore(tmp_path / "store", DIGEST).get_many(keys_of(*range(8))).values
    assert torch.equal(found.values, values * mask[:, :, None]) and torch.equal(found.mask.bool(), mask)


def test_disk_that_fills_up_while_rows_are_put_is_told_at_the_commit_and_loses_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = store_with_drafts(tmp_path / "store", shard_bytes=1024)
    monkeypatch.setattr(draft, "_append", full)
    monkeypatch.setattr("quatcache.store.files.write_safetensors", full)
    put_rows(store, 0, 8)
    put_rows(store, 8, 40)
    with pytest.raises(StoreError, match="No space left"):
        put_rows(store, 40, 64)
        store.flush()
    assert temporary_in(tmp_path / "store") == [] == shards(tmp_path / "store")
    assert held_in(store) or store.missing(keys_of(*range(64))).tolist() == list(range(40, 64))
    monkeypatch.undo()
    put_rows(store, 40, 64)
    store.flush()
    assert held_in(store) and held_in(DiskStore(tmp_path / "store", DIGEST))


def test_device_that_loses_pages_of_a_draft_costs_no_row(tmp_path, monkeypatch, finished):
    def loses(descriptor):  # so does Linux: what could not be written back is dropped, and told once
        if threading.current_thread().name.startswith("quatcache-flush") and not lost:
            lost.append(True)
            os.pwrite(descriptor, bytes(512), draft.HEADER_ROOM)
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    lost, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", loses)
    store = store_with_drafts(tmp_path / "store", shard_bytes=1024)
    put_rows(store, 0, 40)
    put_rows(store, 40, 64)
    store.flush()
    assert lost and finished["whole"] >= 1
    assert held_in(store) and held_in(DiskStore(tmp_path / "store", DIGEST))


def test_rows_of_a_commit_that_failed_late_get_a_file_of_their_own(tmp_path, monkeypatch, finished):
    store = store_with_drafts(tmp_path / "store", shard_bytes=1024)
    with monkeypatch.context() as broken:
        broken.setattr("quatcache.store.commits.open_shard", missing_once := MissingOnce())
        put_rows(store, 0, 48)
        with pytest.raises(StoreError, match="disappeared"):
            store.settle()
    (committed,) = shards(tmp_path / "store")
    before = committed.read_bytes()
    put_rows(store, 48, 64)
    store.flush()
    assert missing_once.calls == 1 and finished == {"draft": 1, "whole": 1}
    assert committed.read_bytes() == before and len(shards(tmp_path / "store")) == 2
    assert held_in(store) and held_in(DiskStore(tmp_path / "store", DIGEST))


class MissingOnce:
    """Opens no shard, as where the directory was moved away just after a commit."""

    calls = 0

    def __call__(self, *arguments, **settings):
        self.calls += 1
        raise FormatError("is missing")


def test_draft_whose_directory_disappears_does_not_make_it_again(tmp_path):
    store = store_with_drafts(tmp_path / "store", shard_bytes=1024)
    put_rows(store, 0, 48)
    store.flush()
    put_rows(store, 48, 56)
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="disappeared"):
        store.flush()
    assert not (tmp_path / "store").exists()
    (tmp_path / "moved").rename(tmp_path / "store")
    put_rows(store, 56, 64)
    store.flush()
    assert held_in(DiskStore(tmp_path / "store", DIGEST))


def test_rows_whose_encoder_was_changed_leave_the_disk(tmp_path):
    store = store_with_drafts(tmp_path / "store", shard_bytes=1024)
    put_rows(store, 0, 16)
    put_rows(store, 16, 32)

    def changed():
        raise StoreError("changed")

    store.before_commit = changed
    with pytest.raises(StoreError, match="changed"):
        store.flush()
    assert list((tmp_path / "store").iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int8]),
    shard_bytes=st.integers(1, 400),
)
def test_every_row_comes_back_whatever_is_put(tmp_path_factory, sizes, width, dtype, shard_bytes):
    store = store_with_drafts(tmp_path_factory.mktemp("store"), shard_bytes)
    rows = torch.randint(-9, 9, (sum(sizes), width)).to(dtype)
    place = 0
    for size in sizes:
        store.put_many(keys_of(*range(place, place + size)), rows[place : place + size])
        place += size
    store.flush()
    for reader in (store, DiskStore(store.directory, DIGEST)):
        found = reader.get_many(keys_of(*range(place)))
        assert len(found.positions) == place and (not place or torch.equal(found.values, rows))
