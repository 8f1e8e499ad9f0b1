"""One contract that every store keeps, whatever it keeps its values in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from hypothesis import given, settings
from hypothesis import strategies as st

from quatcache.errors import EncoderOutputError
from quatcache.keys import content_keys
from quatcache.sequences import PaddedSequences
from quatcache.store import DiskStore, Found, MemoryStore, TensorStore
from tests.stores_for_tests import DIGEST, EXACT, STORES, opened

NUMBERS = list(range(10))


@pytest.fixture(params=EXACT)
def case(request):
    with opened(request.param) as opened_case:
        yield opened_case


@pytest.fixture(params=[name for name in EXACT if name != "memory"])
def rows(request):
    with opened(request.param) as opened_case:
        yield opened_case


def positions(found):
    assert isinstance(found.positions, np.ndarray) and found.positions.dtype == np.int64
    return found.positions.tolist()


@pytest.mark.parametrize("name", STORES)
def test_empty_store_has_nothing(name):
    with opened(name) as case:
        keys = case.keys([1, 2])
        assert len(case.store) == 0
        assert case.store.missing(keys).tolist() == [0, 1]
        found = case.store.get_many(keys)
        assert positions(found) == [] and len(found.values) == 0


def test_only_hits_are_returned_in_the_order_asked(case):
    case.store.put_many(case.keys([3, 1, 7]), case.values([3, 1, 7]))
    found = case.store.get_many(case.keys([1, 9, 7, 8, 3, 1]))
    assert positions(found) == [0, 2, 4, 5]
    assert case.plain(found.values) == case.plain(case.values([1, 7, 3, 1]))


@pytest.mark.parametrize("number", NUMBERS)
def test_absence_is_no_value(case, number):
    # None, zero, False, empty, NaN and infinity are values like others
    case.store.put_many(case.keys([number]), case.values([number]))
    found = case.store.get_many(case.keys([number, "absent"]))
    assert positions(found) == [0]
    assert case.plain(found.values) == case.plain(case.values([number]))
    assert case.store.missing(case.keys([number, "absent"])).tolist() == [1]


def test_put_replaces(case):
    case.store.put_many(case.keys(["a", "b"]), case.values([4, 5]))
    case.store.put_many(case.keys(["c", "a"]), case.values([6, 7]))
    assert len(case.store) == 3
    found = case.store.get_many(case.keys(["a", "b", "c"]))
    assert case.plain(found.values) == case.plain(case.values([7, 5, 6]))


def test_declined_value_does_not_leave_the_old_one_in_its_place():
    store = MemoryStore(LRUCache(maxsize=4, getsizeof=len))
    store.put_many(["a", "b"], ["old", "b"])
    store.put_many(["a"], ["too long"])
    assert store.missing(["a", "b"]).tolist() == [0]


def test_empty_batches_change_nothing(case):
    case.store.put_many(case.keys([]), case.values([]))
    assert len(case.store) == 0
    case.store.put_many(case.keys([1]), case.values([1]))
    case.store.put_many(case.keys([]), case.values([]))
    assert len(case.store) == 1
    assert case.store.missing(case.keys([])).tolist() == []
    found = case.store.get_many(case.keys([]))
    assert positions(found) == [] and len(found.values) == 0


def test_assemble_puts_values_in_the_order_of_positions(case):
    case.store.put_many(case.keys([1]), case.values([1]))
    parts = [
        Found(np.array([3, 0]), case.values([3, 0])),
        Found(np.array([], np.int64), case.values([])),
        Found(np.array([2, 4, 1]), case.values([2, 4, 1])),
    ]
    assert case.plain(case.store.assemble(5, parts)) == case.plain(case.values([0, 1, 2, 3, 4]))


def test_assembling_nothing_gives_nothing(case):
    assert len(case.store.assemble(0, [])) == 0


@pytest.mark.parametrize("name", STORES)
@given(
    puts=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=5), max_size=5),
    asked=st.lists(st.integers(0, 8), max_size=8),
)
@settings(max_examples=25, deadline=None)
def test_store_behaves_like_a_dict(name, puts, asked):
    model = {}
    with opened(name) as case:
        for pairs in puts:
            batch = dict(pairs)  # distinct keys
            case.store.put_many(case.keys(list(batch)), case.values(list(batch.values())))
            model.update(batch)
        missing = case.store.missing(case.keys(asked)).tolist()
        found = case.store.get_many(case.keys(asked))
        assert sorted(missing + positions(found)) == list(range(len(asked)))
        held = [asked[position] for position in positions(found)]
        assert case.plain(found.values) == case.plain(case.values([model[key] for key in held]))
        if case.keeps_everything:
            assert missing == [place for place, key in enumerate(asked) if key not in model]
            assert len(case.store) == len(model)


# Row stores ------------------------------------------------------------------------------------------------------


def test_rows_are_found_by_number(rows):
    rows.store.put_many(rows.keys([3, 1]), rows.values([3, 1]))
    rows.store.put_many(rows.keys([7]), rows.values([7]))
    numbers = rows.store.rows_of(rows.keys([7, 2, 1, 3]))
    assert numbers.dtype == np.int64 and numbers[1] == -1 and sorted(numbers[[0, 2, 3]].tolist()) == [0, 1, 2]
    taken = rows.store.gather(torch.from_numpy(numbers[[0, 2, 3, 0]]))
    assert rows.plain(taken) == rows.plain(rows.values([7, 1, 3, 7]))


def test_gather_gives_a_tensor_of_its_own(rows):
    rows.store.put_many(rows.keys([4]), rows.values([4]))
    number = torch.from_numpy(rows.store.rows_of(rows.keys([4])))
    rows.tensor(rows.store.gather(number)).fill_(99.0)
    assert rows.plain(rows.store.gather(number)) == rows.plain(rows.values([4]))


def test_what_was_put_may_be_changed_afterwards(rows):
    values = rows.values([4, 5])
    rows.store.put_many(rows.keys([4, 5]), values)
    rows.tensor(values).fill_(99.0)
    assert rows.plain(rows.store.get_many(rows.keys([4, 5])).values) == rows.plain(rows.values([4, 5]))


def test_rows_know_their_shape_and_size(rows):
    assert rows.store.row_shape is None and rows.store.nbytes == 0
    values = rows.values([4, 5, 6])
    rows.store.put_many(rows.keys([1, 2, 3]), values)
    narrow = isinstance(rows.store, TensorStore) and rows.store.rows.dtype is torch.float16
    width = 2 if narrow else 4
    if isinstance(values, PaddedSequences):  # of 0, 1 and 2 elements, and two places each
        assert rows.store.row_shape == (None, 2)
        assert rows.store.nbytes == 3 * 2 * width + 3 * 2 * 8
    else:
        assert rows.store.row_shape == (2,)
        assert rows.store.nbytes == 3 * 2 * width


def test_rows_carry_no_gradient(rows):
    values = rows.values([5])
    rows.tensor(values).requires_grad_()
    rows.store.put_many(rows.keys([1]), values)
    assert not rows.tensor(rows.store.get_many(rows.keys([1])).values).requires_grad


def test_rows_put_in_inference_mode_can_be_replaced_and_trained_on(rows):
    with torch.inference_mode():
        rows.store.put_many(rows.keys([4, 5]), rows.values([9, 5]))
    rows.store.put_many(rows.keys([4]), rows.values([6]))
    head = torch.nn.Linear(2, 1)
    found = rows.store.get_many(rows.keys([4, 5])).values
    head(rows.tensor(found)).sum().backward()
    # of sequences 6 has two elements, (6, 6) and (6, 7), and 5 has one
    expected = [[17.0, 18.0]] if isinstance(found, PaddedSequences) else [[11.0, 11.0]]
    assert head.weight.grad.tolist() == expected


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("kind", ["tensor", "disk", "reopened", "loaded"])
def test_rows_of_any_shape_and_dtype_come_back(tmp_path, kind, dtype, shape):
    values = (torch.arange(4 * max(1, int(np.prod(shape)))) % 2)[: 4 * int(np.prod(shape))].reshape(4, *shape)
    values = values.to(getattr(torch, dtype))
    keys = content_keys(list("abcd"))
    store = TensorStore() if kind == "tensor" else DiskStore(tmp_path, DIGEST)
    store.put_many(keys[:3], values[:3])
    if kind in {"reopened", "loaded"}:
        store.flush()
        store = DiskStore(tmp_path, DIGEST)
    if kind == "loaded":
        store = store.load()
    assert store.row_shape == shape and torch.equal(store.get_many(keys[:3]).values, values[:3])
    store.put_many(keys[3:], values[3:])
    found = store.get_many(keys[[3, 1]])
    assert found.values.dtype == values.dtype and store.row_shape == shape
    assert torch.equal(found.values, values[[3, 1]])
    assert torch.equal(store.gather(torch.from_numpy(store.rows_of(keys))), values)


@pytest.mark.parametrize("kind", ["tensor", "disk"])
def test_row_of_another_shape_or_dtype_is_refused_and_nothing_is_lost(tmp_path, kind):
    store = TensorStore() if kind == "tensor" else DiskStore(tmp_path, DIGEST)
    keys = content_keys(["a", "b"])
    store.put_many(keys[:1], torch.tensor([[1, 2]]))
    with pytest.raises(EncoderOutputError, match=r"shape \(3,\) came after rows of shape \(2,\)"):
        store.put_many(keys[1:], torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(EncoderOutputError, match=r"float32 came after rows of torch\.int64"):  # 2.5 must not become 2
        store.put_many(keys[1:], torch.tensor([[2.5, 2.5]]))
    assert store.missing(keys).tolist() == [1] and len(store) == 1
    assert store.get_many(keys).values.tolist() == [[1, 2]]


@pytest.mark.parametrize("kind", ["tensor", "disk", "reopened"])
def test_storage_dtype_narrows_rows_and_lookups_widen_them(tmp_path, kind):
    store = TensorStore(dtype=torch.float16) if kind == "tensor" else DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    third = torch.full((2, 3), 1 / 3)
    store.put_many(content_keys(["a", "b"]), third)
    if kind == "reopened":
        store.flush()
        store = DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    got = store.get_many(content_keys(["b"])).values
    assert got.dtype == torch.float32 and torch.equal(got, third[:1].half().float())
    assert store.nbytes == 12


@pytest.mark.parametrize("kind", ["tensor", "disk"])
def test_storage_dtype_leaves_whole_numbers_alone(tmp_path, kind):
    store = TensorStore(dtype=torch.float16) if kind == "tensor" else DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    big = torch.tensor([[2**40 + 1]])
    store.put_many(content_keys(["a"]), big)
    assert torch.equal(store.get_many(content_keys(["a"])).values, big)


@pytest.mark.parametrize("beside", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["tensor", "disk"])
def test_overflow_into_the_storage_dtype_is_refused(tmp_path, kind, beside):
    # also where another row of the batch is infinite already, as the encoder gave it
    store = TensorStore(dtype=torch.float16) if kind == "tensor" else DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    keys = content_keys(["a", "b"])
    with pytest.raises(EncoderOutputError, match=r"a value of 7e\+04 does not fit .*float16; use .*bfloat16"):
        store.put_many(keys, torch.tensor([[beside], [-7e4]]))
    assert len(store) == 0 and store.missing(keys).tolist() == [0, 1]
    store.put_many(keys, torch.tensor([[1.0], [2.0]], dtype=torch.float64))  # what was refused left no trace
    assert store.get_many(keys).values.dtype == torch.float64


@pytest.mark.parametrize("kind", ["tensor", "disk"])
def test_infinity_itself_can_be_stored_narrow(tmp_path, kind):
    store = TensorStore(dtype=torch.float16) if kind == "tensor" else DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    store.put_many(content_keys(["a"]), torch.tensor([[float("inf"), 1.0]]))
    assert store.get_many(content_keys(["a"])).values.tolist() == [[float("inf"), 1.0]]


def test_tensor_store_grows_beyond_its_capacity_and_keeps_row_numbers():
    store = TensorStore(capacity=2)
    keys = content_keys([str(n) for n in range(50)])
    for start in range(0, 50, 7):
        store.put_many(keys[start : start + 7], torch.arange(start, min(start + 7, 50)).reshape(-1, 1))
        assert store.rows_of(keys[:7]).tolist() == list(range(7))
    assert store.gather(torch.from_numpy(store.rows_of(keys))).flatten().tolist() == list(range(50))
    assert store.rows.shape == (50, 1)


def test_tensor_store_moved_to_a_device_keeps_row_numbers():
    store = TensorStore(dtype=torch.float16)
    keys = content_keys(["a", "b", "c"])
    store.put_many(keys, torch.arange(3.0).reshape(3, 1))
    moved = store.to("cpu")
    assert moved.rows_of(keys).tolist() == store.rows_of(keys).tolist()
    assert moved.get_many(keys).values.dtype == torch.float32
    assert moved.get_many(keys).values.tolist() == [[0.0], [1.0], [2.0]]
