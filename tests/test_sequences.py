"""The batch type of sequences: it looks like a batch of rows, and travels as tensors do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch.utils._pytree import tree_map

from quatcache import PaddedSequences
from quatcache.errors import EncoderOutputError


def some():
    values = torch.arange(24.0).reshape(3, 4, 2)
    return PaddedSequences(values, torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]]))


def test_length_shape_and_elements_are_those_of_the_sequences():
    sequences = some()
    assert len(sequences) == 3 and sequences.shape == (3, 4, 2) and sequences.row_shape == (None, 2)
    assert sequences.mask.dtype is torch.bool and sequences.lengths.tolist() == [2, 0, 2]
    assert sequences.elements[:, 0].tolist() == [2.0, 4.0, 16.0, 20.0]


def test_normalised_sequences_are_padded_on_the_right_with_zeros_and_no_wider_than_needed():
    tidy = some().normalised()
    assert tidy.mask.tolist() == [[True, True], [False, False], [True, True]]
    assert tidy.values[..., 0].tolist() == [[2.0, 4.0], [0.0, 0.0], [16.0, 20.0]]
    assert some()[:0].normalised().shape == (0, 0, 2)


@pytest.mark.parametrize("which", [torch.tensor([2, 0]), torch.tensor([2, 0]).numpy(), slice(None, None, 2)])
def test_selection_selects_sequences(which):
    assert {tuple(one.tolist()) for one in some()[which].mask} == {
        (False, True, True, False),
        (True, False, True, False),
    }
    assert len(some()[which]) == 2


def test_concatenated_batches_are_as_wide_as_the_widest():
    together = PaddedSequences.concatenate([some()[:1].normalised(), some()])
    assert together.shape == (4, 4, 2) and together.lengths.tolist() == [2, 2, 0, 2]
    assert together.elements[:, 0].tolist() == [2.0, 4.0, 2.0, 4.0, 16.0, 20.0]


def test_dtype_changes_the_values_and_not_the_mask():
    for half in (some().to(torch.float16), some().to(dtype=torch.float16), some().to("cpu", torch.float16)):
        assert half.dtype is torch.float16 and half.mask.dtype is torch.bool
        assert half.elements.tolist() == some().elements.tolist()


def test_they_cannot_be_taken_apart_as_if_they_were_a_tuple():
    with pytest.raises(TypeError, match="not iterable"):
        _values, _mask = some()


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (torch.zeros(3, 4, 2), torch.zeros(3, 5).bool()),
        (torch.zeros(3, 4, 2), torch.zeros(3, 4)),  # perhaps -inf for what is left out
        (torch.zeros(3), torch.zeros(3).bool()),
        (torch.zeros(3, 4, 2), torch.zeros(3, 4, 2).bool()),
    ],
)
def test_values_and_mask_that_do_not_fit_are_refused(values, mask):
    with pytest.raises(EncoderOutputError, match=r"sequences of values \(3.*; give values \(B, L, \*shape\)"):
        PaddedSequences(values, mask)


def test_copies_hold_the_same():
    for twin in (copy.deepcopy(some()), pickle.loads(pickle.dumps(some()))):
        assert torch.equal(twin.values, some().values) and torch.equal(twin.mask, some().mask)


def test_lightning_moves_both_tensors():
    moved = move_data_to_device({"default": some(), "other": torch.zeros(1)}, torch.device("meta"))
    assert isinstance(moved["default"], PaddedSequences)
    assert moved["default"].values.device.type == moved["default"].mask.device.type == "meta"


def test_trees_of_tensors_take_them_for_a_leaf():
    assert tree_map(type, {"a": some()}) == {"a": PaddedSequences}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sequences_go_to_a_gpu_from_pinned_memory():
    moved = some().pin_memory().to("cuda", non_blocking=True)
    assert moved.values.is_cuda and moved.mask.is_cuda
    assert moved.normalised().elements.tolist() == some().elements.tolist()
