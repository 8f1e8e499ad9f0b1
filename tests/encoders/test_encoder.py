"""The contract of Encoder: what a subclass must say, what it need not care about, and how it is saved."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import quatcache.encoders
from quatcache.encoders import Encoder, identify
from quatcache.errors import FormatError, ModelDefinitionError
from tests.encoders_for_tests import LengthEncoder, TableEncoder


def test_import_loads_no_encoder_library():
    code = (
        "import sys, quatcache.encoders as e; dir(e)\n"
        "e.Encoder, e.identify, e.SentenceTransformerEncoder, e.TransformersEncoder, e.ModuleEncoder\n"
        "print([name for name in ('sentence_transformers', 'transformers', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_name_in_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchEncoder"):
        _ = quatcache.encoders.NoSuchEncoder
    assert set(quatcache.encoders.__all__) <= set(dir(quatcache.encoders))


def test_example_of_the_design_works_as_written():
    class TableEncoder(Encoder):
        trainable = False
        embedding_size = 384

        def collate(self, items):
            return torch.tensor(items)

        def forward(self, inputs):
            return self.table[inputs]

    encoder = TableEncoder()
    encoder.table = torch.randn(10, 384)
    assert torch.equal(encoder(encoder.collate([3, 1])), encoder.table[[3, 1]])
    assert not encoder.training


def test_module_state_survives_any_order_of_init_statements():
    class Late(Encoder):
        embedding_size = 3

        def __init__(self):
            self.layer = nn.Linear(2, 3)
            super().__init__()
            self.register_buffer("offset", torch.ones(3))

        def collate(self, items):
            return torch.stack(items)

        def forward(self, inputs):
            return self.layer(inputs) + self.offset

    encoder = Late()
    assert set(encoder.state_dict()) == {"layer.weight", "layer.bias", "offset"}
    assert encoder(encoder.collate([torch.ones(2)])).shape == (1, 3)


@pytest.mark.parametrize(
    ("use", "missing"),
    [
        (lambda encoder: encoder.collate([1]), "collate"),
        (lambda encoder: encoder(torch.ones(1)), "forward"),
        (lambda encoder: encoder.embedding_size, "embedding_size"),
    ],
)
def test_missing_member_is_named_with_its_class(use, missing):
    class Unfinished(Encoder):
        pass

    with pytest.raises(ModelDefinitionError, match=rf"Unfinished has no {missing}: define"):
        use(Unfinished())


@pytest.mark.parametrize("how", ["class", "instance", "property"])
def test_embedding_size_and_trainable_may_be_defined_in_each_way(how):
    class OnInstance(Encoder):
        def __init__(self):
            self.embedding_size = 7
            self.trainable = True

    class OnProperty(Encoder):
        embedding_size = property(lambda self: 7)
        trainable = property(lambda self: True)

    class OnClass(Encoder):
        embedding_size = 7
        trainable = True

    encoder = {"class": OnClass, "instance": OnInstance, "property": OnProperty}[how]()
    assert (encoder.embedding_size, encoder.trainable) == (7, True)
    assert encoder.train().training


def test_frozen_encoder_stays_in_eval_mode_when_its_parent_trains():
    class Dropping(TableEncoder):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

    encoder = Dropping().eval()
    nn.Sequential(encoder).train()
    assert not encoder.training
    assert not encoder.dropout.training


def test_trainable_encoder_follows_its_parent():
    class Trained(TableEncoder):
        trainable = True

    encoder = Trained()
    parent = nn.Sequential(encoder)
    assert encoder.training
    assert not parent.eval()[0].training
    assert parent.train()[0].training


def test_dropout_left_on_is_not_hidden():
    class Dropping(TableEncoder):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

    assert Dropping().dropout.training


def test_defaults_see_the_whole_item_and_no_cost():
    encoder = TableEncoder()
    item = {"text": "a", "id": 3}
    assert encoder.content(item) is item
    assert encoder.length(item) == 0
    assert encoder.identity() == {}
    assert LengthEncoder().length("four") == 4


def test_collate_runs_in_a_spawned_worker():
    loader = DataLoader(
        ["ab", "c", "def"],
        batch_size=3,
        num_workers=1,
        collate_fn=LengthEncoder().collate_fn(),
        multiprocessing_context="spawn",
    )
    assert next(iter(loader)).tolist() == [[2.0, 97.0], [1.0, 99.0], [3.0, 100.0]]


def test_pickled_encoder_answers_alike():
    encoder = TableEncoder()
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(torch.tensor([5])), encoder(torch.tensor([5])))


def test_saved_tensors_come_back_bit_for_bit(tmp_path):
    encoder = TableEncoder(seed=1)
    encoder.save(tmp_path)
    loaded = TableEncoder.load(tmp_path)
    assert torch.equal(loaded.table, encoder.table)
    assert identify(loaded) == identify(encoder)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_load_of_a_class_with_arguments_says_what_to_do(tmp_path):
    class Sized(TableEncoder):
        def __init__(self, size):
            super().__init__(size)

    Sized(3).save(tmp_path)
    with pytest.raises(ModelDefinitionError, match="needs size to be made: make it yourself and call load_weights"):
        Sized.load(tmp_path)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    encoder = TableEncoder(seed=1)
    encoder.table = torch.zeros(31, 4)
    encoder.save(tmp_path / "shape")
    TableEncoder().save(tmp_path / "names")
    other = TableEncoder(seed=2)
    before = other.table.clone()
    with pytest.raises(FormatError, match=r"'table' has shape \(31, 4\), but TableEncoder has \(32, 4\)"):
        other.load_weights(tmp_path / "shape")
    other.extra = torch.ones(1)
    with pytest.raises(FormatError, match="lacks the tensor 'extra'"):
        other.load_weights(tmp_path / "names")
    assert torch.equal(other.table, before)


def test_unknown_tensor_in_a_file_is_refused(tmp_path):
    encoder = TableEncoder()
    encoder.extra = torch.ones(1)
    encoder.save(tmp_path)
    with pytest.raises(FormatError, match="has a tensor 'extra' and TableEncoder does not have one"):
        TableEncoder.load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_damaged_weights_are_named(tmp_path, damage):
    TableEncoder().save(tmp_path)
    file = tmp_path / "weights.safetensors"
    file.unlink()
    if damage == "garbage":
        file.write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match=r"weights\.safetensors cannot be read"):
        TableEncoder.load(tmp_path)
