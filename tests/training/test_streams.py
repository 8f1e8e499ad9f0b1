"""Iterable datasets: no index, so each sample is looked up by what it contains."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from quatcache import CacheConfig, CacheType, SimilarityPairSample
from quatcache.errors import CacheMissError, KeyTypeError
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts, trainer
from tests.training.test_law_same_training import loss_for
from tests.training.test_unfreezing import Thawable, ThawsAtStep


class Stream(IterableDataset):
    """Samples in an order of their own in each epoch, shared out among workers."""

    def __init__(self, samples, shuffles=True):
        self.samples = list(samples)
        self.shuffles = shuffles

    def __iter__(self):
        order = torch.randperm(len(self.samples)) if self.shuffles else torch.arange(len(self.samples))
        worker = get_worker_info()
        if worker is not None:
            order = order[worker.id :: worker.num_workers]
        return (self.samples[index] for index in order.tolist())


class Endless(IterableDataset):
    def __iter__(self):
        number = 0
        while True:
            yield f"text {number % 40}", number % 5
            number += 1


SAMPLES = {
    "tuples": lambda: [(text, len(text) % 5) for text in texts(50, 30)],
    "pairs": lambda: [
        SimilarityPairSample(a, b, score=float(i % 4 > 0), subgroup=i % 2)
        for i, (a, b) in enumerate(zip(texts(50, 30), texts(50, 40)[::-1], strict=True))
    ],
}


def run(cache, samples="tuples", encoders=HashingEncoder, loading=None, shuffles=True, **settings):
    made = encoders()
    model = Model(made if isinstance(made, dict) else {"default": made}, cache, loss_for(samples))
    stream = Stream(SAMPLES[samples](), shuffles)
    fit(model, functools.partial(loader, stream, **(loading or {})), **{"max_epochs": 3, **settings})
    return model


@pytest.mark.parametrize("samples", sorted(SAMPLES))
@pytest.mark.parametrize("tier", [CacheType.AUTO, CacheType.CPU, CacheType.DISK])
@pytest.mark.parametrize(
    "loading", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}, {"drop_last": True}]
)
def test_a_stream_trains_the_same(samples, tier, loading, tmp_path):
    cache = CacheConfig(tier, save_dir=tmp_path)
    plain = run(None, samples, loading=loading)
    for _ in range(2):
        assert same_run(run(cache, samples, loading=loading), plain)


def test_workers_that_are_spawned_send_keys():
    loading = {"num_workers": 1, "multiprocessing_context": "spawn"}
    assert same_run(run(CacheConfig(), loading=loading, max_epochs=2), run(None, loading=loading, max_epochs=2))


def test_each_distinct_item_is_encoded_once_over_epochs_and_runs(tmp_path):
    first = run(CacheConfig(save_dir=tmp_path))
    assert first.cache_callback.report.encoded == 30
    again = run(CacheConfig(save_dir=tmp_path))
    assert again.cache_callback.report.encoded == 0
    assert again.encoders["default"]._rows == 0


def test_rows_of_a_stream_serve_a_dataset_and_the_other_way_round(tmp_path):
    run(CacheConfig(save_dir=tmp_path))
    model = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path))
    fit(model, loader(Texts(texts(40))), max_epochs=1)
    assert model.cache_callback.report.encoded == 10
    model = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path))
    fit(model, loader(Stream((text, 0) for text in texts(41))), max_epochs=1)
    assert model.cache_callback.report.encoded == 1


def test_a_stream_without_an_end_is_cached_as_it_is_met():
    models = [Model({"default": HashingEncoder()}, cache) for cache in (CacheConfig(), None)]
    for model in models:
        fit(model, lambda: loader(Endless()), max_epochs=2, limit_train_batches=12)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded == 40


def test_a_stream_beside_a_dataset_for_validation():
    models = [Model({"default": HashingEncoder()}, cache) for cache in (CacheConfig(), None)]
    for model in models:
        fit(model, lambda: loader(Stream(SAMPLES["tuples"]())), loader(Texts(texts(35))), max_epochs=2)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded == 35


def test_a_trainable_encoder_beside_a_frozen_one():
    def encoders():
        return {"frozen": HashingEncoder(), "moving": TrainableHashing()}

    for loading in ({}, {"num_workers": 2}):
        assert same_run(
            run(CacheConfig(), encoders=encoders, loading=loading), run(None, encoders=encoders, loading=loading)
        )


def test_a_budget_holds_for_streams_too():
    part = run(CacheConfig(max_size=12 * 64))
    assert same_run(part, run(None))
    assert part.cache_callback.report.encoders["default"].rows == 12


def test_a_miss_is_an_error_where_steps_must_not_encode(tmp_path):
    run(CacheConfig(save_dir=tmp_path))
    warm = run(CacheConfig(save_dir=tmp_path, on_miss="error"))
    assert warm.cache_callback.report.encoded == 0
    model = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path, on_miss="error"))
    with pytest.raises(CacheMissError, match="item 'a new text' has no row of encoder 'default', and on_miss is"):
        fit(model, loader(Stream([*SAMPLES["tuples"](), ("a new text", 1)])))


def test_validation_and_prediction_of_streams(tmp_path):
    model, plain = (Model({"default": HashingEncoder()}, cache) for cache in (CacheConfig(save_dir=tmp_path), None))
    results = []
    for each in (model, plain):
        runner = trainer()
        stream = Stream(SAMPLES["tuples"](), shuffles=False)
        predicted = torch.cat(runner.predict(each, loader(stream)))
        results.append((predicted.tolist(), runner.validate(each, loader(stream), verbose=False)))
    assert results[0] == results[1]


@pytest.mark.parametrize("samples", sorted(SAMPLES))
@pytest.mark.parametrize("workers", [0, 2])
def test_an_encoder_that_is_unfrozen_steps_aside(samples, workers):
    models = [Model({"default": Thawable()}, cache, loss_for(samples)) for cache in (CacheConfig(), None)]
    for model in models:
        train = loader(Stream(SAMPLES[samples]()), num_workers=workers)
        fit(model, train, max_epochs=3, callbacks=[ThawsAtStep(9)])
    assert same_run(*models)
    assert not torch.equal(models[0].encoders["default"].matrix, Thawable().matrix)


def test_items_that_cannot_be_keyed_are_refused_with_a_remedy():
    model = Model({"default": HashingEncoder()}, CacheConfig())
    with pytest.raises(KeyTypeError, match="key_extractors"):
        fit(model, loader(Stream([(object(), 1)])))


def test_the_report_says_how_rows_come():
    line = run(CacheConfig()).cache_callback.report.line()
    assert "30 items encoded so far, others as batches meet them" in line
    assert "labels not cached: a stream gives them in each epoch" in line
