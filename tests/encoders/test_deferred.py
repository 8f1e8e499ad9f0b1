"""A frozen encoder that was given a name loads its model when something needs it, and not before."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from quatcache.encoders import LowerLayersEncoder, SentenceTransformerEncoder, TransformersEncoder, identify
from quatcache.encoders.deferred import is_loaded, passing_over
from quatcache.encoders.layouts import sentence_transformer_size
from quatcache.errors import ConfigError, ModelDefinitionError
from tests.tiny import SIZE, edit_json, write_tiny

TEXTS = ["a first text", "and another one, rather longer"]
ADAPTERS = {"sentence-transformers": SentenceTransformerEncoder, "transformers": TransformersEncoder}


@pytest.fixture(scope="module")
def tiny(minilm_path, tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"), minilm_path)


@pytest.fixture
def own_tiny(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture(params=sorted(ADAPTERS))
def adapter(request):
    return ADAPTERS[request.param]


def rows(encoder):
    with torch.no_grad():
        return encoder(encoder.collate(TEXTS))


def add_dense(folder, target):
    """Save a model with a layer behind it."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import Dense
    except ImportError:  # before version 5.2
        from sentence_transformers.models import Dense

    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Dense(SIZE, 5))
    model.save(str(target), create_model_card=False)


NEEDS = {
    "collate": lambda encoder: encoder.collate(TEXTS),
    "collate_fn": lambda encoder: encoder.collate_fn(),
    "model": lambda encoder: encoder.model,
    "parameters": lambda encoder: [*encoder.parameters()],
    "buffers": lambda encoder: [*encoder.buffers()],
    "modules": lambda encoder: [*encoder.modules()],
    "children": lambda encoder: [*encoder.children()],
    "state": lambda encoder: encoder.state_dict(),
    "loading a state": lambda encoder: encoder.load_state_dict(copy.deepcopy(encoder).state_dict()),
    "a parameter by name": lambda encoder: encoder.get_submodule("model"),
    "identity": identify,
    "unfreezing": lambda encoder: encoder.requires_grad_(True),
    "state of a parent": lambda encoder: nn.ModuleDict({"inner": encoder}).state_dict(),
    "parameters of a parent": lambda encoder: [*nn.ModuleDict({"inner": encoder}).parameters()],
    "a function for all modules": lambda encoder: encoder.apply(lambda module: None),
}


@pytest.mark.parametrize("need", sorted(NEEDS))
def test_whoever_looks_inside_finds_the_model(tiny, adapter, need):
    encoder, eager = adapter(tiny), adapter(tiny)
    eager.ensure_loaded()
    assert not is_loaded(encoder)
    NEEDS[need](encoder)
    assert is_loaded(encoder)
    assert encoder.state_dict().keys() == eager.state_dict().keys()
    assert torch.equal(rows(encoder), rows(eager))


def test_what_needs_no_model_loads_none(tiny, adapter):
    encoder = adapter(tiny)
    assert encoder.embedding_size == SIZE
    encoder.train().eval()
    encoder.to("cpu").cpu()
    encoder.length("text"), encoder.content("text"), repr(encoder)
    with passing_over([encoder]):
        assert [*encoder.parameters()] == []
    assert not is_loaded(encoder)


@pytest.mark.parametrize("options", [{"trainable": True}, {"prompt_name": "query"}, {"max_seq_length": 3}, {}])
def test_loaded_later_is_loaded_at_once(tiny, options):
    later, at_once = SentenceTransformerEncoder(tiny, **options), SentenceTransformerEncoder(tiny, **options)
    at_once.ensure_loaded()
    assert is_loaded(later) == options.get("trainable", False)
    assert later.prompt == at_once.prompt == ("query: " if "prompt_name" in options else None)
    assert identify(later) == identify(at_once)
    assert not later.training and torch.equal(rows(later), rows(at_once))


def test_loaded_model_gives_the_same_identity_as_its_name(tiny):
    from sentence_transformers import SentenceTransformer

    given = SentenceTransformer(str(tiny), device="cpu")
    assert identify(SentenceTransformerEncoder(given)) == identify(SentenceTransformerEncoder(tiny))


def test_casts_and_moves_are_done_when_it_is_loaded(tiny, adapter):
    early, late = adapter(tiny), adapter(tiny)
    early.ensure_loaded()
    for encoder in (early, late):
        encoder.half().to(dtype=torch.bfloat16).to("cpu")
    assert not is_loaded(late)
    assert {parameter.dtype for parameter in late.parameters()} == {torch.bfloat16}
    assert identify(early) == identify(late)
    assert not any(parameter.requires_grad for parameter in late.parameters())
    assert not any(module.training for module in late.modules())


def test_a_move_that_is_not_understood_loads(tiny):
    encoder = SentenceTransformerEncoder(tiny)
    encoder._apply(lambda tensor: tensor.double() if tensor.dtype == torch.float32 else tensor)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float64}


def test_loading_leaves_random_numbers_and_inference_mode_alone(tiny, adapter):
    class Drawing(adapter):
        def _load_model(self, *source):
            torch.rand(1), random.random(), np.random.rand()  # as weights do that are made before they are read
            return super()._load_model(*source)

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    for trainable in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        with torch.inference_mode():
            encoder = Drawing(tiny, trainable=trainable)
            encoder.ensure_loaded()
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert not any(parameter.is_inference() for parameter in encoder.parameters())
    encoder(encoder.collate(TEXTS)).sum().backward()  # what was made in inference mode could not


def test_default_dtype_of_a_step_does_not_matter(tiny):
    class Computing(SentenceTransformerEncoder):
        def _load_model(self, *source):
            model = super()._load_model(*source)
            model.register_buffer("frequencies", torch.ones(3))  # as rotary embeddings compute theirs
            return model

    encoder = Computing(tiny)
    torch.set_default_dtype(torch.bfloat16)
    try:
        encoder.ensure_loaded()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert encoder.model.frequencies.dtype == torch.float32


def test_copies_and_pickles_are_light_and_load_for_themselves(tiny, adapter, tmp_path):
    encoder = adapter(tiny)
    torch.save(encoder, tmp_path / "encoder.pt")
    copies = [
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        torch.load(tmp_path / "encoder.pt", weights_only=False),
    ]
    assert len(pickle.dumps(encoder)) < 10_000
    for other in copies:
        assert torch.equal(rows(other), rows(copies[0]))
    assert not is_loaded(encoder)


def test_relative_name_survives_a_change_of_directory(tiny, tmp_path, monkeypatch, adapter):
    monkeypatch.chdir(tiny.parent)
    encoder = adapter(tiny.name)
    monkeypatch.chdir(tmp_path)
    assert rows(encoder).shape == (2, SIZE)


def test_model_of_a_subclass_stands_first_whenever_it_is_loaded(tiny):
    class Projected(SentenceTransformerEncoder):
        def __init__(self, name):
            super().__init__(name)
            self.projection = nn.Linear(SIZE, 4).requires_grad_(False)

    encoder = Projected(tiny)
    assert not is_loaded(encoder)
    names = [name for name, _ in encoder.named_parameters()]
    assert names[0].startswith("model.") and names[-1] == "projection.bias"


def test_assigned_model_is_the_model(tiny, own_tiny):
    other = SentenceTransformerEncoder(own_tiny).model
    encoder = SentenceTransformerEncoder(tiny)
    encoder.model = other
    assert is_loaded(encoder) and encoder.model is other


def test_a_change_inside_before_anything_else_counts(tiny):
    changed = SentenceTransformerEncoder(tiny)
    changed.model.max_seq_length = 7
    assert identify(changed).facts["max_seq_length"] == 7


# What the files tell


def test_size_is_that_of_the_model(minilm_path, wordllama, tmp_path, tiny):
    wordllama.save(str(tmp_path / "static"), create_model_card=False)
    two = shutil.copytree(tiny, tmp_path / "two poolings")
    edit_json(two / "1_Pooling" / "config.json", pooling_mode_cls_token=True)
    add_dense(tiny, tmp_path / "dense")
    expected = {minilm_path: 384, tmp_path / "static": 256, tiny: SIZE, two: 2 * SIZE, tmp_path / "dense": 5}
    for folder, size in expected.items():
        assert sentence_transformer_size(folder) == size, folder
        encoder = SentenceTransformerEncoder(folder, truncate_dim=300)
        assert not is_loaded(encoder)
        assert encoder.embedding_size == min(size, 300)
        encoder.ensure_loaded()  # would refuse another size
        assert encoder.embedding_size == rows(encoder).shape[1] == min(size, 300)


def test_files_that_tell_another_size_are_refused(own_tiny):
    encoder = SentenceTransformerEncoder(own_tiny)
    edit_json(own_tiny / "1_Pooling" / "config.json", pooling_mode_cls_token=True)
    with pytest.raises(ModelDefinitionError, match="tell of embeddings of size 32, the model itself gives 64"):
        encoder.ensure_loaded()
    assert not is_loaded(encoder)


def test_model_that_cannot_be_loaded_says_so_whoever_asks(own_tiny):
    encoder = SentenceTransformerEncoder(own_tiny)
    shutil.rmtree(own_tiny)
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            [*encoder.parameters()]


NOT_UNDERSTOOD = {
    "adapter over a model elsewhere": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "weights of another kind": lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
    "code": lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "other--code"}),
    "size by another name": lambda folder: edit_json(folder / "config.json", hidden_size=None),
    "tokenizer elsewhere": lambda folder: edit_json(folder / "sentence_bert_config.json", tokenizer_name_or_path="x"),
    "module of somebody's own": lambda folder: (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "mine.Transformer"}])
    ),
    "damaged": lambda folder: (folder / "modules.json").write_text("{"),
}


@pytest.mark.parametrize("change", sorted(NOT_UNDERSTOOD))
def test_folder_that_is_not_understood_tells_nothing(own_tiny, change):
    NOT_UNDERSTOOD[change](own_tiny)
    assert sentence_transformer_size(own_tiny) is None


def test_unknown_prompt_and_missing_pad_token_are_refused_at_once(own_tiny):
    with pytest.raises(ConfigError, match="prompt_name is 'passage'"):
        SentenceTransformerEncoder(own_tiny, prompt_name="passage")
    (own_tiny / "special_tokens_map.json").unlink()
    edit_json(own_tiny / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ConfigError, match="no pad_token"):
        TransformersEncoder(own_tiny)


def test_lower_layers_are_loaded_at_once(tiny):
    assert is_loaded(LowerLayersEncoder(tiny, layers=1))


# Names on the hub


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """A local cache of the hub with one model, as huggingface_hub writes it, and no network."""
    from huggingface_hub import constants

    home = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(tiny, home / "blobs")
    snapshot = home / "snapshots" / ("0" * 40)
    for file in (home / "blobs").rglob("*"):
        place = snapshot / file.relative_to(home / "blobs")
        if file.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(file, place.parent))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
    return snapshot


def test_name_on_the_hub_is_found_in_the_local_cache(hub, tiny):
    encoder = SentenceTransformerEncoder("owner/tiny")
    assert not is_loaded(encoder) and encoder._deferred.folders == (hub,)
    assert identify(encoder) == identify(SentenceTransformerEncoder(tiny))


def test_snapshot_that_is_not_complete_is_left_to_the_library(hub):
    (hub / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="encoder 'owner/tiny' cannot be loaded"):
        SentenceTransformerEncoder("owner/tiny")


def test_name_that_is_not_there_is_refused_at_once(hub):
    with pytest.raises(ConfigError, match="encoder 'owner/other' cannot be loaded"):
        SentenceTransformerEncoder("owner/other")


def test_training_mode_that_was_asked_for_before_loading_is_that_of_the_model(tiny, adapter):
    encoder = adapter(tiny)
    encoder.trainable = True
    encoder.train()
    assert not is_loaded(encoder) and encoder.model.training
    encoder = adapter(tiny)
    encoder.train()  # a frozen one stays in eval mode
    assert not encoder.model.training


def test_tokens_are_counted_by_an_encoder_that_is_not_loaded(tiny, adapter):
    counts = adapter(tiny).token_counts(TEXTS)
    assert counts == [int(mask.sum()) for mask in adapter(tiny).collate(TEXTS)["attention_mask"]]


def test_dimensions_that_a_model_was_saved_with_are_those_of_its_rows(own_tiny):
    edit_json(own_tiny / "config_sentence_transformers.json", truncate_dim=SIZE // 2)
    encoder = SentenceTransformerEncoder(own_tiny)
    assert encoder.embedding_size == SIZE // 2 and not is_loaded(encoder)
    assert rows(encoder).shape == (2, SIZE // 2)


def test_damaged_weights_are_told_of_in_a_sentence(own_tiny):
    (own_tiny / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"cannot be loaded .*; pass a directory or a name on the hub"):
        SentenceTransformerEncoder(own_tiny).ensure_loaded()
