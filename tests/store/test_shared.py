"""Slots: a stocaching user's code runs unchanged, and what a reader gets is whole, there and right."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from quatcache import SharedCache
from quatcache.errors import (
    ConfigError,
    DamagedFileError,
    FormatError,
    SlotIndexError,
    SlotStateError,
    SlotValueError,
    StoreError,
)
from quatcache.store import slot_copies
from quatcache.store import slots as slots_module
from quatcache.store.segment import Segment
from quatcache.store.shared import get_shm_size
from quatcache.store.slots import Slots
from tests.store import slot_workers
from tests.store.test_segment import METHODS, SECONDS, ended, start

GIB = 1 << 30


def cache_of(samples=10, dims=(3,), dtype=torch.int64, slots=None, **options):
    """Make a cache that has room for so many slots."""
    item = math.prod(dims) * torch.empty(0, dtype=dtype).element_size()
    limit = 1 if slots is None else (samples + slots * item) / GIB
    return SharedCache(limit, samples, dims, dtype, **options)


def item(value, dims=(3,), dtype=torch.int64):
    return torch.full(dims, value, dtype=dtype)


# what stocaching documents, sentence by sentence


def test_size_limit_counts_data_and_a_byte_for_each_sample():
    """'SharedCache then calculates the maximum number of samples that can fit, and allocates that many slots.'"""
    limit, samples, size = 1 << 20, 2000, 3 * 32 * 32
    cache = SharedCache(limit / GIB, samples, (3, 32, 32), torch.uint8)
    assert len(cache) == (limit - samples) // size < samples
    assert cache.array.nbytes + cache.aux_array.nbytes <= limit
    assert len(SharedCache(1, 20, (3, 32, 32))) == 20


def test_only_the_first_samples_have_a_slot():
    """'If your dataset exceeds this size, the cache will only allocate slots for the first N samples.'"""
    cache = cache_of(samples=10, slots=4)
    assert len(cache) == 4
    assert cache.aux_array.tolist() == [0] * 4 + [2] * 6
    assert cache.indices.tolist() == [0, 1, 2, 3]


def test_items_are_read_and_written_like_those_of_a_list():
    """'You can get and set items in the cache with x = cache[idx], and cache[idx] = x.'"""
    cache = cache_of()
    cache[2] = item(5)
    assert torch.equal(cache[2], item(5))
    cache[2] = item(6)
    assert torch.equal(cache[2], item(6))
    assert torch.equal(cache.get_slot(2), item(6))


def test_length_is_that_of_the_slots():
    """'When the dataset is too large to cache completely, len(cache) < len(dataset).'"""
    assert len(cache_of(samples=10, slots=4)) == 4
    assert len(cache_of(samples=10)) == 10


def test_reading_a_sample_without_slot_gives_none():
    """'Using get_slot out of bounds of the cache simply returns None.'"""
    cache = cache_of(samples=10, slots=4)
    assert cache.get_slot(4) is None
    with pytest.raises(IndexError, match="sample 4 has no slot: 4 of 10"):
        cache.get_slot(4, allow_oob_idx=False)


def test_writing_a_sample_without_slot_does_nothing():
    """'Using set_slot out of bounds is a no-op.'"""
    cache = cache_of(samples=10, slots=4)
    assert cache.set_slot(9, item(1)) is None
    assert cache.stats().present == 0
    with pytest.raises(IndexError, match="sample 9 has no slot"):
        cache.set_slot(9, item(1), allow_oob_idx=False)


def test_empty_slot_gives_none_or_an_error():
    """'When True, returns None if the slot is empty. Otherwise, raises an exception.'"""
    cache = cache_of()
    assert cache.get_slot(1) is None
    with pytest.raises(RuntimeError, match="slot 1 is empty"):
        cache.get_slot(1, allow_empty_slot=False)


def test_slot_that_is_set_is_an_error_where_overwriting_is_forbidden():
    """'allow_overwrite: When False, raises an error if the slot is not empty.'"""
    cache = cache_of()
    cache.set_slot(1, item(1), allow_overwrite=False)
    with pytest.raises(RuntimeError, match="slot 1 is set"):
        cache.set_slot(1, item(2), allow_overwrite=False)
    assert torch.equal(cache[1], item(1))


def test_slot_is_written_over_where_that_is_allowed():
    cache = cache_of()
    cache.set_slot(1, item(1))
    cache.set_slot(1, item(2), allow_overwrite=True)
    assert torch.equal(cache[1], item(2))


def test_second_write_of_a_slot_keeps_the_first_and_is_no_error():
    """Where stocaching raises by default: there two workers that meet one sample fail."""
    cache = cache_of()
    cache.set_slot(1, item(1))
    cache.set_slot(1, item(2))
    assert torch.equal(cache[1], item(1))


def test_arguments_stand_where_stocaching_has_them():
    cache = SharedCache(1, 10, (3,), torch.int64)
    cache.set_slot(1, item(1), True, False)
    assert torch.equal(cache.get_slot(1, True, True), item(1))
    keywords = SharedCache(size_limit_gib=1, dataset_len=10, data_dims=(3,), dtype=torch.uint8)
    assert keywords.array.dtype == SharedCache(1, 10, (3,)).array.dtype == torch.uint8


def test_array_is_the_cache_itself():
    """'Internally, the cache is simply a single pytorch array, backed by shared memory.'"""
    cache = cache_of(dims=(2, 3))
    cache.set_slot(4, item(9, (2, 3)))
    for array in (cache.array, cache.underlying_array):
        assert array.shape == (10, 2, 3) and array.dtype == torch.int64
        assert torch.equal(array[4], item(9, (2, 3)))
    assert cache.get_slot(4).data_ptr() == cache.array[4].data_ptr()


def test_auxiliary_array_tracks_what_is_cached():
    """'aux_array[idx] == 0 means sample idx is not cached, == 1 cached, == 2 OOB.'"""
    cache = cache_of(samples=6, slots=4)
    cache.set_slot(2, item(1))
    aux = cache.aux_array
    assert aux.dtype == torch.uint8 and aux.shape == (6,)
    assert aux.tolist() == [0, 0, 1, 0, 2, 2]
    cache.set_slot(0, item(1))
    assert aux[0] == 1  # it is shared, not a copy


def test_clear_empties_all_slots():
    """'Clear all slots in the cache.'"""
    cache = cache_of(samples=6, slots=4)
    for index in range(6):
        cache.set_slot(index, item(index))
    cache.clear()
    assert cache.aux_array.tolist() == [0, 0, 0, 0, 2, 2]
    assert cache.get_slot(1) is None
    cache.set_slot(1, item(7))
    assert torch.equal(cache[1], item(7))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64]
)
def test_dtypes_of_stocaching_are_cached(dtype):
    """'Must be in the subset of torch dtypes with corresponding ctypes.'"""
    check_dtype(dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint16, torch.uint32, torch.uint64])
def test_dtypes_that_stocaching_lacks_are_cached(dtype):
    check_dtype(dtype, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("8-bit", torch.uint8), ("16-bit", torch.uint16), ("32-bit", torch.uint32), ("64-bit", torch.uint64),
        ("float16", torch.float16), ("uint8", torch.uint8), ("torch.int32", torch.int32),
    ],
)  # fmt: skip
def test_dtypes_have_names(name, dtype):
    check_dtype(name, dtype)


def check_dtype(given, dtype):
    for dims in ((3,), (2, 4), ()):
        cache = SharedCache(1, 4, dims, given)
        assert cache.array.dtype == dtype
        values = torch.arange(4 * math.prod(dims)).reshape(4, *dims).to(dtype)
        cache.set_slot(3, values[3])
        cache.set_slots([0, 2], values[[0, 2]])
        found = cache.get_slots([3, 1, 2, 0])
        assert found.positions.tolist() == [0, 2, 3]
        assert found.values.dtype == dtype and found.values.shape == (3, *dims)
        assert found.values.tolist() == values[[3, 2, 0]].tolist()
        assert cache.get_slot(3).tolist() == values[3].tolist()


def test_empty_slots_are_told_as_in_its_first_versions():
    cache = cache_of(samples=6, slots=4)
    assert cache.is_slot_empty(1)
    cache.set_slot(1, item(0))
    assert not cache.is_slot_empty(1)  # "if your dataset has any legitimate all-zero datapoints, they will be mistaken"
    with pytest.raises(IndexError):
        cache.is_slot_empty(5)
    with pytest.raises(IndexError):
        cache.is_slot_empty(6)


def test_size_of_shared_memory_is_told_in_gib():
    if Path("/dev/shm").is_dir():
        status = os.statvfs("/dev/shm")
        assert get_shm_size() == int(status.f_bsize * status.f_blocks / GIB)


def test_numbers_can_be_cached_as_labels():
    labels = SharedCache(1, 5, (), torch.int64)
    labels.set_slot(2, 7)
    assert labels.get_slot(2).item() == 7
    labels.set_slot(3, np.int64(8))
    assert labels.get_slot(3).item() == 8
    flags = SharedCache(1, 5, (), torch.bool)
    flags.set_slot(0, True)
    assert flags.get_slot(0).item() is True
    weights = SharedCache(1, 5, (), torch.float32)
    weights.set_slot(0, 0.1)
    assert weights.get_slot(0).item() == pytest.approx(0.1)


def test_arrays_and_tensors_of_any_kind_are_taken():
    cache = cache_of(dims=(2, 3), dtype=torch.float32)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    given = [
        array, array[::-1][::-1], np.asfortranarray(array), frozen, torch.from_numpy(array).T.contiguous().T,
        torch.from_numpy(array.copy()).requires_grad_(),
    ]  # fmt: skip
    for index, value in enumerate(given):
        cache.set_slot(index, value)
        assert cache.get_slot(index).tolist() == array.tolist()
        assert not cache.get_slot(index).requires_grad
    cache.set_slots([8, 9], np.stack([array, array])[::-1])
    assert cache.get_slot(9).tolist() == array.tolist()


# presence


def test_item_of_zeros_is_a_hit():
    cache = cache_of()
    cache.set_slot(0, item(0))
    assert torch.equal(cache.get_slot(0), item(0))
    assert cache.get_slots([0, 1]).positions.tolist() == [0]


def test_empty_slot_is_not_read_as_zeros():
    cache = cache_of()
    with pytest.raises(SlotStateError, match="slot 3 is empty"):
        cache[3]


@pytest.mark.parametrize("overwrite", [False, True])
def test_slot_is_found_only_once_its_data_are_there(monkeypatch, overwrite):
    """At each point between which the order of writes matters, nothing is found, or all of it."""
    cache = cache_of()
    if overwrite:
        cache.set_slot(1, item(1))
    seen = []
    monkeypatch.setattr(
        Segment, "order", lambda self: seen.append((cache.aux_array[1].item(), cache.array[1].tolist()))
    )
    cache.set_slot(1, item(2), allow_overwrite=True)
    assert [state for state, _ in seen] == ([0, 0] if overwrite else [0])
    assert seen[-1] == (0, [2, 2, 2])  # the data are whole before anybody may find them
    assert cache.aux_array[1] == 1


def test_batch_is_found_only_once_its_data_are_there(monkeypatch):
    cache = cache_of()
    seen = []
    monkeypatch.setattr(
        Segment, "order", lambda self: seen.append((cache.aux_array[:3].tolist(), cache.array[:3].tolist()))
    )
    cache.set_slots([0, 2], torch.stack([item(4), item(5)]))
    assert seen == [([0, 0, 0], [[4] * 3, [0] * 3, [5] * 3])]


@pytest.mark.parametrize("change", ["overwrite", "clear", "clear and write"])
def test_copy_of_what_is_changed_meanwhile_is_not_found(monkeypatch, change):
    cache = cache_of()
    cache.set_slots([1, 2], torch.stack([item(1), item(2)]))
    real = slots_module.copied_rows

    def copied(words, rows, *, shared):
        half = real(words, rows, shared=shared)
        if change != "overwrite":
            cache.clear()
        if change != "clear":
            cache.set_slot(1, item(9), allow_overwrite=True)
        return half

    monkeypatch.setattr(slots_module, "copied_rows", copied)
    found = cache.get_slots([2, 1])
    kept = {"overwrite": [0], "clear": [], "clear and write": []}[change]
    assert found.positions.tolist() == kept
    assert found.values.tolist() == [[2] * 3] * len(kept)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_copy_of_what_a_killed_writer_and_the_next_one_changed_is_not_found(monkeypatch, step, many):
    """The first leaves an empty slot at any point, the second fills it: both while a third one copies."""
    cache = cache_of()
    cache.set_slot(1, item(1))

    def changed():
        killed = start(METHODS[0], slot_workers.write_and_die, cache, 1, item(2), True, step)
        assert ended(killed) == -signal.SIGKILL
        cache.set_slot(1, item(9))

    if many:
        real = slots_module.copied_rows
        monkeypatch.setattr(
            slots_module, "copied_rows", lambda *args, **options: (real(*args, **options), changed())[0]
        )
        assert cache.get_slots([1]).positions.tolist() == []
        monkeypatch.undo()
    else:
        copied_while(monkeypatch, changed)
        assert cache.copy_slot(1) is None
        monkeypatch.undo()
    assert cache.copy_slot(1).tolist() == [9] * 3


def copied_while(monkeypatch, act):
    """Have something happen once, while one slot is copied."""
    real = torch.Tensor.clone

    def clone(self):
        monkeypatch.setattr(torch.Tensor, "clone", real)
        half = self.clone()
        act()
        return half

    monkeypatch.setattr(torch.Tensor, "clone", clone)


@pytest.mark.parametrize("change", ["overwrite", "clear", "clear and write", "other"])
def test_copy_of_one_slot_that_is_changed_meanwhile_is_not_found(monkeypatch, change):
    cache = cache_of()
    cache.set_slots([1, 2], torch.stack([item(1), item(2)]))

    def changed():
        if change == "other":
            cache.set_slot(2, item(8), allow_overwrite=True)
        elif change != "overwrite":
            cache.clear()
        if change in ("overwrite", "clear and write"):
            cache.set_slots([1], item(9)[None], allow_overwrite=True)

    copied_while(monkeypatch, changed)
    found = cache.copy_slot(1)
    assert (found is None) == (change != "other")
    assert cache.stats().misses == (change != "other")


def test_loaded_slot_is_not_found_by_who_copied_what_it_held_before(monkeypatch, tmp_path):
    cache = cache_of()
    cache.set_slot(1, item(1))
    cache.save(tmp_path / "slots.safetensors")
    cache.set_slot(1, item(2), allow_overwrite=True)

    def changed():
        cache.clear()
        cache.load(tmp_path / "slots.safetensors")

    copied_while(monkeypatch, changed)
    assert cache.copy_slot(1) is None
    assert cache.copy_slot(1).tolist() == [1] * 3


def test_version_begins_anew_after_the_last_one():
    cache = cache_of()
    cache._slots.versions[1] = 2**32 - 1
    cache.set_slot(1, item(1))
    assert cache._slots.versions[1] == 0
    assert cache.copy_slot(1).tolist() == [1] * 3


@pytest.mark.parametrize("seed", [None, 1])
def test_copy_of_one_slot_is_ones_own(seed):
    cache = cache_of(samples=10, slots=4, seed=seed)
    first = int(cache.indices[1])
    without = next(index for index in range(10) if index not in cache.indices)
    cache.set_slot(first, item(5))
    cache.copy_slot(first).zero_()
    assert cache.copy_slot(first).tolist() == cache[first].tolist() == [5] * 3
    assert cache.copy_slot(int(cache.indices[0])) is None
    assert cache.copy_slot(without) is None
    assert (cache.stats().hits, cache.stats().misses) == (3, 2)


def test_view_of_a_slot_is_not_changed_by_other_writers_by_default():
    cache = cache_of()
    cache.set_slot(1, item(1))
    view = cache.get_slot(1)
    cache.set_slot(1, item(2))
    cache.set_slots([0, 1], torch.stack([item(3), item(3)]))
    assert view.tolist() == [1, 1, 1]


def test_writing_the_same_again_disturbs_nobody(monkeypatch):
    """What users of stocaching do about its error: allow_overwrite=True, always."""
    cache = cache_of()
    cache.set_slots([1, 2], torch.stack([item(1), item(2)]))
    monkeypatch.setattr(
        Slots, "_withdraw", lambda self, indices: pytest.fail("slots were empty meanwhile") if len(indices) else None
    )
    cache.set_slot(1, item(1), allow_overwrite=True)
    cache.set_slots([1, 2], torch.stack([item(1), item(2)]), allow_overwrite=True)


def test_copies_are_ones_own():
    cache = cache_of()
    cache.set_slot(1, item(1))
    cache.get_slots([1]).values.mul_(5)
    assert torch.equal(cache[1], item(1))


# batches


def test_batch_is_written_and_read_in_the_order_given():
    cache = cache_of(samples=50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    values = order[:, None].expand(50, 3) * 10
    cache.set_slots(order[:30], values[:30])
    for given in (order, order.numpy(), order.tolist(), range(50)):
        found = cache.get_slots(given)
        wanted = torch.as_tensor(list(given))
        assert found.values[:, 0].tolist() == (wanted[found.positions] * 10).tolist()
        assert len(found.positions) == 30


def test_batch_that_is_in_the_cache_in_part_is_found_in_part():
    cache = cache_of(samples=10, slots=4)
    cache.set_slots([0, 3, 8], torch.stack([item(0), item(3), item(8)]))
    found = cache.get_slots([8, 3, 1, 0, 3])
    assert found.positions.tolist() == [1, 3, 4]
    assert found.values.tolist() == [[3] * 3, [0] * 3, [3] * 3]
    assert cache.get_slots([]).values.shape == (0, 3)
    assert cache.get_slots([7, 8]).values.shape == (0, 3)


def test_of_an_index_given_twice_the_first_counts_or_the_last_that_writes_over():
    cache = cache_of()
    values = torch.stack([item(value) for value in (1, 2, 3)])
    cache.set_slots([4, 5, 4], values)
    assert (cache[4].tolist(), cache[5].tolist()) == ([1] * 3, [2] * 3)
    cache.set_slots([4, 5, 4], values + 10, allow_overwrite=True)
    assert (cache[4].tolist(), cache[5].tolist()) == ([13] * 3, [12] * 3)


def test_batch_keeps_what_is_set_unless_told_otherwise():
    cache = cache_of()
    cache.set_slot(1, item(1))
    both = torch.stack([item(8), item(9)])
    cache.set_slots([1, 2], both)
    assert (cache[1].tolist(), cache[2].tolist()) == ([1] * 3, [9] * 3)
    with pytest.raises(SlotStateError, match="slot 1 is set"):
        cache.set_slots([3, 1], both, allow_overwrite=False)
    assert cache.get_slot(3) is None
    cache.set_slots([1, 2], both, allow_overwrite=True)
    assert (cache[1].tolist(), cache[2].tolist()) == ([8] * 3, [9] * 3)


def test_batch_can_be_read_into_shared_memory():
    cache = cache_of()
    cache.set_slot(1, item(1))
    assert cache.get_slots([1], shared=True).values.is_shared()
    assert not cache.get_slots([1]).values.is_shared()
    assert len(cache.get_slots([2], shared=True).values) == 0


@pytest.mark.parametrize("dims", [(3,), (3000,), (30, 50)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16])
def test_batch_in_shared_memory_is_the_same_however_it_is_copied(dims, dtype, monkeypatch):
    monkeypatch.setattr(slot_copies, "_AT_ONCE", 3)  # several calls
    cache = cache_of(samples=20, dims=dims, dtype=dtype)
    values = torch.randint(0, 2, (20, *dims), generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.set_slots(range(20), values)
    order = [7, 3, 19, 0, 3, 12, 5]
    for short in (False, True):
        if short:
            monkeypatch.setattr(os, "pwritev", lambda *_: 1)
        found = cache.get_slots(order, shared=True).values
        assert found.is_shared() and torch.equal(found, values[order])


def test_batch_without_a_slot_is_refused_where_that_is_asked():
    cache = cache_of(samples=10, slots=4)
    with pytest.raises(SlotIndexError, match="sample 7 has no slot"):
        cache.set_slots([1, 7], torch.stack([item(1), item(7)]), allow_oob_idx=False)
    assert cache.stats().present == 0


# a budget spread over the dataset


def test_seed_spreads_the_slots_over_the_dataset():
    cache = cache_of(samples=1000, slots=100, seed=3)
    chosen = cache.indices
    assert len(chosen) == len(cache) == 100
    assert chosen.max() > 900 and not torch.equal(chosen, torch.arange(100))
    assert torch.equal(chosen, cache_of(samples=1000, slots=100, seed=3).indices)
    assert not torch.equal(chosen, cache_of(samples=1000, slots=100, seed=4).indices)
    assert 35 <= int((chosen < 500).sum()) <= 65


def test_samples_keep_their_index_wherever_their_slot_is():
    cache = cache_of(samples=100, slots=10, seed=1)
    everything = torch.arange(100)[:, None].expand(100, 3).contiguous()
    cache.set_slots(range(0, 100, 2), everything[::2])
    for index in range(1, 100, 2):
        cache.set_slot(index, everything[index])
    found = cache.get_slots(range(100))
    assert found.positions.tolist() == cache.indices.tolist()
    assert torch.equal(found.values, everything[cache.indices])
    assert torch.equal(cache.array, everything[cache.indices])
    for index in cache.indices.tolist():
        assert cache[index].tolist() == [index] * 3
    cache.set_slot(int(cache.indices[4]), item(7), allow_overwrite=True)
    assert cache.array[4].tolist() == [7] * 3


def test_seed_changes_nothing_where_everything_fits():
    assert cache_of(seed=1).indices.tolist() == list(range(10))
    assert cache_of(seed=1).spec == cache_of().spec


# processes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [None, 5])
def test_slots_written_in_another_process_are_found(method, seed):
    cache = cache_of(samples=30, slots=10, seed=seed)
    assert ended(start(method, slot_workers.write_some, cache, range(30), 100)) == 0
    assert cache.stats().present == 10
    assert all(cache[index].tolist() == [100 + index] * 3 for index in cache.indices.tolist())


@pytest.mark.parametrize(("overwrite", "step"), [(False, 1), (True, 1), (True, 2)])
def test_writer_killed_in_the_middle_leaves_an_empty_slot_that_can_be_written(overwrite, step):
    cache = cache_of()
    if overwrite:
        cache.set_slot(1, item(1))
    killed = start(METHODS[0], slot_workers.write_and_die, cache, 1, item(2), overwrite or None, step)
    assert ended(killed) == -signal.SIGKILL
    assert cache.get_slot(1) is None
    assert cache.get_slots([1]).positions.tolist() == []
    done = threading.Thread(target=cache.set_slot, args=(1, item(3)), daemon=True)
    done.start()
    done.join(SECONDS)
    assert not done.is_alive(), "the lock of a killed process is held"
    assert cache[1].tolist() == [3] * 3


@pytest.mark.parametrize("method", METHODS)
def test_hits_and_misses_of_all_processes_are_counted(method):
    cache = cache_of()
    cache.set_slot(0, item(1))
    users = [start(method, slot_workers.use, cache, hits) for hits in (100, 20)]
    assert [ended(user) for user in users] == [0, 0]
    assert ended(start(method, slot_workers.use, cache, 3)) == 0  # it counts on where one has ended
    cache.get_slots([0, 1, 2])
    cache.get_slot(0)
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (125, 5)
    assert (stats.samples, stats.slots, stats.present) == (10, 10, 1)
    assert stats.bytes > cache.array.nbytes


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_forked_process_counts_apart_from_its_parent():
    """Two that add to one number lose some."""
    cache = cache_of()
    cache.set_slot(0, item(1))
    cache.get_slot(0)
    assert ended(start("fork", slot_workers.use, cache, 5)) == 0
    assert [hits for hits in cache._slots._tallies()[::2] if hits] == [1, 5]


def test_counting_ends_quietly_where_too_many_processes_count(monkeypatch):
    cache = cache_of()
    monkeypatch.setattr(Segment, "claim", lambda self, place: False)
    assert cache.get_slot(0) is None
    assert cache.stats().misses == 0


def test_caches_of_one_name_must_agree():
    first = cache_of(name=f"agree-{os.getpid()}")
    for other in ({"samples": 11}, {"dims": (4,)}, {"dtype": torch.float64}, {"slots": 4}, {"slots": 4, "seed": 1}):
        with pytest.raises(ConfigError, match=r"is for 10 of 10 samples.*another name"):
            cache_of(name=first.name, **other)
    assert cache_of(name=first.name).array.data_ptr() == first.array.data_ptr()


def test_cache_beside_another_is_for_the_same_samples():
    cache = cache_of(samples=20, slots=5, seed=2)
    beside = cache.beside("labels", (), torch.float16)
    assert beside.name == f"{cache.name}.labels"
    assert beside.indices.tolist() == cache.indices.tolist()
    assert beside.array.shape == (5,) and beside.array.dtype == torch.float16


def test_copies_of_the_object_are_the_same_cache():
    cache = cache_of()
    copied = pickle.loads(pickle.dumps(cache))
    copied.set_slot(3, item(3))
    assert cache[3].tolist() == [3] * 3
    assert repr(cache) == f"SharedCache(10 of 10 samples, (3,) int64, name='{cache.name}')"


# what is refused


@pytest.mark.parametrize("index", [-1, 10, 11])
def test_index_outside_the_dataset_is_refused(index):
    cache = cache_of()
    calls = [
        lambda: cache.get_slot(index),
        lambda: cache.set_slot(index, item(1)),
        lambda: cache.is_slot_empty(index),
        lambda: cache[index],
        lambda: cache.__setitem__(index, item(1)),
        lambda: cache.get_slots([0, index]),
        lambda: cache.set_slots([0, index], torch.stack([item(1), item(1)])),
    ]
    for call in calls:
        with pytest.raises(
            SlotIndexError, match=f"index {index} is outside the dataset of 10 samples; give one from 0 to 9"
        ):
            call()
    assert cache.stats().present == 0


@pytest.mark.parametrize(
    "index", [True, np.int8(1), torch.tensor(1), torch.tensor(1, dtype=torch.uint8), torch.tensor([1]), np.uint64(1)]
)
def test_one_is_one_of_whatever_type(index):
    """For torch, True and a number of uint8 are masks: the item would go into all slots, or all slots come back."""
    cache = cache_of()
    cache.set_slot(index, item(7))
    assert cache.aux_array.tolist() == [0, 1] + [0] * 8
    assert cache.array.sum() == 21
    assert cache.get_slot(index).tolist() == cache[index].tolist() == cache.copy_slot(index).tolist() == [7] * 3
    assert not cache.is_slot_empty(index)


@pytest.mark.parametrize("index", [1.0, "a", slice(0, 2), None, [1], np.array([1]), np.bool_(True), torch.tensor(1.0)])
def test_what_is_no_index_is_refused(index):
    cache = cache_of()
    for call in (cache.get_slot, cache.copy_slot, cache.is_slot_empty, lambda i: cache.set_slot(i, item(1))):
        with pytest.raises(SlotIndexError, match="is no index; give an integer, or many of them to get_slots"):
            call(index)
    assert cache.stats().present == 0


def test_index_beyond_any_integer_of_the_machine_is_told_as_it_is():
    with pytest.raises(SlotIndexError, match="index 9223372036854775808 is outside"):
        cache_of().get_slots(np.array([2**63], np.uint64))


@pytest.mark.parametrize(
    "indices", [[0.5], [[0, 1]], torch.tensor(3), ["a"], [True, False], 3, [[1], [1, 2]], [2**70], {1: 2}.keys()]
)
def test_what_is_no_list_of_indices_is_refused(indices):
    with pytest.raises(SlotIndexError, match="no list of indices"):
        cache_of().get_slots(indices)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(4, dtype=torch.int64), r"\(4,\) int64, the cache takes \(3,\) int64"),
        (torch.zeros(1, dtype=torch.int64), r"\(1,\) int64"),
        (torch.zeros(3, 3, dtype=torch.int64), r"\(3, 3\) int64"),
        (torch.zeros(3), r"\(3,\) float32, the cache takes \(3,\) int64"),
        (np.zeros(3, np.uint8), r"\(3,\) uint8"),
        (5, r"\(\) int64"),
        ([1, 2, 3], "is a list"),
        (None, "is a NoneType"),
        ("abc", "is a str"),
        (np.array(["a"]), "cannot be a tensor"),
        (np.zeros(3, ">i8"), "cannot be a tensor"),
        (np.ma.masked_array(np.zeros(3, np.int64)), "is a MaskedArray"),
        (torch.zeros(3, dtype=torch.int64).to_sparse(), "sparse, nested or meta"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "sparse, nested or meta"),
        (2**70, "is no int64"),
    ],
)
def test_value_of_another_shape_or_dtype_is_refused(value, said):
    cache = cache_of(samples=10, slots=4)
    for index in (0, 9):  # also where it would not be kept
        with pytest.raises(SlotValueError, match=said):
            cache.set_slot(index, value)
    with pytest.raises(SlotValueError):
        cache[0] = value
    assert cache.stats().present == 0


@pytest.mark.parametrize("value", [1.5, 300, -1, float("nan")])
def test_number_that_the_dtype_does_not_hold_is_refused(value):
    cache = SharedCache(1, 5, (), torch.uint8)
    with pytest.raises(SlotValueError, match=r"is no uint8"):
        cache.set_slot(0, value)
    assert cache.stats().present == 0


@pytest.mark.parametrize("value", [1e10, -1e10, 2049])
def test_number_that_a_float_would_make_another_of_is_refused(value):
    cache = SharedCache(1, 5, (), torch.float16)
    with pytest.raises(SlotValueError, match=r"is no float16"):
        cache.set_slot(0, value)
    assert cache.stats().present == 0
    for index, taken in enumerate((0.1, math.inf, math.nan, 2048, -math.inf)):
        cache.set_slot(index, taken)
        assert cache[index].item() == pytest.approx(taken, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize(
    "values",
    [torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3), [[1] * 3] * 2],
)
def test_batch_of_another_shape_or_dtype_is_refused(values):
    cache = cache_of()
    with pytest.raises(SlotValueError):
        cache.set_slots([0, 1], values)
    assert cache.stats().present == 0


@pytest.mark.parametrize("length", [0, -1, 2.5, "10", None])
def test_dataset_without_samples_is_refused(length):
    with pytest.raises(ConfigError, match="dataset_len is"):
        SharedCache(1, length, (3,))


@pytest.mark.parametrize("limit", [0, -1, math.inf, math.nan, 1e300, "8", None])
def test_limit_that_is_none_is_refused(limit):
    with pytest.raises(ConfigError, match="size_limit_gib is"):
        SharedCache(limit, 10, (3,))


def test_limit_below_one_item_is_refused():
    with pytest.raises(
        ConfigError, match=r"no room for one item of 2400 bytes beside 10 bytes of states; give at least 2.2e-06"
    ):
        SharedCache(2409 / GIB, 10, (300,), torch.int64)
    assert len(SharedCache(2410 / GIB, 10, (300,), torch.int64)) == 1


@pytest.mark.parametrize("dims", [(0,), (3, -1), (2.5,), 3, None, "3"])
def test_shape_that_is_none_is_refused(dims):
    with pytest.raises(ConfigError, match="data_dims is"):
        SharedCache(1, 10, dims)


@pytest.mark.parametrize("dtype", [torch.complex64, "7-bit", "float", int, np.float32, None])
def test_dtype_that_cannot_be_cached_is_refused(dtype):
    with pytest.raises(ConfigError, match="cannot be cached; give one of bool, uint8"):
        SharedCache(1, 10, (3,), dtype)


@pytest.mark.parametrize("seed", [-1, 1.5, "a"])
def test_seed_that_is_none_is_refused(seed):
    with pytest.raises(ConfigError, match="seed is"):
        SharedCache(1, 10, (3,), seed=seed)


def test_integers_of_numpy_are_taken():
    cache = SharedCache(1, np.int64(10), (np.int32(3),), torch.int64)
    cache.set_slot(np.int64(2), item(1))
    assert cache[np.int64(2)].tolist() == cache[torch.tensor(2)].tolist() == [1] * 3


# warm starts


def filled(**options):
    cache = cache_of(samples=40, slots=20, **options)
    cache.set_slots(range(0, 40, 3), torch.arange(0, 40, 3)[:, None].expand(14, 3).contiguous())
    return cache


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.uint16, torch.int64])
@pytest.mark.parametrize("dims", [(3,), (), (2, 2)])
def test_slots_come_back_from_a_file(tmp_path, dtype, dims, monkeypatch):
    from quatcache.store import slot_files

    monkeypatch.setattr(slot_files, "PIECE_BYTES", 64)  # many pieces
    cache = cache_of(samples=40, dims=dims, dtype=dtype)
    values = torch.randint(0, 2, (20, *dims), generator=torch.Generator().manual_seed(0)).to(dtype)
    cache.set_slots(range(0, 40, 2), values)
    assert cache.save(tmp_path / "folder" / "slots.safetensors") == 20
    fresh = cache_of(samples=40, dims=dims, dtype=dtype)
    assert fresh.load(tmp_path / "folder" / "slots.safetensors") == 20
    found = fresh.get_slots(range(40))
    assert found.positions.tolist() == list(range(0, 40, 2))
    assert found.values.tolist() == values.tolist()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["slots.safetensors"]


def test_file_can_be_read_by_anybody(tmp_path):
    cache = filled()
    cache.save(tmp_path / "slots.safetensors")
    with safe_open(tmp_path / "slots.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"indices", "values", "xxh3"}
        assert file.get_tensor("indices").tolist() == list(range(0, 20, 3))
        assert file.get_tensor("values")[:, 0].tolist() == list(range(0, 20, 3))
        assert file.metadata()["shape"] == "[3]"


def test_empty_cache_is_saved_and_loaded(tmp_path):
    cache = cache_of()
    assert cache.save(tmp_path / "slots.safetensors") == 0
    assert cache_of().load(tmp_path / "slots.safetensors") == 0


def test_cache_of_other_slots_takes_what_it_has_room_for(tmp_path):
    cache = filled()
    cache.save(tmp_path / "slots.safetensors")
    other = cache_of(samples=40, slots=20, seed=1)
    expected = sorted(set(range(0, 20, 3)) & set(other.indices.tolist()))
    assert 0 < other.load(tmp_path / "slots.safetensors") == len(expected) < 7
    found = other.get_slots(range(40))
    assert found.positions.tolist() == expected
    assert found.values[:, 0].tolist() == expected


def test_loading_keeps_what_is_set(tmp_path):
    cache = filled()
    cache.save(tmp_path / "slots.safetensors")
    other = cache_of(samples=40, slots=20)
    other.set_slot(3, item(77))
    assert other.load(tmp_path / "slots.safetensors") == 6
    assert other[3].tolist() == [77] * 3 and other[6].tolist() == [6] * 3


@pytest.mark.parametrize("other", [{"samples": 41}, {"dims": (4,)}, {"dtype": torch.float64}])
def test_file_of_other_items_is_refused(tmp_path, other):
    filled().save(tmp_path / "slots.safetensors")
    cache = cache_of(**{"samples": 40, **other})
    with pytest.raises(FormatError, match=r"has items of \[3\] int64 for 40 samples, this cache items of"):
        cache.load(tmp_path / "slots.safetensors")
    assert cache.stats().present == 0


def test_every_damaged_byte_is_noticed_and_nothing_loaded(tmp_path):
    filled().save(tmp_path / "slots.safetensors")
    content = (tmp_path / "slots.safetensors").read_bytes()
    cache = cache_of(samples=40, slots=20)
    for place in range(0, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x11
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises((FormatError, StoreError)):
            cache.load(tmp_path / "damaged.safetensors")
        assert cache.stats().present == 0
    for length in range(0, len(content), 7):
        (tmp_path / "damaged.safetensors").write_bytes(content[:length])
        with pytest.raises((FormatError, StoreError)):
            cache.load(tmp_path / "damaged.safetensors")
    assert cache.load(tmp_path / "slots.safetensors") == 7


@pytest.mark.parametrize("spoil", ["order", "twice", "outside", "negative", "short", "missing", "version"])
def test_file_that_was_made_up_is_refused(tmp_path, spoil):
    from safetensors.torch import load_file, save_file

    filled().save(tmp_path / "slots.safetensors")
    with safe_open(tmp_path / "slots.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(tmp_path / "slots.safetensors")
    indices = tensors["indices"].clone()
    if spoil == "order":
        indices = indices.flip(0)
    elif spoil == "twice":
        indices[1] = indices[0]
    elif spoil == "outside":
        indices[-1] = 40
    elif spoil == "negative":
        indices[0] = -1
    elif spoil == "short":
        tensors["values"] = tensors["values"][1:].contiguous()
    elif spoil == "missing":
        del tensors["values"]
    elif spoil == "version":
        metadata["version"] = "2"
    tensors["indices"] = indices.contiguous()
    save_file(tensors, tmp_path / "made-up.safetensors", metadata)
    cache = cache_of(samples=40, slots=20)
    with pytest.raises(FormatError if spoil == "version" else DamagedFileError):
        cache.load(tmp_path / "made-up.safetensors")
    assert cache.stats().present == 0


def test_file_that_is_missing_or_cannot_be_written_is_told(tmp_path):
    with pytest.raises(FormatError, match="is missing"):
        cache_of().load(tmp_path / "slots.safetensors")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        cache_of().save(tmp_path / "file" / "slots.safetensors")


def test_saving_waits_for_no_reader_and_keeps_writers_out(tmp_path, monkeypatch):
    from quatcache.store import slot_files

    cache = filled()
    real, writers = slot_files._write, []

    def write(file, slots, indices):
        writer = threading.Thread(target=cache.set_slot, args=(1, item(1)))
        writer.start()
        writers.append(writer)
        assert cache.get_slot(3).tolist() == [3] * 3
        real(file, slots, indices)
        assert cache.get_slot(1) is None

    monkeypatch.setattr(slot_files, "_write", write)
    cache.save(tmp_path / "slots.safetensors")
    writers[0].join(SECONDS)
    assert cache.get_slot(1) is not None
    with safe_open(tmp_path / "slots.safetensors", framework="pt") as file:
        assert 1 not in file.get_tensor("indices").tolist()


def test_description_of_a_segment_names_no_code():
    spec = cache_of().spec
    content = json.loads(spec.as_json())
    content["dtype"] = "os.system"
    with pytest.raises(KeyError):
        slots_module.SlotSpec.from_json(json.dumps(content).encode())
