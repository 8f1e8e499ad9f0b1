"""Sequences in row stores: beyond the common contract, what only sequences have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quatcache.errors import EncoderOutputError, FormatError
from quatcache.keys import content_keys
from quatcache.read_through import read_through
from quatcache.sequences import PaddedSequences
from quatcache.store import BudgetStore, DiskStore, TensorStore
from quatcache.store.ragged import RaggedRows
from tests.stores_for_tests import DIGEST


def numbered(lengths, start=0, shape=(2,), dtype=torch.float32):
    """Sequences whose elements are numbered on, all values of one alike; more padding than is needed."""
    width, total = max(lengths, default=0) + 2, sum(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).reshape(-1, 1)
    values = torch.full((len(lengths), width, *shape), 77).to(dtype)
    elements = torch.arange(start, start + total).reshape(-1, *(1 for _ in shape)).expand(total, *shape)
    values[mask] = elements.to(dtype)
    return PaddedSequences(values, mask)


def keys_of(count, first=0):
    return content_keys([str(number) for number in range(first, first + count)])


def equal(one, other):
    one, other = one.normalised(), other.normalised()
    return one.dtype == other.dtype and torch.equal(one.values, other.values) and torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("kind", ["tensor", "disk", "reopened", "read whole", "loaded"])
def test_sequences_of_any_element_come_back(tmp_path, kind, dtype, shape):
    given_values = numbered([3, 0, 1, 5], shape=shape, dtype=dtype)
    keys = keys_of(4)
    store = TensorStore() if kind == "tensor" else DiskStore(tmp_path, DIGEST)
    store.put_many(keys, given_values)
    if kind in {"reopened", "read whole", "loaded"}:
        store.flush()
        store = DiskStore(tmp_path, DIGEST, memory_map=kind == "reopened")
        store = store.load() if kind == "loaded" else store
    assert store.row_shape == (None, *shape)
    found = store.get_many(keys[[3, 1, 0]]).values
    assert found.shape == (3, 5, *shape) and not found.values[~found.mask].any()
    assert equal(found, given_values[torch.tensor([3, 1, 0])])
    assert store.get_many(keys[[1]]).values.shape == (1, 0, *shape)


@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=5),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_rows_of_any_shards_are_gathered(tmp_path_factory, lengths, data):
    store, whole, first = DiskStore(tmp_path_factory.mktemp("rows"), DIGEST), [], 0
    for place, part in enumerate(lengths):
        whole.append(numbered(part, 100 * place))
        store.put_many(keys_of(len(part), first), whole[-1])
        first += len(part)
        if data.draw(st.booleans()):
            store.flush()
    expected = PaddedSequences.concatenate(whole)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, first - 1), max_size=12)), dtype=torch.int64)
    for one in (store, store.load()):
        assert equal(one.gather(rows), expected[rows])


@pytest.mark.parametrize("kind", ["tensor", "disk"])
def test_rows_of_one_shape_and_sequences_do_not_mix(tmp_path, kind):
    def empty(name):
        return TensorStore() if kind == "tensor" else DiskStore(tmp_path / name, DIGEST)

    store = empty("sequences")
    store.put_many(keys_of(1), numbered([2]))
    with pytest.raises(EncoderOutputError, match=r"a row of shape \(2,\) came after sequences"):
        store.put_many(keys_of(1, 1), torch.ones(1, 2))
    with pytest.raises(EncoderOutputError, match=r"float64 came after rows of torch\.float32"):
        store.put_many(keys_of(1, 1), numbered([2], dtype=torch.float64))
    with pytest.raises(EncoderOutputError, match=r"shape \(3,\) came after rows of shape \(2,\)"):
        store.put_many(keys_of(1, 1), numbered([2], shape=(3,)))
    assert len(store) == 1 and equal(store.get_many(keys_of(2)).values, numbered([2]))
    store = empty("rows")
    store.put_many(keys_of(1), torch.ones(1, 2))
    with pytest.raises(EncoderOutputError, match=r"a sequence came after rows of shape \(2,\)"):
        store.put_many(keys_of(1, 1), numbered([2]))


def test_sequences_do_not_go_into_a_directory_of_rows(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    store.put_many(keys_of(1), torch.ones(1, 2))
    store.flush()
    with pytest.raises(FormatError, match=r"holds rows of shape \(2,\) .* the encoder gave shape \(None, 2\)"):
        DiskStore(tmp_path, DIGEST).put_many(keys_of(1, 1), numbered([2]))


def test_many_small_shards_are_packed_and_open_stores_keep_their_numbers(tmp_path):
    writer, reader = DiskStore(tmp_path, DIGEST), None
    for place in range(10):
        writer.put_many(keys_of(2, 2 * place), numbered([place % 4, 1], 100 * place))
        writer.flush()
        reader = reader or DiskStore(tmp_path, DIGEST)
    writer.put_many(keys_of(1), numbered([6], 7000))  # again, and longer
    expected = writer.get_many(keys_of(20)).values
    reader.refresh()
    numbers = torch.from_numpy(reader.rows_of(keys_of(20)))
    writer.compact()
    assert len(list(tmp_path.glob("shard-*"))) == 1
    reader.refresh()
    late = DiskStore(tmp_path, DIGEST)
    for store in (writer, late, late.load()):
        assert equal(store.get_many(keys_of(20)).values, expected)
    assert equal(reader.gather(numbers)[torch.arange(1, 20)], expected[torch.arange(1, 20)])
    assert late.manifest.longest == 6 and late.nbytes < writer.nbytes


def test_row_that_was_put_again_before_a_commit_is_stored_once(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    store.put_many(keys_of(3), numbered([2, 3, 1]))
    number = torch.from_numpy(store.rows_of(keys_of(1)))
    store.put_many(keys_of(1), numbered([4], 50))
    store.flush()
    assert equal(store.get_many(keys_of(1)).values, numbered([4], 50))
    assert equal(store.gather(number), numbered([2]))  # its number was given out
    again = DiskStore(tmp_path, DIGEST)
    assert len(again) == 3 and again.nbytes == (4 + 3 + 1) * 8 + 3 * 16
    assert equal(again.get_many(keys_of(3)).values, PaddedSequences.concatenate(
        [numbered([4], 50), numbered([3, 1], 2)]))  # fmt: skip


def test_no_padding_is_stored(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    mask = torch.zeros(2, 10_000, dtype=torch.bool)
    mask[:, 5] = True
    store.put_many(keys_of(2), PaddedSequences(torch.ones(2, 10_000, 8), mask))
    assert store.nbytes == 2 * 8 * 4 + 2 * 16
    store.flush()
    assert sum(path.stat().st_size for path in tmp_path.glob("shard-*")) < 1000


@pytest.mark.parametrize("memory_map", [True, False])
def test_loaded_store_holds_the_rows_once(tmp_path, memory_map):
    store = DiskStore(tmp_path, DIGEST, dtype=torch.float16)
    for place in range(3):
        store.put_many(keys_of(4, 4 * place), numbered([1, 0, 3, 2], 10 * place))
        store.flush()
    store = DiskStore(tmp_path, DIGEST, dtype=torch.float16, memory_map=memory_map)
    loaded = store.load()
    assert isinstance(loaded.rows, RaggedRows) and loaded.rows.dtype is torch.float16
    assert len(loaded.rows.values) == 18 and loaded.nbytes == store.nbytes
    places = {shard.values.data_ptr() for shard in store._placed.parts}
    assert (places == {loaded.rows.values.data_ptr()}) is not memory_map  # read whole, they are shared
    for one in (store, loaded):
        found = one.get_many(keys_of(12)[::-1].copy()).values
        assert found.dtype is torch.float32
        assert found.lengths.tolist() == [2, 3, 0, 1] * 3 and found.values[0, 0].tolist() == [24.0, 24.0]


def test_overflow_in_the_padding_does_not_matter_and_elsewhere_is_refused():
    store = TensorStore(dtype=torch.float16)
    values = torch.tensor([[[1.0], [7e4]]])
    store.put_many(keys_of(1), PaddedSequences(values, torch.tensor([[1, 0]])))
    with pytest.raises(EncoderOutputError, match=r"a value of 7e\+04 does not fit"):
        store.put_many(keys_of(1, 1), PaddedSequences(values, torch.tensor([[1, 1]])))
    assert len(store) == 1


def test_replacing_sequences_by_longer_ones_leaves_their_numbers():
    store = TensorStore()
    store.put_many(keys_of(4), numbered([1, 2, 3, 0]))
    numbers = store.rows_of(keys_of(4))
    store.put_many(keys_of(4)[[3, 1]], numbered([5, 4], 40))
    assert store.rows_of(keys_of(4)).tolist() == numbers.tolist()
    assert store.get_many(keys_of(4)).values.lengths.tolist() == [1, 4, 3, 5]
    moved = store.to("cpu")
    assert equal(moved.gather(torch.from_numpy(numbers)), store.gather(torch.from_numpy(numbers)))


def test_hits_and_misses_of_other_widths_are_put_together():
    store, lengths = TensorStore(dtype=torch.float16), [2, 9, 0, 4, 1, 7]
    whole = numbered(lengths)
    store.put_many(keys_of(6)[[3, 0]], whole[torch.tensor([3, 0])])
    asked = np.array([5, 0, 3, 5, 1, 2, 0])
    calls = []

    def compute(positions):
        calls.append(len(positions))
        return whole[torch.from_numpy(asked[positions])]

    answer = read_through(keys_of(6)[asked], compute, store, batches=1)
    assert calls == [1, 1, 1] and equal(answer, whole[torch.from_numpy(asked)])
    assert answer.shape == (7, 9, 2) and not answer.values[~answer.mask].any()


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_budget_counts_the_elements_of_sequences(dtype):
    store = BudgetStore(TensorStore(dtype=dtype), max_size=200, dtype=dtype)
    width = 4 if dtype is None else 2
    lengths = [9, 1, 2, 30, 1, 4]
    store.put_many(keys_of(6), numbered(lengths))
    sizes = np.cumsum([length * 2 * width + 16 for length in lengths])
    fitting = int((sizes <= 200).sum())
    assert 0 < fitting < 6 and len(store) == fitting and store.nbytes == sizes[fitting - 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sequences_on_a_gpu_are_those_of_the_disk(tmp_path):
    store = DiskStore(tmp_path, DIGEST, dtype=torch.bfloat16)
    for place in range(3):
        store.put_many(keys_of(4, 4 * place), numbered([1, 0, 3, 2], 10 * place).to("cuda"))
        store.flush()
    loaded, asked = store.load("cuda"), keys_of(12)[[7, 0, 11, 7, 1]]
    found = loaded.get_many(asked).values
    assert found.values.is_cuda and found.mask.is_cuda and equal(found.cpu(), store.get_many(asked).values)
    numbers = torch.from_numpy(loaded.rows_of(asked)).cuda()
    assert equal(loaded.gather(numbers), found)
    loaded.put_many(keys_of(2, 11), numbered([6, 1], 90).to("cuda"))
    assert loaded.get_many(keys_of(2, 11)).values.lengths.tolist() == [6, 1]
