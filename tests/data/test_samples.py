"""Samples: what a dataset may return, and the columns and items that a batch makes of it."""

from __future__ import annotations

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch

from quatcache.data import ReadSample, SimilarityGroupSample, SimilarityPairSample, read_sample
from quatcache.data.samples import (
    GROUPS,
    LAYOUTS,
    PAIRS,
    arranged_items,
    common_layout,
    in_columns,
    target_column,
    target_columns,
)
from quatcache.errors import SampleError

Row = namedtuple("Row", "text topic")


@pytest.mark.parametrize(
    "sample",
    [
        ("a", 3),
        ["a", 3],
        Row("a", 3),
        SimilarityGroupSample("a", 3),
        SimilarityGroupSample(obj="a", group=3),
        {"text": "a", "label": 3},
        {"labels": 3, "sentence": "a"},
        UserDict(text="a", label=3),
    ],
    ids=lambda sample: str(sample),
)
def test_item_with_a_target_is_a_group_sample(sample):
    assert read_sample(sample) == ReadSample(GROUPS, ("a",), (3,))


def test_mapping_of_several_entries_is_the_item_without_its_label():
    sample = {"title": "a", "text": "b", "label": 3}
    assert read_sample(sample) == ReadSample(GROUPS, ({"title": "a", "text": "b"},), (3,))
    assert sample == {"title": "a", "text": "b", "label": 3}


def test_absent_and_empty_targets_are_targets():
    assert read_sample(("a", None)).targets == (None,)
    assert read_sample({"text": None, "label": 0}) == ReadSample(GROUPS, (None,), (0,))


def test_pair_sample_has_two_items_a_score_and_a_subgroup():
    assert read_sample(SimilarityPairSample("a", "b")) == ReadSample(PAIRS, ("a", "b"), (1.0, 0))
    read = read_sample(SimilarityPairSample("a", "b", score=np.float32(0.5), subgroup=torch.tensor(7)))
    assert read == ReadSample(PAIRS, ("a", "b"), (0.5, 7))
    assert [type(target) for target in read.targets] == [float, int]


@pytest.mark.parametrize(
    "sample",
    [
        "ab",
        ("a",),
        ("a", 1, 2),
        (),
        7,
        None,
        {"text": "a"},
        {"label": 1},
        {},
        {"text": "a", "label": 1, "labels": 2},
        torch.ones(2),
    ],
    ids=repr,
)
def test_other_kinds_are_refused_with_the_remedy(sample):
    with pytest.raises(SampleError, match=r"the dataset returned .*; return \(item, target\), .* override read_sample"):
        read_sample(sample)


@pytest.mark.parametrize("wrong", [{"score": None}, {"score": "high"}, {"subgroup": None}, {"subgroup": "b"}], ids=str)
def test_pair_without_numbers_is_refused_by_name(wrong):
    (value,) = wrong.values()
    with pytest.raises(SampleError, match=rf"a pair has .*{value!r}.*; give a number each"):
        read_sample(SimilarityPairSample("a", "b", **wrong))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], torch.int64),
        ([0.5, 1.0], torch.float32),
        ([True, False], torch.bool),
        ([torch.tensor([1, 2]), torch.tensor([3, 4])], torch.int64),
        ([torch.tensor(0.5), torch.tensor(1.0)], torch.float32),
        ([np.array([1.0, 2.0]), np.array([3.0, 4.0])], torch.float64),
        ([np.int32(1), np.int32(2)], torch.int32),
        ([torch.ones(2).bfloat16()], torch.bfloat16),
    ],
    ids=str,
)
def test_numbers_become_a_tensor(values, dtype):
    column = target_column(values)
    assert isinstance(column, torch.Tensor) and column.dtype == dtype and len(column) == len(values)
    for row, value in zip(column, values, strict=True):
        assert torch.equal(row, torch.as_tensor(value, dtype=dtype))


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b"],
        [1, 2.0],
        [1, True],
        [1, None],
        [2**70, 1],
        [torch.ones(2), torch.ones(3)],
        [np.ones(2), np.ones(3)],
        [np.array("a"), np.array("b")],
        [torch.ones(2), np.ones(2)],
        [[1], [2]],
        [],
    ],
    ids=str,
)
def test_other_values_stay_a_list(values):
    column = target_column(values)
    assert isinstance(column, list) and len(column) == len(values)
    assert all(mine is value for mine, value in zip(column, values, strict=True))


def test_default_float_dtype_is_that_of_the_program():
    torch.set_default_dtype(torch.float64)
    try:
        assert target_column([0.5]).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_items_of_a_batch_are_first_ones_then_second_ones():
    pairs = [read_sample(SimilarityPairSample(f"q{n}", f"a{n}")) for n in range(3)]
    assert arranged_items(pairs) == ["q0", "q1", "q2", "a0", "a1", "a2"]
    assert arranged_items([read_sample((n, 0)) for n in range(3)]) == [0, 1, 2]


def test_targets_of_a_batch_are_columns():
    scores, subgroups = target_columns([read_sample(SimilarityPairSample("q", "a", 0.5 * n, n)) for n in range(3)])
    assert scores.tolist() == [0.0, 0.5, 1.0] and subgroups.tolist() == [0, 1, 2]
    (groups,) = target_columns([read_sample(("a", n)) for n in range(3)])
    assert groups.tolist() == [0, 1, 2]


def test_pair_losses_get_pairs_labels_and_subgroups():
    labels, subgroups = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([4, 5, 6])
    pairs, given, doubled = PAIRS.loss_arguments((labels, subgroups))
    assert pairs.tolist() == [[0, 3], [1, 4], [2, 5]]  # an item and its partner among the 2B embeddings
    assert given is labels and doubled.tolist() == [4, 5, 6, 4, 5, 6]


def test_group_losses_get_groups_as_they_are():
    groups = (torch.tensor([1, 2]),)
    assert GROUPS.loss_arguments(groups) is groups
    assert {name: layout.items_per_sample for name, layout in LAYOUTS.items()} == {"group": 1, "pair": 2}


def test_mixed_samples_are_refused():
    samples = [read_sample(("a", 1)), read_sample(SimilarityPairSample("a", "b"))]
    with pytest.raises(SampleError, match="one batch mixes group and pair samples; let a dataset return one kind"):
        common_layout(samples)
    assert common_layout(samples[:1]) is GROUPS and common_layout(samples[1:]) is PAIRS


@pytest.mark.parametrize("sample", [("a", 0, 1), ("a",), ()], ids=len)
def test_columns_take_tuples_of_two_alone(sample):
    assert in_columns([("a", 0), ("b", 1)], read_sample) == (GROUPS, ["a", "b"], ([0, 1],))
    with pytest.raises(SampleError, match="return \\(item, target\\)"):
        in_columns([("a", 0), sample], read_sample)


def test_columns_of_other_samples_are_those_of_their_reader():
    pairs = [SimilarityPairSample("a", "b", 0.5), SimilarityPairSample("c", "d", 1)]
    assert in_columns(pairs, read_sample) == (PAIRS, ["a", "b", "c", "d"], ((0.5, 1.0), (0, 0)))
    swapped = in_columns([(0, "a"), (1, "b")], lambda sample: read_sample(sample[::-1]))
    assert swapped == (GROUPS, ["a", "b"], ((0, 1),))
