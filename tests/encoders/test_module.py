"""ModuleEncoder: any module, any collate function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from quatcache.encoders import ModuleEncoder
from quatcache.errors import ConfigError, EncoderOutputError
from tests.encoders_for_tests import stack_floats


def test_module_and_collate_are_used_as_they_are():
    module = nn.Linear(2, 3)
    encoder = ModuleEncoder(module, stack_floats, 3)
    assert torch.equal(encoder(encoder.collate([[1, 2], [3, 4]])), module(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    assert encoder.embedding_size == 3


def test_collate_fn_is_the_function_itself_and_runs_in_a_spawned_worker():
    encoder = ModuleEncoder(nn.Linear(1000, 1000), stack_floats, 1000)
    assert encoder.collate_fn() is stack_floats
    loader = DataLoader(
        [[1.0], [2.0]], batch_size=2, num_workers=1, collate_fn=encoder.collate_fn(), multiprocessing_context="spawn"
    )
    assert next(iter(loader)).tolist() == [[1.0], [2.0]]


def test_subclass_with_a_collate_of_its_own_is_not_bypassed():
    class Halved(ModuleEncoder):
        def collate(self, items):
            return super().collate(items) / 2

    encoder = Halved(nn.Identity(), stack_floats, 1)
    assert encoder.collate_fn()([[2.0]]).tolist() == encoder.collate([[2.0]]).tolist() == [[1.0]]


def test_frozen_module_is_frozen_at_once_and_stays_so():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    encoder = ModuleEncoder(module, stack_floats, 2).train()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(each.training for each in encoder.modules())


def test_trainable_module_trains():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    encoder = ModuleEncoder(module, stack_floats, 2, trainable=True).train()
    assert module[1].training
    encoder(encoder.collate([[1, 2]])).sum().backward()
    assert module[0].weight.grad is not None


def test_rows_of_more_dimensions_pass():
    encoder = ModuleEncoder(nn.Unflatten(1, (2, 3)), stack_floats, 3)
    assert encoder(encoder.collate([[0.0] * 6])).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((len, stack_floats, 3), "module is a builtin_function_or_method; pass a torch.nn.Module"),
        ((nn.Identity(), 7, 3), "collate is a int; pass a function"),
        ((nn.Identity(), stack_floats, 0), "embedding_size is 0; pass the size"),
        ((nn.Identity(), stack_floats, "3"), "embedding_size is '3'; pass the size"),
        ((nn.Identity(), stack_floats, True), "embedding_size is True; pass the size"),
    ],
)
def test_wrong_argument_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ModuleEncoder(*arguments)


def test_output_that_is_no_tensor_is_named():
    encoder = ModuleEncoder(nn.LSTM(2, 3), stack_floats, 3)
    with pytest.raises(EncoderOutputError, match="LSTM returned a tuple; wrap it in a module"):
        encoder(encoder.collate([[1, 2]]))
