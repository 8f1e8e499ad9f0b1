"""``fill="lazy"``: rows are cached as the first epoch meets them, and training is what it is without a cache."""

from __future__ import annotations

import functools

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, RandomSampler, Sampler

from quatcache import CacheConfig, CacheType
from quatcache.training.gathering_loaders import MemoryLoader
from tests.fits import (
    Failing,
    HashingEncoder,
    Model,
    Texts,
    TrainableHashing,
    fit,
    loader,
    same_run,
    texts,
    trainer,
)
from tests.training.test_law_same_training import SAMPLERS, SAMPLES, loss_for
from tests.training.test_unfreezing import Thawable, ThawsAtStep


def run(cache, sampler="shuffle", samples="tuples", encoders=HashingEncoder, **settings):
    made = encoders()
    model = Model(made if isinstance(made, dict) else {"default": made}, cache, loss_for(samples))
    train, val = SAMPLES[samples](), Texts(texts(20)) if samples != "pairs" else SAMPLES[samples]()[:20]
    settings = {"max_epochs": 3, **settings}
    fit(model, functools.partial(SAMPLERS[sampler], train), functools.partial(loader, val), **settings)
    return model


def lazy(**settings):
    return CacheConfig(fill="lazy", **settings)


class Watch(Callback):
    """Notes what each training epoch read of a dataset, and which kind of loader served the last one."""

    def __init__(self, data):
        self.data, self.reads, self.memory = data, [], False

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = self.data.reads

    def on_train_epoch_end(self, trainer, pl_module):
        self.reads.append(self.data.reads - self.before)
        served = trainer.fit_loop._combined_loader.flattened[0]
        self.memory = isinstance(getattr(served, "memory", None), MemoryLoader)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_each_sampler_gives_the_same_training(sampler):
    assert same_run(run(lazy(), sampler), run(None, sampler))


@pytest.mark.parametrize("samples", sorted(SAMPLES))
@pytest.mark.parametrize("labels", ["auto", False])
@pytest.mark.parametrize("tier", [CacheType.CPU, CacheType.DISK])
def test_each_kind_of_sample_gives_the_same_training(samples, labels, tier, tmp_path):
    cache = lazy(cache_type=tier, labels=labels, save_dir=tmp_path)
    assert same_run(run(cache, samples=samples), run(None, samples=samples))
    assert same_run(run(cache, samples=samples), run(None, samples=samples))


def test_a_trainable_encoder_beside_a_frozen_one_trains_the_same():
    def encoders():
        return {"frozen": HashingEncoder(), "moving": TrainableHashing()}

    assert same_run(run(lazy(), encoders=encoders), run(None, encoders=encoders))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_each_precision_trains_the_same(precision):
    assert same_run(run(lazy(), precision=precision), run(None, precision=precision))


def test_each_distinct_item_is_encoded_once_and_never_in_the_next_run(tmp_path):
    first = run(lazy(save_dir=tmp_path))
    assert first.cache_callback.report.encoded == 30  # train has 30 distinct texts, val 20 of them
    again = run(lazy(save_dir=tmp_path))
    assert again.cache_callback.report.encoded == 0
    assert again.encoders["default"]._rows == 0
    assert same_run(first, again)


def test_nothing_is_read_or_encoded_before_it_is_needed():
    data = Texts(texts(4000))
    model = Model({"default": HashingEncoder()}, lazy())
    fit(model, lambda: loader(data, shuffle=True), max_epochs=1, max_steps=3)
    assert model.cache_callback.report.encoded == 24


def test_an_epoch_reads_no_sample_once_all_were_met():
    data = Texts(texts(50))
    watch = Watch(data)
    fit(Model({"default": HashingEncoder()}, lazy()), lambda: loader(data, shuffle=True), max_epochs=3,
        callbacks=[watch])  # fmt: skip
    assert watch.reads == [50, 0, 0]
    assert watch.memory


def test_workers_hand_over_to_memory_once_all_were_met():
    data = Texts(texts(50))
    for persistent in (False, True):
        settings = {"shuffle": True, "num_workers": 2, "persistent_workers": persistent}
        watch = Watch(data)
        model = Model({"default": HashingEncoder()}, lazy())
        fit(model, functools.partial(loader, data, **settings), max_epochs=3, callbacks=[watch])
        assert watch.memory
        plain = Model({"default": HashingEncoder()}, None)
        fit(plain, functools.partial(loader, data, **settings), max_epochs=3)
        assert same_run(model, plain)


def test_persistent_workers_ask_for_no_sample_that_was_met_in_an_epoch_before():
    data, model = Texts(texts(40)), Model({"default": HashingEncoder()}, lazy())
    part = {"sampler": RandomSampler(data, num_samples=24), "num_workers": 1, "persistent_workers": True}
    fit(model, lambda: loader(data, **part), max_epochs=4)
    report = model.cache_callback.report.encoders["default"]
    assert 24 < report.asked == report.encoded <= 40


def test_samples_that_a_sampler_leaves_out_are_met_when_it_takes_them():
    watch = Watch(data := Texts(texts(40)))

    class Halves(torch.utils.data.Sampler):
        epoch = -1

        def __len__(self):
            return 20

        def __iter__(self):
            self.epoch += 1
            return iter(range(20) if self.epoch % 2 == 0 else range(20, 40))

    model = Model({"default": HashingEncoder()}, lazy())
    fit(model, lambda: loader(data, sampler=Halves()), max_epochs=4, callbacks=[watch])
    assert watch.reads[2:] == [0, 0]
    assert model.cache_callback.report.encoded == 40


def test_an_interrupted_run_keeps_what_it_met(tmp_path):
    data = Texts(texts(50))
    model = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path))
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, loader(data), callbacks=[Failing(RuntimeError("on purpose"))])
    met = model.cache_callback.report.encoders["default"]
    again = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path))
    fit(again, loader(data), max_epochs=1)
    report = again.cache_callback.report
    assert 0 < 50 - report.encoded <= 24, met  # two batches were trained on, a third was perhaps fetched
    assert report.hits == 50 - report.encoded


def test_an_eager_run_after_a_lazy_one_encodes_the_rest(tmp_path):
    data = Texts(texts(50))
    part = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path))
    fit(part, loader(data), max_steps=2)
    whole = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path))
    fit(whole, loader(data), max_epochs=1)
    assert part.cache_callback.report.encoded == 16
    assert whole.cache_callback.report.encoded == 34


def test_an_edit_between_runs_is_noticed(tmp_path):
    run(lazy(save_dir=tmp_path))
    data = Texts(texts(50, 30))
    data.texts[7] = "something else"
    cached, plain = (Model({"default": HashingEncoder()}, cache) for cache in (lazy(save_dir=tmp_path), None))
    for model in (cached, plain):
        fit(model, lambda: loader(data, shuffle=True))
    assert cached.cache_callback.report.encoded == 1
    assert same_run(cached, plain)


@pytest.mark.parametrize("setting", ["fast_dev_run", "overfit_batches", "limit_train_batches", "max_steps"])
def test_a_run_that_takes_little_fills_only_what_it_needs(setting):
    value = {"fast_dev_run": True, "overfit_batches": 2, "limit_train_batches": 2, "max_steps": 2}[setting]
    data = Texts(texts(800))
    settings = {setting: value, **({} if setting in ("fast_dev_run", "max_steps") else {"max_epochs": 2})}
    models = [Model({"default": HashingEncoder()}, cache) for cache in (CacheConfig(), None)]
    for model in models:
        fit(model, lambda: loader(data), **settings)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded <= 32
    assert "as batches meet them" in models[0].cache_callback.report.line()


def test_overfitting_a_few_batches_for_many_epochs_fills_these_only():
    models = [Model({"default": HashingEncoder()}, cache) for cache in (CacheConfig(), None)]
    for model in models:  # Lightning has the sampler not shuffle, so that they stay the same two
        fit(model, lambda: loader(Texts(texts(160)), shuffle=True), overfit_batches=2, max_epochs=15)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded == 16


class Unnumbered(Sampler):
    """Batches without a length."""

    def __iter__(self):
        return iter([[place, place + 1] for place in range(0, 40, 2)])


def test_a_trial_run_over_batches_without_a_number_fills_what_it_needs():
    models = [Model({"default": HashingEncoder()}, cache) for cache in (CacheConfig(), None)]
    for model in models:
        fit(model, DataLoader(Texts(texts(40)), batch_sampler=Unnumbered()), fast_dev_run=True)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded == 2


@pytest.mark.parametrize("step", [3, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_encoder_that_is_unfrozen_steps_aside_before_all_was_met(step, workers):
    models = [Model({"default": Thawable()}, cache) for cache in (lazy(), None)]
    for model in models:
        train = loader(Texts(texts(50)), shuffle=True, num_workers=workers)
        fit(model, train, max_epochs=3, callbacks=[ThawsAtStep(step)])
    assert same_run(*models)
    assert not torch.equal(models[0].encoders["default"].matrix, Thawable().matrix)


def test_validate_test_and_predict_meet_their_samples(tmp_path):
    model = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path))
    plain = Model({"default": HashingEncoder()}, None)
    data = Texts(texts(30))
    results = []
    for each in (model, plain):
        runner = trainer()
        predicted = runner.predict(each, loader(data))
        results.append((torch.cat(predicted), runner.validate(each, loader(data), verbose=False)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert model.cache_callback.report.encoded == 0  # predict met them all


def test_float16_rows_are_the_same_in_each_epoch_and_run(tmp_path):
    models = []
    for save_dir in (None, tmp_path, tmp_path):
        model = Model({"default": HashingEncoder()}, lazy(save_dir=save_dir, dtype="float16"))
        fit(model, lambda: loader(Texts(texts(50)), shuffle=True), max_epochs=2)
        models.append(model)
    eager = Model({"default": HashingEncoder()}, CacheConfig(dtype="float16"))
    fit(eager, lambda: loader(Texts(texts(50)), shuffle=True), max_epochs=2)
    assert all(same_run(model, eager) for model in models)


def test_key_extractors_share_rows_as_in_an_eager_fill():
    def number(text):
        return int(text.rsplit(" ", 1)[1]) % 10

    models = [
        Model({"default": HashingEncoder()}, CacheConfig(fill=how, key_extractors=number, labels=True))
        for how in ("lazy", "eager")
    ]
    for model in models:
        fit(model, lambda: loader(Texts(texts(50))), max_epochs=2)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded == 10


class Opaque:
    """An item without canonical bytes."""

    def __init__(self, text):
        self.text = text


class OpaqueEncoder(HashingEncoder):
    def collate(self, items):
        return super().collate([item.text for item in items])

    def length(self, item):
        return len(item.text)


def test_items_without_content_keys_are_cached_by_index():
    models = [Model({"default": OpaqueEncoder()}, cache) for cache in (lazy(), None)]
    for model in models:
        data = [(Opaque(text), len(text) % 5) for text in texts(50)]
        fit(model, lambda data=data: loader(data, shuffle=True), max_epochs=3)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoded == 50
