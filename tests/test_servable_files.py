"""A ServableModel comes back from safetensors and JSON alone, and nothing else of a directory is trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder
from quatcache.errors import ConfigError, FormatError, ModelDefinitionError, StoreError
from quatcache.heads import LinearHead
from quatcache.servable import ServableModel
from tests.encoders_for_tests import DoublingHead, TableEncoder

TEXTS = ["cholera", "acute myocardial infarction", "a", "Injury of the left ankle"]


@pytest.fixture
def text_model(wordllama):
    torch.manual_seed(0)
    return ServableModel({"text": SentenceTransformerEncoder(wordllama)}, LinearHead(256, 3))


def table_model(seed=0):
    torch.manual_seed(seed)
    return ServableModel({"table": TableEncoder(seed)}, LinearHead(4, 3))


def test_built_in_encoder_and_head_come_back_alone(text_model, tmp_path):
    text_model.save(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model")
    assert torch.equal(again.encode(TEXTS), text_model.encode(TEXTS))
    assert not any(module.training for module in again.modules())
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_both_text_adapters_come_back(minilm, minilm_path, tmp_path):
    encoders = {
        "st": SentenceTransformerEncoder(minilm, prompt="q: "),
        "hf": TransformersEncoder(minilm_path, pooling="cls"),
    }
    model = ServableModel(encoders, LinearHead(768, 2))
    model.save(tmp_path / "model")
    assert torch.equal(ServableModel.load(tmp_path / "model").encode(TEXTS), model.encode(TEXTS))


def test_instances_of_the_users_own_get_the_saved_tensors(tmp_path):
    model = ServableModel({"table": TableEncoder(seed=1)}, DoublingHead())
    with torch.no_grad():
        model.head.factor.fill_(5.0)
    model.save(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder(seed=2)}, head=DoublingHead())
    assert torch.equal(again.encode([4, 9]), model.encode([4, 9]))


def test_subclass_of_a_built_in_encoder_is_the_users_own(wordllama, tmp_path):
    class Shifted(SentenceTransformerEncoder):
        def forward(self, inputs):
            return super().forward(inputs) + 1

    Shifted.__qualname__ = SentenceTransformerEncoder.__qualname__
    model = ServableModel({"text": Shifted(wordllama)}, LinearHead(256, 2))
    model.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="encoder 'text' is of a class that its files cannot rebuild"):
        ServableModel.load(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model", encoders={"text": Shifted(wordllama)})
    assert torch.equal(again.encode(TEXTS), model.encode(TEXTS))


def test_half_precision_head_comes_back_as_such(tmp_path):
    model = ServableModel({"table": TableEncoder()}, LinearHead(4, 2).double())
    model.save(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder()})
    assert {parameter.dtype for parameter in again.head.parameters()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in again.head.parameters())


@pytest.mark.parametrize(
    "name", ["../../outside", "/absolute", "a/b", "..", "", "con", "keys", "a.b", "\u00e9\n", "x" * 300]
)
def test_name_of_an_encoder_never_becomes_a_path(tmp_path, name):
    folder = tmp_path / "inner" / "model"
    model = ServableModel({name: TableEncoder(3)}, LinearHead(4, 2))
    model.save(folder)
    assert {entry.name for entry in folder.iterdir()} == {"servable.json", "head.safetensors", "encoders"}
    assert [entry.name for entry in (folder / "encoders").iterdir()] == ["0"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]
    again = ServableModel.load(folder, encoders={name: TableEncoder()})
    assert torch.equal(again.encode([5]), model.encode([5]))


def test_saving_again_replaces_the_model(tmp_path):
    first, second = table_model(1), table_model(2)
    first.save(tmp_path / "model")
    (tmp_path / "model" / "encoders" / "7").mkdir()
    second.save(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder()})
    assert torch.equal(again.encode([1]), second.encode([1]))
    assert not (tmp_path / "model" / "encoders" / "7").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(ConfigError, match="exists and holds no saved model; choose another path"):
        table_model().save(tmp_path)
    with pytest.raises(ConfigError, match="exists and holds no saved model"):
        table_model().save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "three years"


def test_failure_while_saving_keeps_what_was_there(tmp_path, monkeypatch):
    first = table_model(1)
    first.save(tmp_path / "model")

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quatcache.servable_files.save_file", full)
    with pytest.raises(StoreError, match=r"model cannot be written .*No space left.*free space"):
        table_model(2).save(tmp_path / "model")
    again = ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder()})
    assert torch.equal(again.encode([1]), first.encode([1]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_failure_of_the_last_step_puts_the_old_model_back(tmp_path, monkeypatch):
    first = table_model(1)
    first.save(tmp_path / "model")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StoreError, match="Permission denied"):
        table_model(2).save(tmp_path / "model")
    monkeypatch.undo()
    again = ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder()})
    assert torch.equal(again.encode([1]), first.encode([1]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_encoder_that_cannot_be_saved_leaves_nothing_behind(own_minilm, tmp_path):
    class Scale(nn.Module):
        def forward(self, features):
            return features

    own_minilm.append(Scale())
    with pytest.raises(ModelDefinitionError, match="cannot be rebuilt from data"):
        ServableModel({"x": SentenceTransformerEncoder(own_minilm)}, nn.Identity()).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path):
    ServableModel({"table": TableEncoder(1)}, LinearHead(4, 2)).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"encoder 'table' is of a class that its files cannot rebuild; pass an instance: encoders=\{'table'"),
        ({"encoders": {"tabel": TableEncoder()}}, "encoder 'tabel' is not part of the saved model; leave it out"),
        (
            {"encoders": {"table": TableEncoder()}, "head": nn.Identity()},
            "the head LinearHead is rebuilt from its files",
        ),
    ],
)
def test_missing_or_superfluous_instance_is_named(saved, arguments, message):
    with pytest.raises(ConfigError, match=message):
        ServableModel.load(saved, **arguments)


def test_instance_of_a_built_in_encoder_is_not_needed(text_model, wordllama, tmp_path):
    text_model.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="encoder 'text' is rebuilt from its files; leave it out"):
        ServableModel.load(tmp_path / "model", encoders={"text": SentenceTransformerEncoder(wordllama)})


def test_missing_head_is_asked_for(tmp_path):
    ServableModel({"table": TableEncoder()}, DoublingHead()).save(tmp_path / "model")
    with pytest.raises(
        ConfigError, match="the head is a DoublingHead, which has no registered kind; pass an instance: head="
    ):
        ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder()})


def test_head_that_does_not_fit_is_named(tmp_path):
    ServableModel({"table": TableEncoder()}, DoublingHead()).save(tmp_path / "model")
    message = r"the head that was passed does not fit .*factor.*; pass a head of the shapes that were saved"
    with pytest.raises(ConfigError, match=message):
        ServableModel.load(tmp_path / "model", encoders={"table": TableEncoder()}, head=nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 2}, "has format 2, this version of quatcache reads 1; upgrade quatcache"),
        ({"encoders": {}}, "lists no encoder"),
        ({"encoders": [None]}, "lists the encoder None"),
        (
            {"encoders": [{"name": "table", "kind": "os.system"}]},
            "known kinds are sentence_transformers, transformers, lower_layers, custom",
        ),
        ({"encoders": [{"name": 5, "kind": "custom"}]}, "lists the encoder {'name': 5"),
        ({"encoders": [{"name": "table", "kind": ["custom"]}]}, "lists the encoder"),
        ({"encoders": [{"name": "table", "kind": "custom"}] * 2}, "lists the encoder 'table' twice"),
        ({"encoders": []}, "lists no encoder"),
        ({"head": "os.system"}, "describes the head as 'os.system'"),
        ({"head": {"kind": "os.system", "config": {}}}, "does not fit the head LinearHead .*'os.system' is unknown"),
        (
            {"head": {"kind": "linear", "config": {"input_embedding_size": 4, "output_size": 9}}},
            "does not fit the head",
        ),
    ],
)
def test_hostile_index_is_named(saved, entries, message):
    file = saved / "servable.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    with pytest.raises(FormatError, match=message):
        ServableModel.load(saved, encoders={"table": TableEncoder()})


@pytest.mark.parametrize("name", ["servable.json", "head.safetensors", "encoders/0/weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated"])
def test_damaged_file_is_named(saved, name, damage):
    file = saved / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "garbage": b"\xff" * 100, "truncated": content[:-5]}[damage])
    with pytest.raises(FormatError, match=Path(name).name.replace(".", r"\.")):
        ServableModel.load(saved, encoders={"table": TableEncoder()})


def test_saved_head_is_plain_safetensors(saved):
    state = load_file(saved / "head.safetensors")
    assert sorted(tuple(tensor.shape) for tensor in state.values()) == [(2,), (2, 4)]


def test_moved_model_is_valid(saved, tmp_path):
    moved = shutil.move(saved, tmp_path / "elsewhere")
    assert ServableModel.load(moved, encoders={"table": TableEncoder()}).encode([1]).shape == (1, 2)
