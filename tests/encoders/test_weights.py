"""Names and digests of tensors, and copies without them."""

from __future__ import annotations

import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from quatcache.encoders import weights
from quatcache.encoders.weights import copy_without_weights, named_tensors, tensor_digest
from quatcache.errors import ModelDefinitionError


def test_every_kind_of_holder_is_named():
    class Holder(nn.Module):
        shared = torch.ones(1)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("hidden", torch.ones(2), persistent=False)
            self.plain = torch.ones(2)
            self._private = torch.ones(2)
            self.array = np.ones(2)
            self.nested = {"a": [torch.ones(1), (torch.ones(1),)]}
            self.tied = self.weight
            self.name = "no tensor"

    names = set(named_tensors(nn.Sequential(Holder())))
    expected = "weight hidden plain _private array nested.a.0 nested.a.1.0 tied shared"
    assert names == {f"0.{name}" for name in expected.split()}


def test_views_that_torch_keeps_are_not_named():
    assert set(named_tensors(nn.LSTM(2, 3))) == {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.cfloat],
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3)])
def test_digest_depends_on_values_dtype_and_shape_alone(dtype, shape):
    tensor = (torch.arange(12)[: int(np.prod(shape))].reshape(shape) % 2).to(dtype)
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) != tensor_digest(tensor.reshape(1, *shape))
    if tensor.numel():
        changed = tensor.clone()
        changed.view(-1)[-1] = not bool(changed.view(-1)[-1])
        assert tensor_digest(changed) != tensor_digest(tensor)


def test_same_bytes_of_another_dtype_are_another_tensor():
    assert tensor_digest(torch.zeros(4, dtype=torch.int8)) != tensor_digest(torch.zeros(4, dtype=torch.uint8))


def test_layout_does_not_matter():
    tensor = torch.randn(4, 5)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(tensor.to_sparse()) == tensor_digest(tensor)
    assert tensor_digest(torch.cat([tensor, tensor])[4:]) == tensor_digest(tensor)


def test_tensor_beyond_one_chunk_is_hashed_to_its_end():
    tensor = torch.zeros(64 * 2**20 + 1, dtype=torch.uint8)
    before = tensor_digest(tensor)
    tensor[-1] = 1
    assert tensor_digest(tensor) != before


def test_write_through_data_is_seen():
    parameter = nn.Parameter(torch.zeros(1000))
    before = tensor_digest(parameter)
    parameter.data[517] += 1e-3
    assert tensor_digest(parameter) != before


def test_tensor_without_data_is_refused():
    with pytest.raises(ModelDefinitionError, match=r"shape \(2,\) is on device 'meta'.*load the weights"):
        tensor_digest(torch.ones(2, device="meta"))


def test_remembered_digest_is_trusted_only_while_the_bits_are_the_same(monkeypatch):
    hashed = []
    hash_bytes = weights._hash
    monkeypatch.setattr(weights, "_hash", lambda tensor: hashed.append(1) or hash_bytes(tensor))

    def digest(tensor):
        return weights._remembered_digest(tensor, tensor.detach())

    tensor = nn.Parameter(torch.zeros(100, 33))
    first = digest(tensor)
    assert (digest(tensor), len(hashed)) == (first, 1)
    tensor.data[3, 5] += 1e-3
    changed = digest(tensor)
    assert changed != first
    tensor.data[3, 6] = tensor.data[3, 5]  # moved by one: the plain sum is the same
    tensor.data[3, 5] = 0
    assert digest(tensor) not in {first, changed}
    assert len(hashed) == 3


def test_remembered_digest_is_not_that_of_a_tensor_that_is_gone():
    tensor, gone = torch.ones(3), torch.ones(3)
    weights._remembered_digest(tensor, tensor)
    _, state, digest = weights._remembered[id(tensor)]
    # As if another tensor had had this id, this memory and these sums.
    weights._remembered[id(tensor)] = (weakref.ref(gone), state, "digest of the other")
    assert weights._remembered_digest(tensor, tensor) == digest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_digest_on_an_accelerator_is_that_of_the_cpu_and_remembered_until_a_write():
    tensor = torch.randn(1000, 33)
    moved = tensor.cuda()
    assert tensor_digest(moved) == tensor_digest(tensor)
    assert tensor_digest(moved) == tensor_digest(tensor)
    moved.data[3, 5] += 1e-3
    assert tensor_digest(moved) == tensor_digest(moved.cpu()) != tensor_digest(tensor)
    del moved
    for _ in range(20):  # memory and ids are used again
        other = torch.randn(1000, 33)
        assert tensor_digest(other.cuda()) == tensor_digest(other)


def test_copy_keeps_settings_and_ties_and_drops_values():
    model = nn.Sequential(nn.Linear(500, 500), nn.BatchNorm1d(500, eps=0.25))
    model.append(nn.Linear(500, 500))
    model[2].weight = model[0].weight
    model.table = {"size": 3}
    light = copy_without_weights(model)
    assert {tensor.device.type for tensor in (*light.parameters(), *light.buffers())} == {"meta"}
    assert light[2].weight is light[0].weight
    assert (light[1].eps, light.table) == (0.25, {"size": 3})
    assert light.table is not model.table
    assert len(pickle.dumps(light)) < 20_000
    assert model[0].weight.device.type == "cpu"
