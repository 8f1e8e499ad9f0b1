"""What hints at a change of an encoder, and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quatcache.encoders import ModuleEncoder, SentenceTransformerEncoder
from quatcache.encoders.deferred import is_loaded
from quatcache.encoders.watch import Watch
from tests.tiny import write_tiny


class Settings(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = 1.0
        self.table = torch.ones(2)
        self.options = {"sizes": [1, 2]}
        self.other = type("Other", (), {})()
        self.other.side = "left"

    def forward(self, inputs):
        return self.linear(inputs) * self.scale


def set_item(module):
    module.options["sizes"][0] = 7


CHANGES = {
    "a write to a weight": lambda module: module.linear.weight.mul_(2),
    "a write to a weight that is not counted": lambda module: module.linear.weight.data.mul_(2),
    "another weight": lambda module: setattr(module.linear, "weight", nn.Parameter(torch.ones(2, 2))),
    "other memory": lambda module: setattr(module.linear.weight, "data", torch.ones(2, 2)),
    "another layer": lambda module: setattr(module, "linear", nn.Linear(2, 2)),
    "a setting": lambda module: setattr(module, "scale", 2.0),
    "a setting of another type": lambda module: setattr(module, "scale", 1),
    "a new setting": lambda module: setattr(module, "more", None),
    "a write to a plain tensor": lambda module: module.table.zero_(),
    "an entry": set_item,
    "a setting of what it holds": lambda module: setattr(module.other, "side", "right"),
    "a hook": lambda module: module.linear.register_forward_hook(lambda *_: None),
    "a cast": lambda module: module.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen(change):
    encoder = ModuleEncoder(Settings(), torch.tensor, 2)
    watch = Watch(encoder, time_func=lambda: 0.0)
    watch.remember(cost=1.0)
    encoder(encoder.collate([[1.0, 2.0]]))
    assert not watch.is_due()
    with torch.no_grad():
        change(encoder.module)
    assert watch.differs() and watch.is_due()
    watch.remember(cost=1.0)
    assert not watch.is_due()


def test_a_look_is_due_after_fifty_times_as_long_as_it_takes():
    now = 0.0
    watch = Watch(ModuleEncoder(nn.Linear(2, 2), torch.tensor, 2), time_func=lambda: now)
    assert watch.is_due()
    watch.remember(cost=2.0)
    now = 99.0
    assert not watch.is_due()
    now = 100.0
    assert watch.is_due() and not watch.differs()


def test_a_model_is_not_loaded_for_it_and_being_loaded_is_a_change(tmp_path, minilm_path):
    encoder = SentenceTransformerEncoder(write_tiny(tmp_path, minilm_path))
    watch = Watch(encoder)
    watch.remember(cost=0.0)
    assert not watch.differs() and not is_loaded(encoder)
    encoder.ensure_loaded()
    assert watch.differs()


def test_encoding_is_no_change_of_a_transformer(minilm):
    encoder = SentenceTransformerEncoder(minilm)
    encoder(encoder.collate(["oak"]))
    watch = Watch(encoder)
    watch.remember(cost=0.0)
    encoder(encoder.collate(["a longer text than before"]))
    assert not watch.differs()
    encoder.model.tokenizer.truncation_side, before = "left", encoder.model.tokenizer.truncation_side
    assert watch.differs()
    encoder.model.tokenizer.truncation_side = before
