"""ServableModel encodes as it was trained, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quatcache.encoders import ModuleEncoder
from quatcache.errors import ConfigError, EncoderOutputError, ModelDefinitionError
from quatcache.heads import LinearHead
from quatcache.servable import ServableModel
from tests.encoders_for_tests import LengthEncoder, TableEncoder, stack_floats


def table_model():
    torch.manual_seed(0)
    return ServableModel({"table": TableEncoder(0)}, LinearHead(4, 3))


def test_rows_are_concatenated_in_the_order_of_the_names():
    table, length = (
        TableEncoder(),
        ModuleEncoder(nn.Identity(), lambda items: stack_floats([[i, -i] for i in items]), 2),
    )
    model = ServableModel({"b": length, "a": table}, nn.Identity())
    rows = model.encode([7, 3])
    assert list(model.encoders) == ["a", "b"]
    assert model.embedding_size == 6
    assert torch.equal(rows, torch.cat([table.table[[7, 3]], torch.tensor([[7.0, -7.0], [3.0, -3.0]])], dim=1))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_answer_is_in_the_order_of_the_items_for_any_batch_size(batch_size):
    model = ServableModel({"x": LengthEncoder()}, nn.Identity())
    items = ["bb", "a", "dddd", "ccc", "a", "eeeee"]
    assert model.encode(items, batch_size=batch_size).tolist() == [[len(i), ord(i[0])] for i in items]


def test_items_of_like_length_are_batched_together():
    batches = []

    class Recording(LengthEncoder):
        def collate(self, items):
            batches.append([len(item) for item in items])
            return super().collate(items)

    ServableModel({"x": Recording()}, nn.Identity()).encode(["a" * n for n in (1, 9, 2, 8)], batch_size=2)
    assert batches == [[9, 8], [2, 1]]


def test_encoding_leaves_modes_and_gradients_alone():
    head = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5))
    model = ServableModel({"table": TableEncoder()}, head)
    head.train()
    first, second = model.encode([1, 2]), model.encode([1, 2])
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not first.is_inference()
    assert head[1].training
    assert not model.training


def test_nothing_encodes_to_no_rows_of_the_right_size():
    assert table_model().encode([]).shape == (0, 3)


def test_progress_bar_can_be_shown(capsys):
    table_model().encode([1, 2], show_progress_bar=True)
    assert "encoding" in capsys.readouterr().out
    table_model().encode([1, 2])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode("a text"), "items is the single text 'a text'; pass a list"),
        (lambda model: model.encode([1], batch_size=0), "batch_size is 0; pass a number of at least 1"),
        (lambda model: model.encode([1], batch_size=2.5), "batch_size is 2.5; pass a number of at least 1"),
    ],
)
def test_wrong_call_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call(table_model())


def test_head_that_loses_rows_is_named():
    class Mean(nn.Module):
        def forward(self, rows):
            return rows.mean(dim=0, keepdim=True)

    with pytest.raises(EncoderOutputError, match=r"head returned shape \(1, 4\) for 2 items; return one row per item"):
        ServableModel({"table": TableEncoder()}, Mean()).encode([1, 2])


@pytest.mark.parametrize(
    ("encoders", "head", "error", "message"),
    [
        ({}, nn.Identity(), ConfigError, "encoders is {}; pass a dict with one or more"),
        (TableEncoder(), nn.Identity(), ConfigError, "pass a dict with one or more encoders by name"),
        ({3: TableEncoder()}, nn.Identity(), ConfigError, "an encoder is named 3; names are strings"),
        ({"x": nn.Identity()}, nn.Identity(), ModelDefinitionError, "encoder 'x' is a Identity; pass a quatcache"),
        ({"x": TableEncoder()}, len, ModelDefinitionError, "head is a builtin_function_or_method; pass a torch"),
        ({"x": TableEncoder()}, LinearHead(5, 2), ConfigError, "encoders give 4 values per item, the head takes 5"),
    ],
)
def test_wrong_part_is_named(encoders, head, error, message):
    with pytest.raises(error, match=message):
        ServableModel(encoders, head)
