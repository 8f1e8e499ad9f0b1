"""TransformersEncoder: pooling by the mask, truncation, prompts, and a collate function without the model."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from quatcache.encoders import TransformersEncoder
from quatcache.errors import ConfigError, EncoderOutputError, FormatError, ModelDefinitionError
from quatcache.heads.pooling import pool

TEXTS = ["acute myocardial infarction", "cholera", "Injury of the left ankle, subsequent encounter", "a"]


def rows(encoder, items=TEXTS):
    with torch.no_grad():
        return encoder(encoder.collate(items))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_padding_does_not_change_a_row(bert, tokenizer, pooling, side):
    tokenizer.padding_side = side
    encoder = TransformersEncoder(bert, tokenizer, pooling=pooling)
    # A model of absolute positions sees left padding, so the rows are pooled from one and the same hidden states.
    inputs = encoder.collate(TEXTS)
    with torch.no_grad():
        hidden = bert(**inputs).last_hidden_state
    kept = [states[mask.bool()] for states, mask in zip(hidden, inputs["attention_mask"], strict=True)]
    expected = {"mean": [k.mean(0) for k in kept], "cls": [k[0] for k in kept], "last_token": [k[-1] for k in kept]}
    assert torch.allclose(rows(encoder), torch.stack(expected[pooling]), atol=1e-6)


def test_mean_pooling_and_normalisation_equal_sentence_transformers(minilm, bert, tokenizer):
    encoder = TransformersEncoder(bert, tokenizer, normalize=True, max_length=256)
    assert torch.allclose(rows(encoder), minilm.encode(TEXTS, convert_to_tensor=True), atol=1e-6)


def test_half_precision_is_averaged_in_single():
    hidden = torch.full((1, 3000, 2), 60.0, dtype=torch.float16)  # the sum, 180,000, is no half
    assert pool(hidden, torch.ones(1, 3000, dtype=torch.int64), "mean").tolist() == [[60.0, 60.0]]


def test_half_precision_model_gives_rows_of_its_dtype(tokenizer, bert):
    assert rows(TransformersEncoder(copy.deepcopy(bert).to(torch.bfloat16), tokenizer)).dtype == torch.bfloat16


def test_path_brings_its_tokenizer(minilm_path, bert, tokenizer):
    assert torch.equal(rows(TransformersEncoder(minilm_path)), rows(TransformersEncoder(bert, tokenizer)))
    assert torch.equal(rows(TransformersEncoder(bert, minilm_path)), rows(TransformersEncoder(bert, tokenizer)))


def test_prompt_comes_before_every_text(bert, tokenizer):
    with_prompt = TransformersEncoder(bert, tokenizer, prompt="query: ")
    plain = TransformersEncoder(bert, tokenizer)
    assert torch.equal(rows(with_prompt, ["a", "b c"]), rows(plain, ["query: a", "query: b c"]))


@pytest.mark.parametrize(("limit", "expected"), [(64, 64), (10**30, 512), (2000, 512)])
def test_maximal_length_is_what_tokenizer_and_model_can_take(bert, tokenizer, limit, expected):
    tokenizer.model_max_length = limit
    encoder = TransformersEncoder(bert, tokenizer)
    assert encoder.max_length == expected
    assert encoder.collate(["word " * 3000])["input_ids"].shape == (1, expected)


def test_frozen_and_trainable(bert, tokenizer):
    own = copy.deepcopy(bert).requires_grad_(True).train()
    frozen = TransformersEncoder(own, tokenizer)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.train().modules())
    own = copy.deepcopy(bert).requires_grad_(True)
    trained = TransformersEncoder(own, tokenizer, trainable=True).train()
    trained(trained.collate(TEXTS)).sum().backward()
    assert own.embeddings.word_embeddings.weight.grad is not None
    assert own.training


def test_forward_leaves_its_inputs_as_they_were(bert, tokenizer):
    encoder = TransformersEncoder(bert, tokenizer)
    inputs = encoder.collate(TEXTS)
    before = copy.deepcopy(inputs)
    assert not encoder(inputs).is_inference()
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in before)


def test_collate_runs_in_a_spawned_worker_without_the_model(bert, tokenizer):
    encoder = TransformersEncoder(bert, tokenizer, prompt="x: ")
    assert len(pickle.dumps(encoder.collate_fn())) < 2_000_000
    loader = DataLoader(
        TEXTS, batch_size=4, num_workers=1, collate_fn=encoder.collate_fn(), multiprocessing_context="spawn"
    )
    (inputs,) = list(loader)
    with torch.no_grad():
        assert torch.equal(encoder(inputs), rows(encoder))


def test_subclass_with_a_collate_of_its_own_is_not_bypassed(bert, tokenizer):
    class Shouting(TransformersEncoder):
        def collate(self, items):
            return super().collate([item + "!" for item in items])

    encoder = Shouting(bert, tokenizer)
    expected = TransformersEncoder(bert, tokenizer).collate(["cholera!"])["input_ids"].tolist()
    assert encoder.collate_fn()(["cholera"])["input_ids"].tolist() == expected
    assert encoder.collate(["cholera"])["input_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'; pass 'mean', 'cls' or 'last_token'"),
        ({"max_length": 0}, "max_length is 0; pass a number of at least 1"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle'; pass 'left', 'right' or None"),
    ],
)
def test_wrong_setting_is_named(bert, tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        TransformersEncoder(bert, tokenizer, **settings)


def test_model_without_hidden_states_is_named(bert, tokenizer):
    class Scores(nn.Module):
        config = bert.config
        device = torch.device("cpu")

        def forward(self, **inputs):
            return {"logits": inputs["input_ids"]}

    encoder = TransformersEncoder(Scores(), tokenizer)
    with pytest.raises(EncoderOutputError, match="Scores returned no last_hidden_state; load the model with AutoModel"):
        encoder(encoder.collate(["a"]))


def test_model_of_unknown_size_is_named(tokenizer):
    class Sizeless(nn.Module):
        config = SimpleNamespace()

    with pytest.raises(ModelDefinitionError, match="Sizeless has no hidden_size; wrap the model in a ModuleEncoder"):
        _ = TransformersEncoder(Sizeless(), tokenizer).embedding_size


def test_saved_encoder_comes_back(bert, tokenizer, tmp_path):
    settings = {"pooling": "cls", "normalize": True, "max_length": 9, "prompt": "p: ", "truncation_side": "left"}
    encoder = TransformersEncoder(bert, tokenizer, **settings)
    encoder.save(tmp_path)
    loaded = TransformersEncoder.load(tmp_path)
    assert torch.equal(rows(loaded), rows(encoder))
    assert all(getattr(loaded, name) == value for name, value in settings.items() if name != "truncation_side")
    assert loaded.tokenizer.truncation_side == "left"
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".txt"}


def test_model_that_would_come_back_as_another_class_is_not_saved(tokenizer, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    tiny = BertForMaskedLM(
        BertConfig(vocab_size=10, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    )
    with pytest.raises(ModelDefinitionError, match="BertForMaskedLM would be loaded again as BertModel"):
        TransformersEncoder(tiny, tokenizer).save(tmp_path)


def test_damaged_model_is_named(bert, tokenizer, tmp_path):
    TransformersEncoder(bert, tokenizer).save(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(FormatError, match="model cannot be loaded"):
        TransformersEncoder.load(tmp_path)
