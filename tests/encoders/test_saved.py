"""A saved encoder is data: nothing in its directory can name, or be, code."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder
from quatcache.errors import FormatError


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def template(wordllama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SentenceTransformerEncoder(wordllama).save(folder)
    return folder


@pytest.fixture
def saved(template, tmp_path):
    import shutil

    return shutil.copytree(template, tmp_path / "encoder")


def change(file, **entries):
    document = json.loads(file.read_text())
    if isinstance(entries.get("settings"), dict) and entries["settings"]:
        entries = {"settings": {**document["settings"], **entries["settings"]}}
    document.update(entries)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "weights.pt", "deep/er/state.PKL"])
def test_file_that_could_run_code_is_refused_before_anything_is_loaded(saved, tmp_path, name):
    trace = tmp_path / "trace"
    file = saved / "model" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(FormatError, match="could run code when loaded; save the model with safetensors"):
        SentenceTransformerEncoder.load(saved)
    assert not trace.exists()


@pytest.mark.parametrize(
    "kind", ["os.system", "tests.encoders_for_tests.TableEncoder", "sentence_transformersX.models.Pooling", 5]
)
def test_module_type_of_another_package_is_refused(saved, kind):
    file = saved / "model" / "modules.json"
    modules = json.loads(file.read_text())
    modules[0]["type"] = kind
    file.write_text(json.dumps(modules))
    with pytest.raises(FormatError, match=r"modules\.json names the class .*only sentence_transformers"):
        SentenceTransformerEncoder.load(saved)


def test_types_of_a_router_are_checked_too(saved):
    file = saved / "model" / "router_config.json"
    file.write_text(json.dumps({"types": {"query_0": "subprocess.Popen"}, "structure": {"query": ["query_0"]}}))
    with pytest.raises(FormatError, match=r"router_config\.json names the class 'subprocess\.Popen'"):
        SentenceTransformerEncoder.load(saved)


def test_activation_function_must_be_one_of_torch(saved):
    folder = saved / "model" / "1_Dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"in_features": 1, "activation_function": "os.getcwd"}))
    with pytest.raises(FormatError, match=r"names the class 'os\.getcwd'; only torch\.nn\.\*"):
        SentenceTransformerEncoder.load(saved)


def test_routes_come_back(wordllama, tmp_path):
    import copy

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

    routes = {"query": [copy.deepcopy(wordllama[0]), Normalize()], "document": [copy.deepcopy(wordllama[0])]}
    model = SentenceTransformer(modules=[Router(routes, default_route="document"), Dense(256, 8)], device="cpu")
    encoder = SentenceTransformerEncoder(model, role="query")
    encoder.save(tmp_path)
    loaded = SentenceTransformerEncoder.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(loaded.collate(["a b"])), encoder(encoder.collate(["a b"])))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 2}, r"encoder\.json has format 2, this version reads 1; upgrade quatcache"),
        ({"kind": "transformers"}, "is of kind 'transformers', not 'sentence_transformers'"),
        ({"settings": []}, "does not hold the settings of an encoder"),
        ({"settings": {"trust_remote_code": True}}, "trust_remote_code = True is not a setting of this kind"),
        ({"settings": {"prompt": 5}}, "prompt = 5 is not a setting of this kind"),
        ({"settings": {"truncate_dim": True}}, "truncate_dim = True is not a setting of this kind"),
        ({"settings": {"dtype": "load"}}, "dtype 'load'"),
        ({"settings": {}}, "lacks the setting 'dtype'"),
    ],
)
def test_settings_are_checked_one_by_one(saved, entries, message):
    change(saved / "encoder.json", **entries)
    with pytest.raises(FormatError, match=message):
        SentenceTransformerEncoder.load(saved)


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000])
def test_damaged_settings_are_named(saved, content):
    file = saved / "encoder.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    for encoder_class in (SentenceTransformerEncoder, TransformersEncoder):
        with pytest.raises(FormatError, match=r"encoder\.json"):
            encoder_class.load(saved)


def test_damaged_model_is_named(saved):
    (saved / "model" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match="model cannot be loaded"):
        SentenceTransformerEncoder.load(saved)


def test_missing_model_is_named(saved):
    import shutil

    shutil.rmtree(saved / "model")
    with pytest.raises(FormatError, match="model does not exist; save the encoder again"):
        SentenceTransformerEncoder.load(saved)
