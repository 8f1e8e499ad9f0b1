"""SentenceTransformerEncoder gives the rows of ``SentenceTransformer.encode``, from workers, without inference mode."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from quatcache.encoders import SentenceTransformerEncoder
from quatcache.encoders.sentence_collator import Collator
from quatcache.errors import ConfigError, ModelDefinitionError

TEXTS = ["acute myocardial infarction", "cholera", "Injury of the left ankle, subsequent encounter, with sequela", "a"]


def rows(encoder, items=TEXTS):
    with torch.no_grad():
        return encoder(encoder.collate(items))


def reference(model, items=TEXTS, method="encode", **settings):
    return getattr(model, method)(items, convert_to_tensor=True, batch_size=len(items), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt": "classify: "},
        {"normalize_embeddings": True},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
    ],
    ids=str,
)
def test_rows_equal_those_of_encode(minilm, settings):
    assert torch.allclose(
        rows(SentenceTransformerEncoder(minilm, **settings)), reference(minilm, **settings), atol=1e-6
    )


def test_subclass_with_a_collate_of_its_own_is_not_bypassed(minilm):
    class Shouting(SentenceTransformerEncoder):
        def collate(self, items):
            return super().collate([item + "!" for item in items])

    encoder = Shouting(minilm)
    expected = SentenceTransformerEncoder(minilm).collate(["cholera!"])["input_ids"].tolist()
    assert encoder.collate_fn()(["cholera"])["input_ids"].tolist() == expected
    assert encoder.collate(["cholera"])["input_ids"].tolist() == expected


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("role", [None, "query", "document"])
@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({}, None),
        ({"query": "ask: ", "document": "tell: ", "other": "else: "}, None),
        ({"query": "ask: ", "document": "tell: ", "other": "else: "}, "other"),
        ({"passage": "read: ", "other": "else: "}, "other"),
    ],
)
def test_prompt_of_each_role_is_that_of_the_library(own_minilm, include_prompt, role, prompts, default):
    own_minilm.prompts, own_minilm.default_prompt_name = prompts, default
    own_minilm.set_pooling_include_prompt(include_prompt)
    method = "encode" if role is None else f"encode_{role}"
    if not hasattr(own_minilm, method):
        pytest.skip("this version has no roles")
    expected = reference(own_minilm, method=method)
    assert torch.allclose(rows(SentenceTransformerEncoder(own_minilm, role=role)), expected, atol=1e-6)


def test_prompt_can_be_left_out_of_the_pooling(own_minilm):
    own_minilm.set_pooling_include_prompt(False)
    encoder = SentenceTransformerEncoder(own_minilm, prompt="a long prompt about diseases: ")
    assert torch.allclose(rows(encoder), reference(own_minilm, prompt="a long prompt about diseases: "), atol=1e-6)
    own_minilm.set_pooling_include_prompt(True)
    assert not torch.allclose(rows(encoder), reference(own_minilm), atol=1e-3)


def test_named_prompt_is_that_of_the_model(own_minilm):
    own_minilm.prompts = {"classify": "classify this: "}
    encoder = SentenceTransformerEncoder(own_minilm, prompt_name="classify")
    assert torch.allclose(rows(encoder), reference(own_minilm, prompt_name="classify"), atol=1e-6)
    with pytest.raises(ConfigError, match=r"prompt_name is 'nope'; the model has \['classify'\]"):
        SentenceTransformerEncoder(own_minilm, prompt_name="nope")


def test_long_texts_are_cut(own_minilm):
    encoder = SentenceTransformerEncoder(own_minilm, max_seq_length=5)
    assert encoder.collate(["one two three four five six"])["input_ids"].shape == (1, 5)
    assert torch.equal(rows(encoder, ["one two three x y z"]), rows(encoder, ["one two three a b c"]))


def test_roles_take_their_routes(minilm, wordllama):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Router

    routes = {"query": [copy.deepcopy(wordllama[0]), Normalize()], "document": [copy.deepcopy(wordllama[0])]}
    model = SentenceTransformer(modules=[Router(routes, default_route="document")], device="cpu")
    query = SentenceTransformerEncoder(model, role="query")
    document = SentenceTransformerEncoder(model, role="document")
    assert torch.allclose(rows(query), reference(model, method="encode_query"), atol=1e-6)
    assert torch.allclose(rows(document), reference(model, method="encode_document"), atol=1e-6)
    assert not torch.allclose(rows(query), rows(document), atol=1e-2)


def test_static_embeddings_do_not_depend_on_their_batch(wordllama):
    encoder = SentenceTransformerEncoder(wordllama)
    assert encoder.embedding_size == 256
    alone = torch.cat([rows(encoder, [text]) for text in TEXTS])
    assert torch.equal(rows(encoder), alone)


@pytest.mark.parametrize("truncate_dim", [None, 100, 1000])
def test_embedding_size_is_that_of_the_rows(own_minilm, truncate_dim):
    encoder = SentenceTransformerEncoder(own_minilm, truncate_dim=truncate_dim)
    assert encoder.embedding_size == rows(encoder).shape[1]
    own_minilm.truncate_dim = 50
    assert encoder.embedding_size == rows(encoder).shape[1] if truncate_dim is None else True


def test_path_and_loaded_model_agree(minilm, minilm_path):
    from_path = SentenceTransformerEncoder(minilm_path)
    assert torch.equal(rows(from_path), rows(SentenceTransformerEncoder(minilm)))
    assert {parameter.device.type for parameter in from_path.parameters()} == {"cpu"}


def test_frozen_model_is_frozen_at_once(own_minilm):
    own_minilm.requires_grad_(True).train()
    encoder = SentenceTransformerEncoder(own_minilm)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    nn.Sequential(encoder).train()
    assert torch.equal(rows(encoder), rows(encoder))


def test_trainable_model_receives_gradients(own_minilm):
    encoder = SentenceTransformerEncoder(own_minilm, trainable=True).train()
    encoder(encoder.collate(TEXTS)).pow(2).sum(dim=1).mul(torch.arange(4.0)).sum().backward()
    assert encoder.model[0].auto_model.encoder.layer[0].attention.self.query.weight.grad is not None
    assert encoder.model[0].auto_model.training


def test_rows_can_be_used_in_a_backward_pass(minilm):
    result = rows(SentenceTransformerEncoder(minilm))
    assert not result.is_inference()
    head = nn.Linear(384, 2)
    head(result).sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("include_prompt", [True, False])
def test_forward_leaves_its_inputs_as_they_were(own_minilm, include_prompt):
    own_minilm.set_pooling_include_prompt(include_prompt)
    encoder = SentenceTransformerEncoder(own_minilm, prompt="classify: ")
    inputs = encoder.collate(TEXTS)
    before = copy.deepcopy(inputs)
    first = encoder(inputs)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], value) for name, value in before.items() if isinstance(value, torch.Tensor))
    assert torch.equal(encoder(inputs), first)


def test_pooling_that_writes_into_the_mask_leaves_the_inputs_alone(own_minilm):
    class InPlace(nn.Module):
        def __init__(self, pooling):
            super().__init__()
            self.pooling = pooling

        def forward(self, features):
            features["attention_mask"][:, : features["prompt_length"]] = 0  # as in sentence-transformers 3
            return self.pooling(features)

    own_minilm[1] = InPlace(own_minilm[1])
    encoder = SentenceTransformerEncoder(own_minilm, prompt="a long prompt: ")
    inputs = encoder.collate(TEXTS)
    before = inputs["attention_mask"].clone()
    first = encoder(inputs)
    assert torch.equal(inputs["attention_mask"], before)
    assert torch.equal(encoder(inputs), first)


def test_collate_fn_is_light_and_collates_alike(minilm):
    encoder = SentenceTransformerEncoder(minilm, prompt="classify: ")
    pickled = pickle.dumps(encoder.collate_fn())
    assert len(pickled) < 2_000_000  # the weights are 90 MB
    again, direct = pickle.loads(pickled)(TEXTS), encoder.collate(TEXTS)
    assert again.keys() == direct.keys()
    assert torch.equal(again["input_ids"], direct["input_ids"])
    assert all(parameter.device.type == "cpu" for parameter in minilm.parameters())


def test_collate_runs_in_a_spawned_worker(minilm):
    encoder = SentenceTransformerEncoder(minilm)
    loader = DataLoader(
        TEXTS, batch_size=4, num_workers=1, collate_fn=encoder.collate_fn(), multiprocessing_context="spawn"
    )
    (inputs,) = list(loader)
    with torch.no_grad():
        assert torch.equal(encoder(inputs), rows(encoder))


class OldModel:
    """What sentence-transformers 3 offers instead of ``preprocess``: it neither takes a prompt nor measures it."""

    def __init__(self, model):
        self.model = model

    def tokenize(self, texts):
        return {name: value for name, value in self.model.preprocess(texts).items() if name != "modality"}


@pytest.mark.parametrize("prompt", [None, "a long prompt: "])
def test_older_library_collates_alike(own_minilm, prompt):
    own_minilm.set_pooling_include_prompt(False)
    encoder = SentenceTransformerEncoder(own_minilm, prompt=prompt)
    inputs = Collator(OldModel(own_minilm), prompt, None)(TEXTS)
    assert inputs.get("prompt_length") == encoder.collate(TEXTS).get("prompt_length")
    with torch.no_grad():
        assert torch.equal(encoder(inputs), rows(encoder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"role": "passage"}, "role is 'passage'; pass 'query', 'document' or None"),
        ({"prompt": "a", "prompt_name": "b"}, "prompt is 'a' and prompt_name is 'b'; pass one of them"),
        ({"truncate_dim": 0}, "truncate_dim is 0; pass a number of at least 1"),
        ({"max_seq_length": True}, "max_seq_length is True; pass a number of at least 1"),
        ({"max_seq_length": "9"}, "max_seq_length is '9'; pass a number of at least 1"),
    ],
)
def test_wrong_setting_is_named(minilm, settings, message):
    with pytest.raises(ConfigError, match=message):
        SentenceTransformerEncoder(minilm, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "classify: ", "normalize_embeddings": True, "truncate_dim": 32, "max_seq_length": 17},
        {"role": "query"},
    ],
    ids=str,
)
def test_saved_encoder_comes_back(own_minilm, tmp_path, settings):
    own_minilm.prompts = {"query": "ask: "}
    encoder = SentenceTransformerEncoder(own_minilm, **settings)
    encoder.save(tmp_path)
    loaded = SentenceTransformerEncoder.load(tmp_path)
    assert torch.equal(rows(loaded), rows(encoder))
    assert (loaded.prompt, loaded.role) == (encoder.prompt, encoder.role)
    assert not loaded.training
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".txt"}


def test_no_prompt_stays_none_beside_the_default_of_the_model(own_minilm, tmp_path):
    own_minilm.prompts, own_minilm.default_prompt_name = {"other": "else: "}, "other"
    encoder = SentenceTransformerEncoder(own_minilm)
    assert encoder.prompt == "else: "
    encoder.prompt = None
    encoder.save(tmp_path)
    assert not SentenceTransformerEncoder.load(tmp_path).prompt


def test_half_precision_survives_saving(own_minilm, tmp_path):
    encoder = SentenceTransformerEncoder(own_minilm.to(torch.bfloat16))
    encoder.save(tmp_path)
    assert json.loads((tmp_path / "encoder.json").read_text())["settings"]["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in SentenceTransformerEncoder.load(tmp_path).parameters()} == {torch.bfloat16}


def test_static_model_comes_back(wordllama, tmp_path):
    encoder = SentenceTransformerEncoder(wordllama)
    encoder.save(tmp_path)
    assert torch.equal(rows(SentenceTransformerEncoder.load(tmp_path)), rows(encoder))


def test_model_with_a_module_of_the_users_own_is_not_saved(own_minilm, tmp_path):
    class Scale(nn.Module):
        def forward(self, features):
            return features

    own_minilm.append(Scale())
    with pytest.raises(ModelDefinitionError, match=r"module .*Scale that cannot be rebuilt from data"):
        SentenceTransformerEncoder(own_minilm).save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_model_with_an_adapter_that_is_not_merged_is_not_saved(own_minilm, tmp_path):
    peft = pytest.importorskip("peft")
    own_minilm[0].model = peft.get_peft_model(own_minilm[0].auto_model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ModelDefinitionError, match="not merged; call merge_and_unload"):
        SentenceTransformerEncoder(own_minilm).save(tmp_path)


@pytest.mark.parametrize("prompt", [None, "a prompt: "])
def test_static_embeddings_are_those_of_encode(wordllama, prompt):
    items = ["a text", "https://example.org/a.jpg", "/a/b.png", ""]
    encoder = SentenceTransformerEncoder(wordllama, prompt=prompt)
    with torch.no_grad():
        given = encoder(encoder.collate(items))
    assert torch.equal(given, wordllama.encode(items, prompt=prompt, convert_to_tensor=True))


@pytest.mark.parametrize("prompt", [None, "classify: "])
def test_static_embeddings_are_collated_to_what_the_library_gives(wordllama, prompt):
    items = [*TEXTS, "", "naïve café 🙂 日本語", "word " * 700]
    tokenizer = wordllama[0].tokenizer
    encoder = SentenceTransformerEncoder(wordllama, prompt=prompt)
    expected = wordllama[0].preprocess(items, prompt=prompt)
    for collate in (encoder.collate, pickle.loads(pickle.dumps(encoder.collate_fn()))):
        found = collate(items)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert wordllama[0].tokenizer is tokenizer


def test_static_embeddings_of_a_subclass_are_given_the_places_of_their_tokens(wordllama):
    class Placed(type(wordllama[0])):
        def preprocess(self, inputs, prompt=None, **settings):
            self.ends = [encoding.offsets[-1][1] for encoding in self.tokenizer.encode_batch(inputs)]
            return super().preprocess(inputs, prompt=prompt, **settings)

    model = copy.deepcopy(wordllama)
    model[0].__class__ = Placed
    SentenceTransformerEncoder(model).collate(TEXTS)
    assert model[0].ends == [len(text) for text in TEXTS]
