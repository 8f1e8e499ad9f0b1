"""A SentenceTransformer whose encode is cached does what a SentenceTransformer does, and encodes once."""

from __future__ import annotations

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util

try:
    from sentence_transformers.sentence_transformer.evaluation import (
        EmbeddingSimilarityEvaluator,
        InformationRetrievalEvaluator,
    )
except ImportError:  # before version 5.2
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator, InformationRetrievalEvaluator

from quatcache import EmbeddingCache
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.errors import ConfigError
from quatcache.integrations.sentence_transformers import CachedSentenceTransformer
from tests.fits import texts
from tests.tiny import write_tiny

TEXTS = texts(24)
has_roles = pytest.mark.skipif(not hasattr(SentenceTransformer, "encode_query"), reason="this version has no roles")


@pytest.fixture
def path(tmp_path, minilm_path):
    return write_tiny(tmp_path / "model", minilm_path)


@pytest.fixture
def plain(path):
    return SentenceTransformer(str(path), device="cpu").eval()


@pytest.fixture
def cached(path, tmp_path):
    return CachedSentenceTransformer(SentenceTransformer(str(path), device="cpu"), tmp_path / "cache")


def computed(model):
    return sum(cache.stats.computed for cache in model.caches)


def same(one, other):
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
    return np.allclose(np.asarray(one), np.asarray(other), atol=1e-6)


def test_it_is_a_sentence_transformer_made_of_the_model_it_was_given(cached, plain):
    assert isinstance(cached, SentenceTransformer)
    assert cached.similarity_fn_name == plain.similarity_fn_name and cached.device == plain.device
    assert len(list(cached.parameters())) == len(list(plain.parameters()))
    assert torch.equal(cached.similarity(torch.eye(2), torch.eye(2)), torch.eye(2))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"normalize_embeddings": True},
        {"prompt": "query: "},
        {"prompt_name": "query"},
        {"batch_size": 3},
        {"precision": "binary"},
        {"precision": "ubinary", "convert_to_tensor": True},
        {"output_value": "token_embeddings"},
        {"output_value": None},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_encode_gives_what_the_model_gives_in_whatever_form_is_asked_for(cached, plain, given):
    if not given.keys() <= inspect.signature(SentenceTransformer.encode).parameters.keys():
        pytest.skip("this version has no such argument")
    for inputs in (TEXTS, TEXTS[0], np.array(TEXTS[:3]), tuple(TEXTS[:3])):
        for _ in range(2):
            one, other = cached.encode(inputs, **given), plain.encode(inputs, **given)
            if given.get("output_value", 0) is None:
                assert type(one) is type(other)
            else:
                assert same(one, other)


def test_vectors_are_quantised_by_the_ranges_of_the_call_as_the_model_does(cached, plain):
    one, other = cached.encode(TEXTS, precision="int8"), plain.encode(TEXTS, precision="int8")
    assert one.dtype == other.dtype == np.int8
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # 1e-7 may be the other side of a step


def test_no_inputs_give_what_the_model_gives(cached, plain):
    for given in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}):
        one, other = cached.encode([], **given), plain.encode([], **given)
        assert type(one) is type(other) and len(one) == len(other) == 0
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


def test_a_model_with_a_default_prompt_puts_it_before_each_text(plain, tmp_path):
    plain.default_prompt_name = "query"
    cached = CachedSentenceTransformer(copy.deepcopy(plain), tmp_path / "cache")
    assert same(cached.encode(TEXTS), plain.encode(TEXTS))
    assert same(cached.encode(TEXTS, prompt=""), plain.encode(TEXTS, prompt=""))
    assert not np.allclose(cached.encode(TEXTS), cached.encode(TEXTS, prompt=""))


@has_roles
def test_roles_have_rows_of_their_own(cached, plain):
    queries, documents = cached.encode_query(TEXTS), cached.encode_document(TEXTS)
    assert same(queries, plain.encode_query(TEXTS)) and same(documents, plain.encode_document(TEXTS))
    assert not np.allclose(queries, documents)
    assert computed(cached) == 2 * len(TEXTS)
    assert [cache.encoder.role for cache in cached.caches] == [None, "query", "document"]
    cached.encode_query(TEXTS)
    assert computed(cached) == 2 * len(TEXTS)


def test_rows_are_those_of_the_encoder_with_the_same_settings(cached, path, tmp_path):
    cached.encode(TEXTS, normalize_embeddings=True)
    encoder = SentenceTransformerEncoder(path, normalize_embeddings=True)
    assert EmbeddingCache(encoder, tmp_path / "cache").contains(TEXTS).all()


def test_an_evaluator_of_sentence_similarity_gives_the_same_scores_and_then_encodes_nothing(minilm, tmp_path):
    pairs = list(itertools.combinations(TEXTS[:9], 2))
    scores = [len(set(one.split()) & set(other.split())) / 5 for one, other in pairs]
    evaluator = EmbeddingSimilarityEvaluator([one for one, _ in pairs], [other for _, other in pairs], scores)
    expected = evaluator(minilm)
    for encoded in (9, 0):
        cached = CachedSentenceTransformer(minilm, tmp_path / "cache")
        found = evaluator(cached)
        assert found == pytest.approx(expected, abs=1e-6) and found.keys() == expected.keys()
        assert computed(cached) == encoded


def test_an_evaluator_of_retrieval_and_semantic_search_give_the_same_results(cached, plain):
    corpus, queries = dict(enumerate(TEXTS)), {0: "alder birch", 1: "larch maple"}
    evaluator = InformationRetrievalEvaluator(
        {str(key): text for key, text in queries.items()}, {str(key): text for key, text in corpus.items()},
        {"0": {"0"}, "1": {"6"}}, mrr_at_k=[5], ndcg_at_k=[5], accuracy_at_k=[1], precision_recall_at_k=[1],
        map_at_k=[5],
    )  # fmt: skip
    assert evaluator(cached) == pytest.approx(evaluator(plain))
    asked = [model.encode(list(queries.values()), convert_to_tensor=True) for model in (cached, plain)]
    known = [model.encode(TEXTS, convert_to_tensor=True) for model in (cached, plain)]
    one, other = (util.semantic_search(*each, top_k=3) for each in zip(asked, known, strict=True))
    assert [[hit["corpus_id"] for hit in hits] for hits in one] == [
        [hit["corpus_id"] for hit in hits] for hits in other
    ]
    before = computed(cached)
    evaluator(cached)
    assert computed(cached) == before


def test_a_setting_that_is_changed_gives_other_rows(cached, plain):
    long = [" ".join(TEXTS)]
    cached.encode(long)
    cached.max_seq_length = plain.max_seq_length = 8
    assert same(cached.encode(long), plain.encode(long))
    truncated = getattr(cached, "truncate_embeddings", None) or cached.truncate_sentence_embeddings
    with truncated(5):
        assert cached.encode(long).shape == (1, 5)
    assert same(cached.encode(long), plain.encode(long))


def test_rows_in_memory_stay_while_a_context_truncates_others(path):
    cached = CachedSentenceTransformer(path)
    truncated = getattr(cached, "truncate_embeddings", None) or cached.truncate_sentence_embeddings
    for _ in range(2):
        cached.encode(TEXTS)
        with truncated(5):
            cached.encode(TEXTS)
    assert computed(cached) == 2 * len(TEXTS)


def test_numbers_may_be_those_of_numpy(cached, plain):
    given = {"batch_size": np.int64(3)}
    if "truncate_dim" in inspect.signature(SentenceTransformer.encode).parameters:
        given["truncate_dim"] = np.int64(5)
    assert same(cached.encode(TEXTS, **given), plain.encode(TEXTS, **given))


def trained(model):
    """Train a model in place, and freeze it again."""
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mask = torch.ones(1, 3, dtype=torch.int64)
    model({"input_ids": torch.tensor([[101, 2000, 102]]), "attention_mask": mask})[
        "sentence_embedding"
    ].sum().backward()
    optimizer.step()
    model.requires_grad_(False)


def averaged(model):
    """Write to all weights as averages of weights and merged adapters do, which no counter sees."""
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.arange(parameter.numel()).view_as(parameter) / parameter.numel())


@pytest.mark.parametrize(
    "change",
    [trained, averaged, lambda model: model.prompts.update(query="other: ")],
    ids=["training", "averaging", "prompts"],
)
def test_a_model_that_was_changed_gives_its_own_rows_at_once(cached, plain, change):
    before = cached.encode(TEXTS, prompt_name="query")
    for model in (cached, plain):
        change(model)
    after = cached.encode(TEXTS, prompt_name="query")
    assert np.allclose(after, plain.encode(TEXTS, prompt_name="query"), atol=1e-5)
    assert not np.allclose(after, before, atol=1e-3)


def test_a_model_in_training_mode_is_put_into_eval_mode_as_encode_does(cached, plain):
    cached.train()
    assert same(cached.encode(TEXTS), plain.encode(TEXTS))


@pytest.mark.parametrize(
    "given",
    [
        {"device": ["cpu", "cpu"]},
        {"pool": {"processes": []}},
        {"task": "other"},
        {"processing_kwargs": {}},
        {"output_value": None},
        {"output_value": "token_embeddings"},
        {"prompt_name": "nothing_known"},
    ],
    ids=str,
)
def test_what_the_cache_has_no_rows_for_goes_to_the_model(cached, monkeypatch, given):
    try:
        inspect.signature(SentenceTransformer.encode).bind(cached, TEXTS, **given)
    except TypeError:
        pytest.skip("this version has no such argument")
    monkeypatch.setattr(SentenceTransformer, "encode", lambda model, inputs, **others: (type(model), inputs, others))
    assert cached.encode(TEXTS, **given) == (SentenceTransformer, TEXTS, given)


def test_a_device_is_moved_to(cached):
    with pytest.raises(RuntimeError, match="nowhere"):
        cached.encode(TEXTS, device="nowhere")


def test_unknown_arguments_and_prompts_are_refused_by_the_model_itself(cached):
    with pytest.raises(ValueError, match="nothing_known"):
        cached.encode(TEXTS, prompt_name="nothing_known")


def test_a_copy_has_a_model_of_its_own_and_finds_the_rows(cached):
    rows = cached.encode(TEXTS)
    twin = copy.deepcopy(cached)
    assert same(twin.encode(TEXTS), rows) and computed(twin) == 0
    assert next(twin.parameters()) is not next(cached.parameters())


def test_a_model_may_be_named_and_a_wrong_setting_is_refused_at_once(path, tmp_path):
    assert CachedSentenceTransformer(path, dtype="float16").encode(TEXTS[:2]).shape == (2, 32)
    with pytest.raises(ConfigError, match="dtype is 'half'"):
        CachedSentenceTransformer(path, dtype="half")
    with pytest.raises(ConfigError, match="there is no such directory"):
        CachedSentenceTransformer(tmp_path / "nowhere")
