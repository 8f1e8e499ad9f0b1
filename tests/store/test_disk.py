"""The disk store: what is committed stays, what is damaged is left out and filled again, and others may write too."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quatcache.errors import EncoderOutputError, FormatError, StoreError
from quatcache.keys import content_keys
from quatcache.read_through import read_through
from quatcache.store import DiskStore
from quatcache.store import disk as disk_module
from quatcache.store import shards as shards_module
from quatcache.store.files import checksum
from quatcache.store.manifest import MANIFEST_NAME, Manifest
from tests.stores_for_tests import DIGEST, Clock, sealed

OTHER_DIGEST = "f" * 32


def keys_of(*names):
    return content_keys([str(name) for name in names])


def rows_of(*numbers):
    return torch.tensor([[float(number), -float(number)] for number in numbers])


def put(store, *numbers):
    store.put_many(keys_of(*numbers), rows_of(*numbers))


def commit(directory, *numbers, **options):
    """Commit one shard, and give its path."""
    before = set(shards(directory))
    store = DiskStore(directory, DIGEST, **options)
    put(store, *numbers)
    store.flush()
    (path,) = set(shards(directory)) - before
    return path


def shards(directory):
    return sorted(directory.glob("shard-*.safetensors"))


def held(store, *numbers):
    """The numbers that the store has, each checked to have its own row."""
    found = store.get_many(keys_of(*numbers))
    names = [numbers[position] for position in found.positions.tolist()]
    assert len(found.values) == len(names) and (not names or torch.equal(found.values, rows_of(*names)))
    return names


def edit_manifest(directory, change):
    path = directory / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(sealed(content)))


def refill(directory, *numbers):
    """Read all numbers through a store; give those that had to be computed."""
    store, computed = DiskStore(directory, DIGEST), []

    def compute(positions):
        names = [numbers[position] for position in positions.tolist()]
        computed.extend(names)
        return rows_of(*names)

    answer = read_through(keys_of(*numbers), compute, store)
    assert torch.equal(answer, rows_of(*numbers))
    store.flush()
    return computed


# Committing ----------------------------------------------------------------------------------------------------------


def test_nothing_is_made_before_the_first_commit(tmp_path):
    store = DiskStore(tmp_path / "rows", DIGEST)
    store.get_many(keys_of(1))
    store.flush()
    assert list(tmp_path.iterdir()) == []
    put(store, 1)
    store.flush()
    assert len(shards(tmp_path / "rows")) == 1


def test_rows_are_there_when_the_store_is_opened_again(tmp_path):
    commit(tmp_path, 1, 2)
    commit(tmp_path, 3)
    store = DiskStore(tmp_path, DIGEST)
    assert len(store) == 3 and store.row_shape == (2,) and store.nbytes == 24
    assert held(store, 3, 9, 1, 2) == [3, 1, 2]


def test_uncommitted_rows_are_not_there_when_opened_again(tmp_path):
    put(DiskStore(tmp_path, DIGEST), 1)
    assert len(DiskStore(tmp_path, DIGEST)) == 0


def test_shard_is_readable_with_safetensors_alone(tmp_path):
    tensors = load_file(commit(tmp_path, 1, 2))
    assert torch.equal(tensors["keys"], torch.from_numpy(keys_of(1, 2)))
    assert torch.equal(tensors["values"], rows_of(1, 2))


def test_shard_is_committed_when_it_is_full(tmp_path):
    store = DiskStore(tmp_path, DIGEST, shard_bytes=32)  # four rows of eight bytes
    put(store, 1, 2, 3)
    assert shards(tmp_path) == []
    put(store, 4)
    store.settle()
    assert len(shards(tmp_path)) == 1
    put(store, 5, 6, 7)
    store.settle()
    assert len(shards(tmp_path)) == 1 and held(DiskStore(tmp_path, DIGEST), *range(9)) == [1, 2, 3, 4]


def test_storage_dtype_counts_for_the_size_of_a_shard(tmp_path):
    store = DiskStore(tmp_path, DIGEST, shard_bytes=32, dtype=torch.float16)
    put(store, 1, 2, 3, 4)
    store.settle()
    assert shards(tmp_path) == []


def test_rows_are_committed_when_time_has_passed(tmp_path):
    clock = Clock()
    store = DiskStore(tmp_path, DIGEST, commit_seconds=30, time_func=clock)
    clock.now = 100.0  # the store was open and idle: no reason to hurry
    put(store, 1)
    clock.now = 129.0
    put(store, 2)
    assert shards(tmp_path) == []
    clock.now = 130.0
    put(store, 3)
    store.settle()
    assert len(shards(tmp_path)) == 1
    clock.now = 159.0  # the time runs from the first row of the next shard
    put(store, 4)
    clock.now = 188.0
    put(store, 5)
    assert len(shards(tmp_path)) == 1


def test_row_numbers_stay_over_commits(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    put(store, 1, 2)
    numbers = store.rows_of(keys_of(2, 1)).tolist()
    store.flush()
    put(store, 3)
    later = store.rows_of(keys_of(3)).tolist()
    assert store.rows_of(keys_of(2, 1, 3)).tolist() == numbers + later
    store.flush()
    assert store.rows_of(keys_of(2, 1, 3)).tolist() == numbers + later
    assert torch.equal(store.gather(torch.tensor(numbers + later)), rows_of(2, 1, 3))


def test_rows_are_gathered_from_shards_and_uncommitted_rows_at_once(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    for batch in ((1, 2), (3,), (4, 5, 6)):
        put(store, *batch)
        store.flush()
    put(store, 7, 8)
    order = [8, 1, 6, 3, 7, 2, 4, 5, 3, 8]
    numbers = torch.from_numpy(store.rows_of(keys_of(*order)))
    assert torch.equal(store.gather(numbers), rows_of(*order))
    assert store.gather(numbers[:0]).shape == (0, 2)


def test_replaced_key_has_its_new_row_from_then_on(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    put(store, 1, 2)
    store.flush()
    old = store.rows_of(keys_of(1))
    store.put_many(keys_of(1), rows_of(9))
    for opened in (store, DiskStore(tmp_path, DIGEST)):
        expected = rows_of(9) if opened is store else rows_of(1)  # not yet committed
        assert torch.equal(opened.get_many(keys_of(1)).values, expected)
    store.flush()
    assert torch.equal(DiskStore(tmp_path, DIGEST).get_many(keys_of(1, 2)).values, rows_of(9, 2))
    assert torch.equal(store.gather(torch.from_numpy(old)), rows_of(1))  # a number that was given out keeps its row
    assert len(store) == len(DiskStore(tmp_path, DIGEST)) == 2


@given(
    puts=st.lists(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=4), min_size=1, max_size=5),
    flushed=st.lists(st.booleans(), min_size=5, max_size=5),
    reopened=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_loading_into_memory_keeps_row_numbers(tmp_path_factory, puts, flushed, reopened):
    directory = tmp_path_factory.mktemp("rows")
    store, model = DiskStore(directory, DIGEST, dtype=torch.float16), {}
    for turn, names in enumerate(puts):  # names come again with other rows
        store.put_many(keys_of(*names), rows_of(*(10 * turn + name for name in names)))
        model.update({name: 10 * turn + name for name in names})
        if flushed[turn]:
            store.flush()
    if reopened:
        store.flush()
        store = DiskStore(directory, DIGEST)
    keys = keys_of(*model)
    numbers = store.rows_of(keys)
    loaded = store.load()
    assert loaded.rows_of(keys).tolist() == numbers.tolist() == store.rows_of(keys).tolist()
    for opened in (store, loaded):
        assert torch.equal(opened.gather(torch.from_numpy(numbers)), rows_of(*model.values()))
    assert loaded.rows.dtype == torch.float16 and len(loaded) == len(model)


def test_loading_an_empty_store_gives_one_that_can_be_filled(tmp_path):
    loaded = DiskStore(tmp_path, DIGEST, dtype=torch.float16).load()
    assert loaded.row_shape is None
    put(loaded, 1)
    assert held(loaded, 1, 2) == [1] and loaded.nbytes == 4


def test_storage_dtype_is_kept_and_widened_after_opening_again(tmp_path):
    third = torch.full((1, 2), 1 / 3)
    store = DiskStore(tmp_path, DIGEST, dtype=torch.bfloat16)
    store.put_many(keys_of("a"), third)
    store.flush()
    assert load_file(shards(tmp_path)[0])["values"].dtype == torch.bfloat16
    again = DiskStore(tmp_path, DIGEST, dtype=torch.bfloat16)
    again.put_many(keys_of("b"), third)
    got = again.get_many(keys_of("a", "b")).values  # from a shard and from memory: alike
    assert got.dtype == torch.float32 and torch.equal(got, third.bfloat16().float().repeat(2, 1))


def test_store_holds_one_kind_of_rows_for_ever(tmp_path):
    commit(tmp_path, 1)
    store = DiskStore(tmp_path, DIGEST)
    for other in (torch.ones(1, 3), torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.int64)):
        with pytest.raises(FormatError, match=r"holds rows of shape \(2,\) and torch\.float32, the encoder gave"):
            store.put_many(keys_of(2), other)
    assert held(store, 1, 2) == [1]
    put(store, 2)
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 2) == [1, 2]


def test_rows_that_another_process_made_impossible_are_refused_at_the_commit(tmp_path):
    late = DiskStore(tmp_path, DIGEST)
    late.put_many(keys_of(5), torch.ones(1, 3))
    commit(tmp_path, 1)
    with pytest.raises(FormatError, match="delete its directory"):
        late.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 5) == [1]


# Packing -----------------------------------------------------------------------------------------------------------


def small_shards(directory, count, **options):
    store = DiskStore(directory, DIGEST, shard_bytes=1 << 20, **options)
    for number in range(count):
        put(store, number)
        store.flush()
    return store


def test_many_small_shards_become_one_and_every_row_stays(tmp_path):
    store = small_shards(tmp_path, 9)
    numbers = store.rows_of(keys_of(*range(9))).tolist()
    reader = DiskStore(tmp_path, DIGEST)
    store.compact()
    assert len(shards(tmp_path)) == 1
    assert store.rows_of(keys_of(*range(9))).tolist() == numbers
    for known in (store, reader, DiskStore(tmp_path, DIGEST)):
        assert held(known, *range(10)) == list(range(9)) and len(known) == 9
    put(store, 9)
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), *range(11)) == list(range(10))
    assert reader.refresh() and held(reader, *range(10)) == list(range(10)) and reader.nbytes == 80
    assert not store.refresh() and store.nbytes == 80


def test_few_small_shards_and_big_ones_are_left_alone(tmp_path):
    small_shards(tmp_path, 7).compact()
    assert len(shards(tmp_path)) == 7
    before = shards(tmp_path)
    DiskStore(tmp_path, DIGEST, shard_bytes=2).compact()  # what is left is big then
    assert shards(tmp_path) == before


def test_packed_shard_has_the_latest_row_of_a_key_that_was_put_again(tmp_path):
    store = small_shards(tmp_path, 8)
    store.put_many(keys_of(3), rows_of(33))
    store.flush()
    store.compact()
    assert len(shards(tmp_path)) == 1 and len(load_file(shards(tmp_path)[0])["keys"]) == 8
    assert DiskStore(tmp_path, DIGEST).get_many(keys_of(3)).values.tolist() == rows_of(33).tolist()


def test_packing_leaves_a_run_with_a_damaged_shard_for_the_next_fill(tmp_path, caplog):
    store = small_shards(tmp_path, 9)
    flip_a_value(shards(tmp_path)[4], None)
    store.compact()
    assert len(shards(tmp_path)) == 9 and shards(tmp_path)[4].name in caplog.text
    assert len(refill(tmp_path, *range(9))) == 1


def test_packing_that_cannot_write_leaves_everything_as_it_was(tmp_path, monkeypatch):
    store = small_shards(tmp_path, 9)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quatcache.store.files.write_safetensors", full)
    with pytest.raises(StoreError, match="No space left"):
        store.compact()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reader_that_had_read_the_manifest_before_a_packing_reads_it_again(tmp_path, monkeypatch):
    store = small_shards(tmp_path, 9)
    real, reads = disk_module.mended_manifest, []

    def packed_meanwhile(directory, expected):
        manifest = real(directory, expected)
        if not reads:
            reads.append(manifest)
            store.compact()
        return manifest

    monkeypatch.setattr(disk_module, "mended_manifest", packed_meanwhile)
    assert held(DiskStore(tmp_path, DIGEST), *range(9)) == list(range(9)) and len(reads[0].shards) == 9


def test_packing_takes_the_rows_of_others_along(tmp_path):
    store = small_shards(tmp_path, 8)
    commit(tmp_path, 8)
    store.compact()
    assert len(shards(tmp_path)) == 1 and held(store, *range(9)) == list(range(8))
    assert store.refresh() and held(store, *range(9)) == list(range(9))


def test_store_that_reads_shards_whole_maps_none(tmp_path, monkeypatch):
    commit(tmp_path, 1, 2)
    commit(tmp_path, 3, dtype=None)

    def refuse(*args):
        raise AssertionError("mapped")

    monkeypatch.setattr("quatcache.store.shards.open_tensors", refuse)
    store = DiskStore(tmp_path, DIGEST, memory_map=False)
    assert held(store, 1, 2, 3) == [1, 2, 3]
    loaded = store.load()
    assert held(loaded, 1, 2, 3) == [1, 2, 3] and held(store, 1, 2, 3) == [1, 2, 3]
    pointers = {shard.untyped_storage().data_ptr() for shard in store._placed.parts}
    assert pointers == {loaded.rows.untyped_storage().data_ptr()}, "rows are held twice"


@pytest.mark.parametrize("memory_map", [True, False])
def test_both_ways_of_reading_refuse_the_same_damage(tmp_path, caplog, memory_map):
    for number, damage in enumerate(DAMAGES):
        directory = tmp_path / str(number)
        one, other = commit(directory, 1, 2, 3), commit(directory, 4, 5, 6)
        damage(one, other)
        caplog.clear()
        expected = [] if damage is swap else [4, 5, 6]
        assert held(DiskStore(directory, DIGEST, memory_map=memory_map), *range(7)) == expected, damage.__name__
        assert one.name in caplog.text


# Crashes -----------------------------------------------------------------------------------------------------------


def test_kill_between_shard_and_manifest_leaves_an_orphan_that_nobody_reads(tmp_path, monkeypatch):
    commit(tmp_path, 1)

    def killed(self, directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", killed)
        store = DiskStore(tmp_path, DIGEST)
        put(store, 2)
        with pytest.raises(KeyboardInterrupt):
            store.flush()
    assert len(shards(tmp_path)) == 2
    assert held(DiskStore(tmp_path, DIGEST), 1, 2) == [1]
    store.flush()  # the process lives on: its rows were not lost
    assert held(DiskStore(tmp_path, DIGEST), 1, 2) == [1, 2] and held(store, 1, 2) == [1, 2]


@pytest.mark.parametrize("harm", ["gone", "empty", "flipped", "other kind", "no object"])
def test_manifest_that_was_damaged_or_lost_is_made_again_from_its_shards(tmp_path, caplog, harm):
    facts = {"facts": {"pooling": "mean"}, "environment": {"torch": "2.13"}}
    for numbers in ((1, 2), (3,), (2,)):
        commit(tmp_path, *numbers, dtype=torch.float16, **facts)
    path = tmp_path / MANIFEST_NAME
    whole = Manifest.read(tmp_path)
    if harm == "gone":
        path.unlink()
    else:
        text = path.read_text()
        changed = {"empty": "", "flipped": text.replace("mean", "meaN"), "no object": "[]"}
        path.write_text(changed.get(harm, text.replace('"quatcache"', '"quetcache"')))
    with caplog.at_level(logging.WARNING, "quatcache"):
        store = DiskStore(tmp_path, DIGEST, dtype=torch.float16, **facts)
    assert held(store, 1, 2, 3) == [1, 2, 3] and store.given_dtype is torch.float32
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text and "made again" in caplog.text
    assert Manifest.read(tmp_path) == replace(whole, environment={}, created=Manifest.read(tmp_path).created)
    caplog.clear()
    assert held(DiskStore(tmp_path, DIGEST, dtype=torch.float16), 1, 2, 3) == [1, 2, 3] and not caplog.records


def test_manifest_made_again_leaves_out_damaged_and_foreign_shards(tmp_path, caplog):
    good, bad, foreign = (commit(tmp_path / "one", number) for number in (1, 2, 3))
    flip_a_value(bad, None)
    other = DiskStore(tmp_path / "other", OTHER_DIGEST)
    put(other, 3)
    other.flush()
    foreign.write_bytes(shards(tmp_path / "other")[0].read_bytes())
    (tmp_path / "one" / MANIFEST_NAME).unlink()
    assert held(DiskStore(tmp_path / "one", DIGEST), 1, 2, 3) == [1]
    assert bad.name in caplog.text and foreign.name in caplog.text and good.name not in caplog.text
    assert refill(tmp_path / "one", 1, 2, 3) == [2, 3]


def test_commit_onto_a_manifest_that_was_damaged_meanwhile_loses_nothing(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    for number in (1, 2):
        put(store, number)
        store.flush()
        (tmp_path / MANIFEST_NAME).write_text("{")
    put(store, 3)
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 2, 3) == [1, 2, 3]


def test_rows_behind_a_lost_manifest_are_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    (tmp_path / MANIFEST_NAME).unlink()

    def refuse(path):
        raise StoreError("read-only")

    monkeypatch.setattr("quatcache.store.recovery.locked", refuse)
    assert held(DiskStore(tmp_path, DIGEST), 1) == [1] and not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipe_in_place_of_the_manifest_is_damage_and_does_not_wait(tmp_path):
    commit(tmp_path, 1)
    (tmp_path / MANIFEST_NAME).unlink()
    os.mkfifo(tmp_path / MANIFEST_NAME)
    assert held(DiskStore(tmp_path, DIGEST), 1) == [1]
    assert (tmp_path / MANIFEST_NAME).is_file() and Manifest.read(tmp_path).rows == 1


@pytest.mark.parametrize("name", ["shard", "table"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipe_in_place_of_a_shard_is_damage_and_does_not_wait(tmp_path, name):
    path = commit(tmp_path, 1)
    path.unlink()
    os.mkfifo(path)
    if name == "shard":
        edit_manifest(tmp_path, lambda content: content["shards"][0].update(bytes=0))
    else:
        (tmp_path / MANIFEST_NAME).unlink()
    assert held(DiskStore(tmp_path, DIGEST), 1) == []


@pytest.mark.parametrize("trouble", [MemoryError("none left"), RuntimeError("mmap failed")])
def test_shortage_is_no_damage(tmp_path, monkeypatch, trouble):
    commit(tmp_path, 1)

    def fail(*args, **kwargs):
        raise trouble

    with monkeypatch.context() as patched:
        patched.setattr("quatcache.store.files.safe_open", fail)
        with pytest.raises(StoreError, match=r"cannot read .*; free memory or raise its limit"):
            DiskStore(tmp_path, DIGEST)
        patched.setattr("quatcache.store.files.safe_open", lambda *a, **k: fail_as_safetensors())
        with pytest.raises(StoreError, match="too many files may be open; raise that limit"):
            DiskStore(tmp_path, DIGEST)
    assert held(DiskStore(tmp_path, DIGEST), 1) == [1]


def fail_as_safetensors():
    raise FileNotFoundError("No such file or directory")  # which it says of whatever goes wrong


def test_shard_that_was_out_of_sight_for_a_moment_is_kept(tmp_path):
    path = commit(tmp_path, 1)
    path.rename(tmp_path / "away")
    store = DiskStore(tmp_path, DIGEST)
    assert held(store, 1) == []
    (tmp_path / "away").rename(path)
    put(store, 2)
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 2) == [1, 2]
    assert store.refresh() and held(store, 1, 2) == [1, 2]


def test_rows_of_a_packed_shard_are_not_held_twice(tmp_path):
    reader_of = small_shards(tmp_path, 4)
    for number in range(4, 12):
        put(other := DiskStore(tmp_path, DIGEST), number)
        other.flush()
    DiskStore(tmp_path, DIGEST, shard_bytes=1 << 20).compact()
    assert reader_of.refresh() and reader_of.nbytes == 12 * 8 and held(reader_of, *range(12)) == list(range(12))


def test_newer_manifest_is_no_damage(tmp_path):
    commit(tmp_path, 1)
    edit_manifest(tmp_path, lambda content: content.update(version=3))
    with pytest.raises(FormatError, match="has format version 3"):
        DiskStore(tmp_path, DIGEST)
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["version"] == 3


def test_failed_write_keeps_what_was_committed_and_what_waits(tmp_path, monkeypatch):
    store = DiskStore(tmp_path, DIGEST)
    put(store, 1)
    store.flush()
    put(store, 2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("quatcache.store.files.write_safetensors", full)
        with pytest.raises(StoreError, match="No space left on device; free space"):
            store.flush()
    assert held(store, 1, 2) == [1, 2] and held(DiskStore(tmp_path, DIGEST), 1, 2) == [1]
    assert not list(tmp_path.glob(".tmp-*"))
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST), 1, 2) == [1, 2]


def test_temporary_files_of_a_killed_writer_are_ignored(tmp_path):
    path = commit(tmp_path, 1)
    shutil.copy(path, tmp_path / f".tmp-0123456789ab-{path.name}")
    assert held(DiskStore(tmp_path, DIGEST), 1) == [1]


# Damage ------------------------------------------------------------------------------------------------------------


def flip(offset):
    def damage(path, other):
        content = bytearray(path.read_bytes())
        content[offset] ^= 0x10
        path.write_bytes(content)

    return damage


def flip_header_length(path, other):
    flip(1)(path, other)


def flip_header(path, other):
    flip(12)(path, other)


def flip_a_key(path, other):  # tensors lie in the order of their names, keys first
    flip(path.stat().st_size - 3 * (16 + 8) + 5)(path, other)


def flip_a_value(path, other):
    flip(-2)(path, other)


def truncate(path, other):
    os.truncate(path, path.stat().st_size - 4)


def empty(path, other):
    path.write_bytes(b"")


def remove(path, other):
    path.unlink()


def swap(path, other):
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def garbage(path, other):
    path.write_bytes(b"\xff" * path.stat().st_size)


def claim_many_rows(path, other):
    header = json.dumps({"values": {"dtype": "F32", "shape": [2**60, 2], "data_offsets": [0, 2**63]}}).encode()
    path.write_bytes((len(header).to_bytes(8, "little") + header).ljust(path.stat().st_size, b"\0"))


def claim_a_long_header(path, other):
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def remake(**tensors):
    """A shard that safetensors accepts, of other content, with its true size and checksum in the manifest."""

    def damage(path, other):
        save_file(tensors, path)
        size, digest = path.stat().st_size, checksum(path)

        def change(content):
            (entry,) = [entry for entry in content["shards"] if entry["file"] == path.name]
            entry.update(bytes=size, xxh3=digest)

        edit_manifest(path.parent, change)

    damage.__name__ = "remake-" + "-".join(f"{k}-{v.dtype}-{tuple(v.shape)}" for k, v in tensors.items())
    return damage


THREE_KEYS = torch.arange(6).reshape(3, 2)
DAMAGES = [
    flip_header_length, flip_header, flip_a_key, flip_a_value, truncate, empty, remove, swap, garbage,
    claim_many_rows, claim_a_long_header,
    remake(values=torch.ones(3, 2)),
    remake(keys=THREE_KEYS),
    remake(keys=THREE_KEYS[:2].clone(), values=torch.ones(2, 2)),
    remake(keys=THREE_KEYS, values=torch.ones(2, 2)),
    remake(keys=THREE_KEYS, values=torch.ones(3, 3)),
    remake(keys=THREE_KEYS, values=torch.ones(3, 2, dtype=torch.float64)),
    remake(keys=THREE_KEYS, values=torch.tensor(1.0)),
    remake(keys=THREE_KEYS.float(), values=torch.ones(3, 2)),
    remake(keys=torch.arange(3), values=torch.ones(3, 2)),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_shard_is_left_out_with_a_warning_and_filled_again(tmp_path, caplog, damage):
    one, other = commit(tmp_path, 1, 2, 3), commit(tmp_path, 4, 5, 6)
    damage(one, other)
    expected = [1, 2, 3, 4, 5, 6] if damage is swap else [1, 2, 3]
    with caplog.at_level(logging.WARNING, "quatcache"):
        store = DiskStore(tmp_path, DIGEST)
    assert one.name in caplog.records[0].getMessage()
    assert len(caplog.records) == len(expected) / 3
    assert held(store, *range(7)) == sorted({4, 5, 6} - set(expected))
    assert len(store) == 6 - len(expected)
    assert refill(tmp_path, *range(1, 7)) == expected
    caplog.clear()
    again = DiskStore(tmp_path, DIGEST)  # the entry of the damaged shard was replaced
    assert held(again, *range(1, 7)) == list(range(1, 7)) and len(again) == 6
    assert one.name not in [entry.file for entry in again.manifest.shards] and not caplog.records


def test_refused_shard_is_warned_of_once(tmp_path, caplog):
    flip_a_value(commit(tmp_path, 1, 2, 3), None)
    store = DiskStore(tmp_path, DIGEST)
    assert len(caplog.records) == 1
    store.refresh()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("threads", ["many", "one core", "none to be had"])
def test_shards_are_numbered_in_the_order_of_the_manifest_whichever_is_opened_first(tmp_path, monkeypatch, threads):
    for number in range(6):
        commit(tmp_path, number)
    order = [entry.file for entry in Manifest.read(tmp_path).shards]
    open_shard, others_began = shards_module.open_shard, threading.Event()

    def first_comes_last(directory, entry, *others, **checks):
        if entry.file == order[1]:
            others_began.set()
        assert entry.file != order[0] or threads != "many" or others_began.wait(60)
        return open_shard(directory, entry, *others, **checks)

    monkeypatch.setattr(os, "cpu_count", lambda: 1 if threads == "one core" else 8)
    monkeypatch.setattr(shards_module, "open_shard", first_comes_last)
    if threads == "none to be had":
        monkeypatch.setattr(threading.Thread, "start", no_thread)
    store = DiskStore(tmp_path, DIGEST)
    assert store.rows_of(keys_of(*range(6))).tolist() == list(range(6)) and held(store, *range(6)) == list(range(6))


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def test_error_while_several_shards_are_opened_is_raised_and_opens_no_more(tmp_path, monkeypatch):
    for number in range(12):
        commit(tmp_path, number)
    begun, stopped, shut_down = [], threading.Event(), ThreadPoolExecutor.shutdown
    first = json.loads((tmp_path / MANIFEST_NAME).read_text())["shards"][0]["file"]

    def unreadable(directory, entry, *others, **checks):
        begun.append(entry.file)
        assert entry.file == first or stopped.wait(60)
        raise StoreError(f"cannot read {entry.file}")

    def stop(executor, *arguments, **options):
        shut_down(executor, wait=False, cancel_futures=options.get("cancel_futures", False))
        stopped.set()
        shut_down(executor, *arguments, **options)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", stop)
    monkeypatch.setattr(shards_module, "open_shard", unreadable)
    running = threading.active_count()
    with pytest.raises(StoreError, match="cannot read"):
        DiskStore(tmp_path, DIGEST)
    assert threading.active_count() <= running and len(begun) < 12


def test_checksums_can_be_left_unread(tmp_path):
    flip_a_value(commit(tmp_path, 1, 2, 3), None)
    assert len(DiskStore(tmp_path, DIGEST, verify_checksums=False)) == 3


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_flipped_byte_of_a_shard_gives_a_wrong_row(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("rows")
    path = commit(directory, 1, 2, 3)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    changed = bytes(content) != path.read_bytes()
    path.write_bytes(content)
    assert held(DiskStore(directory, DIGEST), 1, 2, 3) == ([] if changed else [1, 2, 3])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_flipped_byte_of_a_manifest_gives_a_row_of_another_value(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("rows")
    commit(directory, 1, 2, 3)
    path = directory / MANIFEST_NAME
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        store = DiskStore(directory, DIGEST)
    except FormatError as error:
        assert str(directory) in str(error)
        return
    assert held(store, 1, 2, 3) in ([], [1, 2, 3])


# Sharing -----------------------------------------------------------------------------------------------------------


def test_copied_and_moved_directory_stays_valid(tmp_path):
    commit(tmp_path / "here", 1, 2)
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    (tmp_path / "here").rename(tmp_path / "there")
    for name in ("copy", "there"):
        assert held(DiskStore(tmp_path / name, DIGEST), 1, 2, 3) == [1, 2]
    assert refill(tmp_path / "copy", 1, 2, 3) == [3]
    assert held(DiskStore(tmp_path / "there", DIGEST), 1, 2, 3) == [1, 2]


def test_refresh_takes_in_the_rows_of_others_behind_ones_own(tmp_path):
    store, other = DiskStore(tmp_path, DIGEST), DiskStore(tmp_path, DIGEST)
    assert not store.refresh()
    put(other, 1, 2)
    other.flush()
    put(store, 3)
    number = store.rows_of(keys_of(3)).tolist()
    assert held(store, 1, 2, 3) == [3]
    assert store.refresh()
    assert held(store, 1, 2, 3) == [1, 2, 3]
    assert store.rows_of(keys_of(3)).tolist() == number
    assert not store.refresh()
    assert other.refresh() and held(other, 1, 2, 3) == [1, 2, 3]


def test_refresh_does_not_take_ones_own_rows_for_news(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    put(store, 1)
    store.flush()
    put(store, 2)
    assert not store.refresh()
    assert [entry.rows for entry in store.manifest.shards] == [1, 1]


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(["put", "flush", "refresh", "reopen"]), st.integers(0, 7)),
        max_size=14,
    )
)
@settings(max_examples=30, deadline=None)
def test_two_stores_on_one_directory_lose_nothing(tmp_path_factory, steps):
    directory = tmp_path_factory.mktemp("rows")
    stores, known, committed = [DiskStore(directory, DIGEST), DiskStore(directory, DIGEST)], [set(), set()], set()
    given_out = [{}, {}]
    for who, step, number in steps:
        store = stores[who]
        if step == "put":
            put(store, number)
            known[who].add(number)
        elif step == "flush":
            store.flush()
            committed |= known[who]
        elif step == "refresh":
            store.refresh()
            committed |= known[who]
            known[who] |= committed
        else:
            store.flush()
            committed |= known[who]
            stores[who], known[who], given_out[who] = DiskStore(directory, DIGEST), set(committed), {}
        for place in (0, 1):
            assert held(stores[place], *range(8)) == sorted(known[place])
            for name, row in given_out[place].items():  # a number that was given out stays good
                assert torch.equal(stores[place].gather(torch.tensor([row])), rows_of(name))
            for name in known[place]:
                given_out[place].setdefault(name, int(stores[place].rows_of(keys_of(name))[0]))
    assert held(DiskStore(directory, DIGEST), *range(8)) == sorted(committed)


def test_rows_of_one_encoder_never_enter_the_directory_of_another(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    put(store, 1)
    other = DiskStore(tmp_path, OTHER_DIGEST)  # the directory was replaced while the store was open
    put(other, 2)
    other.flush()
    for action in (store.flush, store.refresh, lambda: DiskStore(tmp_path, DIGEST)):
        with pytest.raises(FormatError, match=f"belongs to encoder {OTHER_DIGEST}, not {DIGEST}; do not rename"):
            action()
    assert DiskStore(tmp_path, OTHER_DIGEST).missing(keys_of(1, 2)).tolist() == [0]


def test_directory_that_vanishes_during_a_fill_is_told_and_not_made_again(tmp_path):
    store = DiskStore(tmp_path / "rows", DIGEST)
    put(store, 1)
    store.flush()
    shutil.move(tmp_path / "rows", tmp_path / "elsewhere")  # as a disk that is unmounted
    put(store, 2)
    with pytest.raises(StoreError, match=r"rows disappeared while .*; bring it back, or choose another save_dir"):
        store.flush()
    assert not (tmp_path / "rows").exists()
    assert held(store, 1, 2) == [1, 2]
    shutil.move(tmp_path / "elsewhere", tmp_path / "rows")
    store.flush()
    assert held(DiskStore(tmp_path / "rows", DIGEST), 1, 2) == [1, 2]


def test_reading_writes_nothing(tmp_path):
    commit(tmp_path, 1)
    (tmp_path / ".manifest.lock").unlink(missing_ok=True)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    store = DiskStore(tmp_path, DIGEST)
    held(store, 1, 2)
    store.refresh()
    store.load()
    store.flush()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_overflow_is_refused_before_it_reaches_a_shard(tmp_path):
    store = DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    put(store, 1)
    with pytest.raises(EncoderOutputError, match="does not fit the storage dtype"):
        store.put_many(keys_of(2), torch.tensor([[1.0, 1e6]]))
    store.flush()
    assert held(DiskStore(tmp_path, DIGEST, dtype=torch.float16), 1, 2) == [1]


def test_facts_and_environment_are_written_with_the_first_commit(tmp_path):
    commit(tmp_path, 1, facts={"pooling": "mean"}, environment={"torch": "2.13"})
    manifest = Manifest.read(tmp_path)
    assert manifest.facts == {"pooling": "mean"} and manifest.environment == {"torch": "2.13"}
    assert manifest.digest == DIGEST and manifest.rows == 1 and manifest.created
    created = manifest.created
    commit(tmp_path, 2)
    assert Manifest.read(tmp_path).created == created and Manifest.read(tmp_path).facts == {"pooling": "mean"}


def test_many_row_numbers_at_once(tmp_path):
    store = DiskStore(tmp_path, DIGEST, shard_bytes=800)
    numbers = list(range(1000))
    for start in range(0, 1000, 90):
        put(store, *numbers[start : start + 90])
    order = np.random.default_rng(0).integers(0, 1000, 5000)
    gathered = store.gather(torch.from_numpy(store.rows_of(keys_of(*order.tolist()))))
    assert torch.equal(gathered, rows_of(*order.tolist()))


def test_shard_of_another_encoder_is_refused_though_its_size_and_checksum_are_true(tmp_path, caplog):
    for place, digest in (("one", DIGEST), ("other", OTHER_DIGEST)):
        store = DiskStore(tmp_path / place, digest)
        store.put_many(keys_of("a"), torch.ones(1, 3) if place == "one" else torch.zeros(1, 3))
        store.flush()
    foreign = next((tmp_path / "other").glob("shard-*"))
    mine = next((tmp_path / "one").glob("shard-*"))
    mine.write_bytes(foreign.read_bytes())
    edit_manifest(tmp_path / "one", lambda content: content["shards"][0].update(xxh3=checksum(mine)))
    store = DiskStore(tmp_path / "one", DIGEST)
    assert len(store) == 0
    assert f"belongs to encoder {OTHER_DIGEST}" in caplog.text
