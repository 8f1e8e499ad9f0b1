"""Inputs and batches come to a device whole, as what they were, and those that were passed stay as they are."""

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import nn
from transformers import BatchEncoding

from quatcache.data.batches import Batch
from quatcache.data.devices import to_device
from quatcache.sequences import PaddedSequences

META = torch.device("meta")


def ones():
    return torch.ones(2)


def test_moving_inputs_leaves_them_as_they_were():
    inputs = {"ids": ones(), "more": [ones(), ("x", ones())], "modality": "text", "length": 3}
    moved = to_device(inputs, META)
    assert inputs["ids"].device.type == "cpu"
    assert moved["more"][1][1].device.type == "meta"
    assert (moved["modality"], moved["length"], moved["more"][1][0]) == ("text", 3, "x")
    assert to_device(ones(), META).device.type == "meta"


@dataclass(frozen=True)
class Inputs:
    ids: Any
    name: str = "x"


class Pair(NamedTuple):
    ids: Any
    name: str = "x"


def test_containers_keep_their_types():
    for given in (
        OrderedDict(ids=ones()),
        defaultdict(list, ids=ones()),
        UserDict(ids=ones()),
        BatchEncoding({"ids": ones()}),
    ):
        moved = to_device(given, META)
        assert type(moved) is type(given) and moved["ids"].is_meta and not given["ids"].is_meta
    assert to_device(BatchEncoding({"input_ids": ones()}), META).input_ids.is_meta
    for given in (Inputs(ones()), Pair(ones())):
        moved = to_device(given, META)
        assert type(moved) is type(given) and moved.ids.is_meta and moved.name == "x" and not given.ids.is_meta
    assert to_device(MappingProxyType({"ids": ones()}), META)["ids"].is_meta
    assert to_device(PaddedSequences(torch.ones(1, 2, 3), torch.ones(1, 2) > 0), META).values.is_meta
    assert to_device(Inputs, META) is Inputs


def test_what_moves_itself_is_left_to_it():
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    moved = to_device({"default": packed}, META)["default"]
    assert type(moved) is type(packed) and moved.data.is_meta and not moved.batch_sizes.is_meta


def test_what_is_there_already_is_shared():
    values, cpu = ones(), torch.device("cpu")
    assert to_device(values, cpu) is values and to_device({"a": [values]}, cpu)["a"][0] is values


def test_batches_are_moved_by_lightning_in_one_call():
    seen = []

    class Noting(Batch):
        def to(self, device):
            seen.append(device)
            return super().to(device)

    given = Batch({"default": ones(), "other": {"ids": [ones()]}}, (ones(), "kept"))
    moved = move_data_to_device(Noting(*given), META)
    assert seen == [META] and type(moved) is Batch
    assert moved.inputs["default"].is_meta and moved.inputs["other"]["ids"][0].is_meta
    assert moved.targets[0].is_meta and moved.targets[1] == "kept"
    assert not given.inputs["default"].is_meta
