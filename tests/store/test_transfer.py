"""Rows on their way to a device: they travel in the storage dtype, and arrive as the encoder gave them.

The device "meta" stands in for a GPU: it has shapes, dtypes and a place, which is what these tests are about.
"""

from __future__ import annotations

import pytest
import torch

from quatcache.keys import content_keys
from quatcache.sequences import PaddedSequences
from quatcache.store import BudgetStore, DiskStore, TensorStore, placed, transfer

META = torch.device("meta")
NUMBERS = torch.tensor([7, 0, 11, 7, 3])


@pytest.fixture
def sent(monkeypatch):
    """Dtype and kind of what was sent to another device."""
    calls = []
    send = transfer.send

    def note(values, device):
        if device is not None and values.device != device:
            calls.append(values.dtype)
        return send(values, device)

    for module in (transfer, placed):
        monkeypatch.setattr(module, "send", note)
    monkeypatch.setattr("quatcache.store.ragged.send", note)
    return calls


def vectors(place):
    return torch.arange(12.0).reshape(4, 3) + 12 * place


def sequences(place):
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1]], dtype=torch.bool)
    return PaddedSequences(torch.arange(24.0).reshape(4, 2, 3) * mask[..., None] + place, mask).normalised()


def in_memory(folder, dtype):
    return TensorStore(dtype=dtype)


def in_budget(folder, dtype):
    return BudgetStore(TensorStore(dtype=dtype), 10**6, dtype)


def in_one_shard(folder, dtype):
    return DiskStore(folder, "0" * 32, dtype=dtype)


def in_shards(folder, dtype):
    return DiskStore(folder, "0" * 32, dtype=dtype, shard_bytes=1)


STORES = [in_memory, in_budget, in_one_shard, in_shards]


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [vectors, sequences])
@pytest.mark.parametrize("make", STORES)
def test_rows_travel_as_they_are_stored_and_arrive_as_they_were_given(make, rows, dtype, sent, tmp_path):
    store = make(tmp_path, dtype)
    for place in range(3):
        store.put_many(content_keys([f"{place} {n}" for n in range(4)]), rows(place))
    if isinstance(store, DiskStore):
        store.flush()
    here, there = store.gather(NUMBERS), store.gather(NUMBERS, META)
    assert (there.shape, there.dtype, there.device) == (here.shape, torch.float32, META)
    assert set(sent) == {dtype or torch.float32}
    assert store.gather(NUMBERS, torch.device("cpu")).dtype == torch.float32


@pytest.mark.parametrize("rows", [vectors, sequences])
@pytest.mark.parametrize("make", [in_one_shard, in_shards])
def test_rows_can_be_touched_wherever_they_are_and_give_the_same_afterwards(make, rows, tmp_path):
    store = make(tmp_path, None)
    store.touch(torch.tensor([0]))  # nothing is there
    for place in range(3):
        store.put_many(content_keys([f"{place} {n}" for n in range(4)]), rows(place))
    before = store.gather(NUMBERS)
    store.touch(NUMBERS)  # some are not committed
    store.flush()
    store.touch(NUMBERS)
    store.touch(torch.tensor([], dtype=torch.int64))
    after = store.gather(NUMBERS)
    if rows is sequences:
        before, after = before.values, after.values
    assert torch.equal(before, after)


def test_touching_reads_every_page_of_a_wide_row(monkeypatch):
    asked = []
    select = torch.Tensor.index_select

    def note(tensor, dim, index):
        asked.append(tensor.shape[1])
        return select(tensor, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", note)
    monkeypatch.setattr(transfer.mmap, "PAGESIZE", 4096)
    transfer.touch_pages(torch.zeros(2, 5, 1024), torch.tensor([1]))
    assert asked == [5, 1]


def test_what_is_there_already_is_not_copied():
    values = torch.ones(2)
    assert transfer.send(values, None) is values
    assert transfer.send(values, torch.device("cpu")) is values


def test_rows_on_the_cpu_get_memory_of_their_own_each_time():
    store = TensorStore()
    store.put_many(content_keys(["a", "b"]), torch.ones(2, 3))
    first = store.gather(torch.tensor([0]), torch.device("cpu"))
    second = store.gather(torch.tensor([0]), torch.device("cpu"))
    second.zero_()
    assert first.sum() == 3 and store.gather(torch.tensor([0])).sum() == 3
