"""Batches: the same from a cache as from the samples, in any order, through a plain DataLoader."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from quatcache.data import Batch, SimilarityPairSample, read_sample
from quatcache.data.batches import BatchReader, CachedColumns, collate_items, collate_samples, read_samples
from quatcache.data.samples import GROUPS, PAIRS
from quatcache.errors import CollateError, KeyTypeError, SampleError


class Recorded:
    """A dataset that counts how often it is read."""

    def __init__(self, samples):
        self.samples, self.read = samples, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.read.append(index)
        return self.samples[index]


class ReadInOneCall(Recorded):
    def __getitems__(self, indices):
        self.read.append(list(indices))
        return [self.samples[index] for index in indices]


def lengths(items):
    return torch.tensor([len(item) for item in items])


def joined(items):
    return "+".join(items)


TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]
LABELS = torch.tensor([4, 3, 2, 1, 0])
GROUP_DATA = list(zip(TEXTS, LABELS.tolist(), strict=True))
PAIR_DATA = [SimilarityPairSample(text, text.upper() * 2, 0.5 * place, place) for place, text in enumerate(TEXTS)]
GROUP_COLUMNS = CachedColumns({"text": torch.arange(10, 15).reshape(5, 1)}, (LABELS,), GROUPS)
PAIR_COLUMNS = CachedColumns(
    {"text": torch.stack([torch.arange(10, 15), torch.arange(20, 25)], dim=1)},
    (torch.arange(5) * 0.5, torch.arange(5)),
    PAIRS,
)


def same(one, other):
    assert len(one.targets) == len(other.targets)
    assert all(torch.equal(mine, yours) for mine, yours in zip(one.targets, other.targets, strict=True))
    assert all(mine.dtype == yours.dtype for mine, yours in zip(one.targets, other.targets, strict=True))


def test_samples_are_collated_for_every_encoder():
    batch = collate_samples([read_sample(sample) for sample in GROUP_DATA], {"length": lengths, "text": joined})
    assert isinstance(batch, Batch)
    assert batch.inputs["length"].tolist() == [1, 2, 3, 4, 5] and batch.inputs["text"] == "a+bb+ccc+dddd+eeeee"
    (groups,) = batch.targets
    assert torch.equal(groups, LABELS)


def test_items_of_pairs_are_first_ones_then_second_ones():
    batch = collate_samples([read_sample(sample) for sample in PAIR_DATA[:2]], {"text": joined})
    assert batch.inputs["text"] == "a+bb+AA+BBBB"
    pairs, labels, subgroups = batch.targets
    assert pairs.tolist() == [[0, 2], [1, 3]] and labels.tolist() == [0.0, 0.5] and subgroups.tolist() == [0, 1, 0, 1]


def test_collate_gets_no_batch_of_mixed_kinds():
    with pytest.raises(SampleError, match="mixes group and pair"):
        collate_samples([read_sample(GROUP_DATA[0]), read_sample(PAIR_DATA[0])], {"text": joined})


@pytest.mark.parametrize("kind", [Recorded, ReadInOneCall])
def test_samples_are_read_in_the_order_asked(kind):
    dataset = kind(GROUP_DATA)
    samples = read_samples(dataset, [3, 0, 3], read_sample)
    assert [sample.items for sample in samples] == [("dddd",), ("a",), ("dddd",)]
    assert dataset.read == ([[3, 0, 3]] if kind is ReadInOneCall else [3, 0, 3])


@pytest.mark.parametrize(
    ("data", "columns"), [(GROUP_DATA, GROUP_COLUMNS), (PAIR_DATA, PAIR_COLUMNS)], ids=["groups", "pairs"]
)
@given(indices=st.lists(st.integers(0, 4), min_size=1, max_size=7))
def test_cached_batch_equals_the_batch_that_is_read(data, columns, indices):
    plain = BatchReader(Recorded(data), {"text": lengths, "other": joined}, read_sample)
    expected = plain.__getitems__(indices)

    cached = BatchReader(Recorded(data), {}, read_sample, columns)
    batch = cached.__getitems__(indices)
    same(batch, expected)
    assert cached.dataset.read == []  # not a sample, not a tokenizer
    first = [10 + index for index in indices]
    rows = first if data is GROUP_DATA else first + [20 + index for index in indices]
    assert batch.inputs.keys() == {"text"} and batch.inputs["text"].tolist() == rows
    assert len(batch.inputs["text"]) == len(expected.inputs["text"])

    mixed = BatchReader(Recorded(data), {"other": joined}, read_sample, columns)
    batch = mixed.__getitems__(indices)
    same(batch, expected)
    assert mixed.dataset.read == indices
    assert batch.inputs["text"].tolist() == rows and batch.inputs["other"] == expected.inputs["other"]

    unlabelled = BatchReader(Recorded(data), {}, read_sample, replace(columns, targets=None))
    batch = unlabelled.__getitems__(indices)
    same(batch, expected)
    assert unlabelled.dataset.read == indices and batch.inputs["text"].tolist() == rows


def test_cached_targets_are_those_of_the_cache_even_where_samples_are_read():
    # one source for the targets of a run: a dataset that draws them at random would give others
    reader = BatchReader(Recorded([("a", 9)] * 5), {"other": joined}, read_sample, GROUP_COLUMNS)
    (groups,) = reader.__getitems__([1, 0]).targets
    assert groups.tolist() == [3, 4]


def test_single_index_is_a_batch_of_one():
    reader = BatchReader(Recorded(GROUP_DATA), {"text": joined}, read_sample)
    batch = reader[2]
    assert batch.inputs == {"text": "ccc"} and batch.targets[0].tolist() == [2]
    assert len(reader) == 5


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("columns", [None, GROUP_COLUMNS], ids=["read", "cached"])
def test_loader_reads_whole_batches_and_its_settings_decide_them(columns):
    def loader(dataset, collate):
        generator = torch.Generator().manual_seed(7)
        return DataLoader(dataset, 2, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)

    expected = [torch.tensor([label for _, label in batch]) for batch in loader(GROUP_DATA, as_it_is)]
    reader = BatchReader(GROUP_DATA, {} if columns else {"text": joined}, read_sample, columns)
    got = [batch.targets[0] for batch in loader(reader, as_it_is)]
    assert [batch.tolist() for batch in got] == [batch.tolist() for batch in expected] and len(got) == 2


def test_reader_travels_to_workers():
    reader = BatchReader(GROUP_DATA, {"text": joined}, read_sample)
    (one, two, last) = DataLoader(
        reader, 2, num_workers=1, collate_fn=as_it_is, multiprocessing_context="fork", timeout=60
    )
    assert [batch.inputs["text"] for batch in (one, two, last)] == ["a+bb", "ccc+dddd", "eeeee"]
    assert copy.deepcopy(reader)[0].inputs == {"text": "a"}


@pytest.mark.parametrize("culprit", [None, 0, {"no": "length"}], ids=str)
def test_collate_error_names_the_item(culprit):
    # None included: it is an item like others
    def collate(items):
        return torch.tensor([len(item) for item in items])

    if isinstance(culprit, dict):

        def collate(items):
            return torch.tensor([len(item["text"]) if isinstance(item, dict) else 1 for item in items])

    with pytest.raises(CollateError) as caught:
        collate_items("text", collate, ["a", culprit, "b"])
    assert f"encoder 'text' could not collate item {culprit!r} (" in str(caught.value)
    assert type(caught.value.__cause__).__name__ in str(caught.value) and "correct the item" in str(caught.value)


def test_collate_error_of_a_batch_says_that_no_item_is_to_blame():
    def collate(items):
        return torch.stack(items)

    with pytest.raises(CollateError, match="'image' could not collate a batch of 2 items together"):
        collate_items("image", collate, [torch.ones(2), torch.ones(3)])


def test_own_errors_of_collate_are_passed_on():
    def collate(items):
        raise KeyTypeError("as it was")

    with pytest.raises(KeyTypeError, match="as it was"):
        collate_items("text", collate, ["a"])


def test_interrupt_in_collate_is_no_error_of_an_item():
    def collate(items):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collate_items("text", collate, ["a"])
