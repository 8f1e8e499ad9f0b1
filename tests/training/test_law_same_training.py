"""Law 3: cached training is uncached training, bit for bit with batch-independent encoders."""

from __future__ import annotations

import functools

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from quatcache import CacheConfig, SimilarityGroupSample, SimilarityPairSample
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.losses import MultipleNegativesRankingLoss
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts


class GlobalDraws(Sampler):
    """A batch sampler that draws from the global generator for each batch, as users write them."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 6

    def __iter__(self):
        for _ in range(6):
            yield torch.randint(self.size, (7,)).tolist()


SAMPLERS = {
    "in order": lambda data: loader(data),
    "shuffle": lambda data: loader(data, shuffle=True),
    "drop_last": lambda data: loader(data, shuffle=True, drop_last=True),
    "generator": lambda data: loader(data, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda data: loader(data, sampler=WeightedRandomSampler([1 + i % 3 for i in range(len(data))], 50)),
    "replacement": lambda data: loader(data, sampler=RandomSampler(data, replacement=True, num_samples=77)),
    "subset": lambda data: loader(data, sampler=SubsetRandomSampler(range(3, 40))),
    "batch sampler": lambda data: loader(
        data, batch_size=1, batch_sampler=BatchSampler(SequentialSampler(data), 9, True)
    ),
    "custom batch sampler": lambda data: loader(data, batch_size=1, batch_sampler=GlobalDraws(len(data))),
    "workers": lambda data: loader(data, shuffle=True, num_workers=2),
    "persistent workers": lambda data: loader(data, shuffle=True, num_workers=1, persistent_workers=True),
    "custom batch sampler, workers": lambda data: loader(
        data, batch_size=1, batch_sampler=GlobalDraws(len(data)), num_workers=1
    ),
}
SAMPLES = {
    "tuples": lambda: Texts(texts(50, 30)),
    "groups": lambda: [SimilarityGroupSample(text, i % 5) for i, text in enumerate(texts(50, 30))],
    "mappings": lambda: [{"text": text, "label": i % 5} for i, text in enumerate(texts(50, 30))],
    "pairs": lambda: [
        SimilarityPairSample(a, b, score=float(i % 4 > 0), subgroup=i % 2)
        for i, (a, b) in enumerate(zip(texts(50, 30), texts(50, 40)[::-1], strict=True))
    ],
}


def loss_for(samples):
    return MultipleNegativesRankingLoss() if samples == "pairs" else nn.CrossEntropyLoss()


def run(cache, sampler="shuffle", samples="tuples", encoders=HashingEncoder, **settings):
    made = encoders()
    model = Model(made if isinstance(made, dict) else {"default": made}, cache, loss_for(samples))
    train, val = SAMPLES[samples](), SAMPLES[samples]()[:20] if samples != "tuples" else Texts(texts(20))
    fit(model, functools.partial(SAMPLERS[sampler], train), functools.partial(loader, val), **settings)
    return model


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("labels", [True, False], ids=["labels cached", "labels read"])
def test_every_sampler_gives_the_same_losses_and_head(sampler, labels, tmp_path):
    config = CacheConfig(batch_size=4, labels=labels, save_dir=tmp_path)
    plain, filled, warm = run(None, sampler), run(config, sampler), run(config, sampler)
    assert filled.cache_callback.report.labels is labels
    assert warm.cache_callback.report.encoded == 0
    assert same_run(plain, filled)
    assert same_run(plain, warm)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels cached", "labels read"])
def test_every_kind_of_sample_on_every_tier_gives_the_same_losses_and_head(samples, tier, labels, tmp_path):
    config = CacheConfig(tier, labels=labels, save_dir=tmp_path)
    assert same_run(run(None, samples=samples), run(config, samples=samples))


def two_frozen():
    return {"b": HashingEncoder(1), "a": HashingEncoder(2)}


def frozen_and_trainable():
    return {"frozen": HashingEncoder(1), "trained": TrainableHashing(2)}


@pytest.mark.parametrize("encoders", [two_frozen, frozen_and_trainable])
@pytest.mark.parametrize("samples", ["tuples", "pairs"])
@pytest.mark.parametrize("workers", [0, 2])
def test_several_encoders_give_the_same_losses_and_head(encoders, samples, workers):
    sampler = "workers" if workers else "shuffle"
    plain = run(None, sampler, samples, encoders)
    cached = run(CacheConfig(batch_size=5), sampler, samples, encoders)
    assert same_run(plain, cached)
    trained = [name for name, parameter in cached.named_parameters() if name.startswith("encoders")]
    assert trained == (["encoders.trained.matrix"] if encoders is frozen_and_trainable else [])


def test_the_trainable_encoder_beside_a_cached_one_is_trained():
    model = run(CacheConfig(), encoders=frozen_and_trainable)
    assert not torch.equal(model.encoders["trained"].matrix, TrainableHashing(2).matrix)


def test_one_of_two_frozen_encoders_may_stay_uncached():
    config = CacheConfig(mapping={"a": "none"})
    cached = run(config, encoders=two_frozen)
    assert set(cached.cache_callback.report.encoders) == {"b"}
    assert same_run(run(None, encoders=two_frozen), cached)


@pytest.mark.parametrize(
    "settings", [{"num_workers": 2}, {"key_extractors": lambda text: text.upper()}, {"batch_size": 1}]
)
def test_how_the_fill_is_done_changes_nothing(settings):
    assert same_run(run(None), run(CacheConfig(labels=True, **settings)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_every_precision_gives_the_same_losses_and_head(precision, tmp_path):
    config = CacheConfig(save_dir=tmp_path)
    plain = run(None, precision=precision)
    assert same_run(plain, run(config, precision=precision))
    assert same_run(plain, run(config, precision=precision))


def test_a_store_of_float16_gives_float32_rows(tmp_path):
    model = run(CacheConfig(dtype="float16", save_dir=tmp_path))
    plain = run(None)
    assert model.train_losses[0] == pytest.approx(plain.train_losses[0], rel=1e-3)
    assert head_dtype(model) == torch.float32


def head_dtype(model):
    return next(model.head.parameters()).dtype


CASES = [
    *(pytest.param(name, "tuples", "one", id=name) for name in ("shuffle", "drop_last", "weighted", "batch sampler")),
    pytest.param("custom batch sampler", "tuples", "one", id="custom batch sampler"),
    pytest.param("shuffle", "groups", "one", id="groups"),
    pytest.param("shuffle", "pairs", "one", id="pairs"),
    pytest.param("shuffle", "tuples", "two", id="two encoders"),
    pytest.param("shuffle", "tuples", "beside", id="trainable beside frozen"),
]


def around(model, how):
    """A frozen text encoder alone, beside another frozen one, or beside one that is trained."""
    encoders = {"text": SentenceTransformerEncoder(model)}
    if how != "one":
        encoders["other"] = HashingEncoder(1) if how == "two" else TrainableHashing(2)
    return encoders


@pytest.mark.parametrize(("sampler", "samples", "how"), CASES)
def test_static_embeddings_of_real_text_are_equal_bit_for_bit(wordllama, sampler, samples, how):
    encoders = functools.partial(around, wordllama, how)
    assert same_run(run(None, sampler, samples, encoders), run(CacheConfig(), sampler, samples, encoders))


@pytest.mark.parametrize(("sampler", "samples", "how"), CASES)
def test_minilm_under_a_linear_head_agrees_at_every_step(minilm, sampler, samples, how):
    def once(cache):
        torch.manual_seed(0)
        head = nn.Linear(384 if how == "one" else 400, 5)
        model = Model(around(minilm, how), cache, loss_for(samples), head)
        fit(model, functools.partial(SAMPLERS[sampler], SAMPLES[samples]()))
        return model.train_losses

    plain, cached = once(None), once(CacheConfig(batch_size=16))
    assert len(plain) >= 10
    assert cached == pytest.approx(plain, abs=1e-5)


def test_the_fill_leaves_the_random_states_of_training_alone():
    class Draws(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.draws = [*getattr(pl_module, "draws", []), torch.rand(()).item()]

    plain, cached = run(None, callbacks=[Draws()]), run(CacheConfig(), callbacks=[Draws()])
    assert plain.draws == cached.draws
