"""Laws 1, 2 and 7: read-through is invisible, computes once, and takes no value for an absence."""

from __future__ import annotations

import collections
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatcache.errors import BatchLengthError, ConfigError
from quatcache.keys import content_keys
from quatcache.read_through import Counts, fill_through, read_through, reading_through
from quatcache.store import MemoryStore, TensorStore
from tests.stores_for_tests import STORES, Clock, opened


class ComputeFailed(Exception):
    pass


class Recorder:
    """Computes the values of names, and remembers for which it was asked; fails on some."""

    def __init__(self, case, names, fails=(), clock=None):
        self.case, self.names, self.fails, self.clock = case, names, set(fails), clock
        self.batches = []

    def __call__(self, positions):
        batch = [self.names[position] for position in positions.tolist()]
        if self.clock is not None:
            self.clock.now += 1.0  # values expire while others are computed
        if self.fails & set(batch):
            raise ComputeFailed
        self.batches.append(batch)
        return self.case.values(batch)

    @property
    def computed(self):
        return [name for batch in self.batches for name in batch]


def backwards(size):
    def batches(positions):
        ordered = positions[::-1]
        return (ordered[start : start + size] for start in range(0, len(ordered), size))

    return batches


def interleaved(positions):
    return [part for part in (positions[1::2], positions[::2]) if len(part)]


BATCHES = st.one_of(st.none(), st.integers(1, 4), st.integers(1, 3).map(backwards), st.just(interleaved))
NAMES = st.lists(st.integers(0, 9), max_size=12)


@pytest.mark.parametrize("name", STORES)
@given(calls=st.lists(st.tuples(NAMES, BATCHES, st.sets(st.integers(0, 9), max_size=2), st.booleans()), max_size=5))
@settings(max_examples=30, deadline=None)
def test_read_through_is_invisible_and_computes_each_distinct_miss_once(name, calls):
    clock = Clock()
    with opened(name, clock) as case:
        for names, batches, fails, fill in calls:
            keys = case.keys(names)
            absent = {names[place] for place in case.store.missing(keys).tolist()}
            compute = Recorder(case, names, fails, clock)
            try:
                if fill:
                    counts = fill_through(keys, compute, case.store, batches=batches)
                    assert counts.asked == len(names) == counts.hits + counts.duplicates + counts.computed
                    assert counts.computed == len(absent)
                else:
                    answer = read_through(keys, compute, case.store, batches=batches)
                    assert case.plain(answer) == case.plain(case.values(names))
                assert sorted(compute.computed) == sorted(absent)
            except ComputeFailed:
                assert fails & absent
                assert len(set(compute.computed)) == len(compute.computed) and set(compute.computed) <= absent
                if case.keeps_everything:  # the finished batches are kept: the next call computes the rest only
                    again = Recorder(case, names)
                    answer = read_through(keys, again, case.store)
                    assert case.plain(answer) == case.plain(case.values(names))
                    assert sorted(again.computed) == sorted(absent - set(compute.computed))


@pytest.mark.parametrize("name", STORES)
def test_failing_batch_loses_no_finished_one(name):
    with opened(name) as case:
        names = [4, 5, 6, 7]
        with pytest.raises(ComputeFailed):
            read_through(case.keys(names), Recorder(case, names, fails={6}), case.store, batches=1)
        assert case.store.missing(case.keys(names)).tolist() == [2, 3]


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("operation", [read_through, fill_through])
def test_batches_hold_at_most_so_many_misses_in_order(name, operation):
    with opened(name) as case:
        case.store.put_many(case.keys([9]), case.values([9]))
        names = [5, 9, 1, 5, 4, 1, 6, 7]
        compute = Recorder(case, names)
        operation(case.keys(names), compute, case.store, batches=2)
        assert compute.batches == [[5, 1], [4, 6], [7]]


@pytest.mark.parametrize("name", STORES)
def test_full_hit_and_empty_call_compute_nothing(name):
    with opened(name) as case:
        case.store.put_many(case.keys([1, 2]), case.values([1, 2]))
        compute = Recorder(case, [1, 2, 1])
        answer = read_through(case.keys([1, 2, 1]), compute, case.store)
        assert case.plain(answer) == case.plain(case.values([1, 2, 1]))
        assert len(read_through(case.keys([]), compute, case.store)) == 0
        assert fill_through(case.keys([]), compute, case.store) == Counts()
        assert compute.batches == []


def test_fill_reads_no_value():
    class Unreadable(MemoryStore):
        def get_many(self, keys):
            raise AssertionError("a fill has no use for values")

    store = Unreadable({"a": 1})
    counts = fill_through(["a", "b", "b"], lambda positions: [2] * len(positions), store)
    assert counts == Counts(asked=3, hits=1, duplicates=1, computed=1)


def test_fill_keeps_one_batch_of_values_at_a_time():
    class Declining(MemoryStore):
        def put_many(self, keys, values):
            pass

    before = []

    def compute(positions):
        assert all(reference() is None for reference in before)
        values = torch.zeros(len(positions))
        before.append(weakref.ref(values))
        return values

    fill_through(list("abc"), compute, Declining(), batches=1)
    assert len(before) == 3


def test_counts_add_up():
    assert Counts(7, 3, 2, 2) + Counts(1, 0, 0, 1) == Counts(8, 3, 2, 3)


@pytest.mark.parametrize("operation", [read_through, fill_through])
@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([1], "1 values"),
        ([1, 2, 3], "3 values"),
        (iter([1, 2]), "a list_iterator"),
        (None, "a NoneType"),
        (torch.tensor(1.0), "a Tensor"),
    ],
)
def test_wrong_number_of_values_is_refused_and_not_stored(operation, values, got):
    store = MemoryStore()
    with pytest.raises(BatchLengthError, match=rf"compute returned {got} for 2 items \(batch 1\); return one per item"):
        operation(["a", "b"], lambda positions: values, store)
    assert len(store) == 0


def test_wrong_length_names_its_batch_and_keeps_those_before():
    store = MemoryStore()
    with pytest.raises(BatchLengthError, match=r"0 values for 1 items \(batch 2\)"):
        read_through(["a", "b"], lambda positions: ["first"] if positions[0] == 0 else [], store, batches=1)
    assert store.get_many(["a", "b"]).values == ["first"]


@pytest.mark.parametrize(
    "batches",
    [
        lambda positions: [positions[:1]],
        lambda positions: [],
        lambda positions: [positions, positions[:1]],
        lambda positions: [positions[[0, 0, 1]]],
        lambda positions: [positions + 1],
    ],
    ids=["left-out", "none", "repeated", "repeated-within", "of-hits"],
)
def test_batches_that_miss_or_repeat_positions_are_refused(batches):
    # otherwise the answer would hold rows of memory that nobody wrote
    store = TensorStore()
    keys = content_keys(["a", "b", "c", "d"])
    store.put_many(keys[3:], torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="for 3 distinct misses; give each exactly once"):
        read_through(keys, lambda positions: torch.ones(len(positions), 1), store, batches=batches)


@pytest.mark.parametrize("batches", [0, -1])
def test_batches_below_one_are_refused(batches):
    with pytest.raises(ConfigError, match=rf"batches is {batches}; give the keys per call, at least 1"):
        read_through(["a"], lambda positions: [1], MemoryStore(), batches=batches)


def test_batching_function_is_not_asked_about_hits():
    def never(positions):
        raise AssertionError("there is nothing to split")

    assert read_through(["a"], lambda positions: [1], MemoryStore({"a": 0}), batches=never) == [0]


def test_duplicates_beside_hits_are_answered_from_the_first_of_them():
    store = TensorStore()
    keys = content_keys(["hit", "x", "y", "x", "hit", "y", "x"])
    store.put_many(keys[:1], torch.tensor([[0.0]]))
    answer = read_through(keys, lambda positions: torch.from_numpy(positions).float()[:, None], store, batches=1)
    assert answer.flatten().tolist() == [0.0, 1.0, 2.0, 1.0, 0.0, 2.0, 1.0]


def test_compute_gets_positions_into_the_keys_it_was_given():
    seen = []
    read_through(["h", "a", "h", "b"], lambda p: seen.append(p) or [0] * len(p), MemoryStore({"h": 1}))
    (positions,) = seen
    assert isinstance(positions, np.ndarray) and positions.tolist() == [1, 3]


def test_a_look_up_that_the_caller_did_is_not_done_again():
    store = MemoryStore()
    store.put_many(["a"], ["A"])
    found = store.get_many(["a", "b", "a"])
    store.get_many = None  # not called
    asked = []
    answer = read_through(["a", "b", "a"], lambda positions: asked.extend(positions) or ["B"], store, found=found)
    assert answer == ["A", "B", "A"] and asked == [1]


def test_an_answer_is_not_what_was_computed_but_a_copy_of_it():
    output = torch.ones(2, 3)  # as a graph of CUDA writes each of its outputs to the same place
    keys = content_keys(["a", "b", "c", "d"])
    store = TensorStore()
    first = read_through(keys[:2], lambda positions: output, store)
    read_through(keys[2:], lambda positions: output.mul_(5), store)
    assert first.tolist() == [[1.0] * 3] * 2


def test_values_may_be_sent_in_one_by_one_as_a_coroutine_gets_them():
    store, keys = MemoryStore(), ["a", "b", "a", "c"]
    store.put_many(["b"], ["B"])
    steps, asked = reading_through(keys, store, batches=1), []
    values = None
    with pytest.raises(StopIteration) as end:
        while True:
            positions = steps.send(values)
            asked.append(positions.tolist())
            values = [keys[position].upper() for position in positions]
    assert asked == [[0], [3]]
    assert end.value.value == ["A", "B", "A", "C"]


def test_stop_iteration_in_a_computation_is_no_answer():
    def ends(positions):
        raise StopIteration

    with pytest.raises(StopIteration):
        read_through(["a"], ends, MemoryStore())


def test_mapping_that_makes_up_values_has_no_hits_of_its_own():
    store = MemoryStore(collections.defaultdict(list))
    assert read_through(["a"], lambda positions: ["computed"], store) == ["computed"]
