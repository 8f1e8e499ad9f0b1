"""``max_size``: as many rows as the budget allows, the others encoded in the step that meets them."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from quatcache import CacheConfig, CacheType
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import ConfigError
from quatcache.keys import content_keys
from quatcache.store import BudgetStore, TensorStore
from quatcache.training.encoder_fill import EncoderFill
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts
from tests.training.test_law_same_training import SAMPLERS, SAMPLES, loss_for

ROW = 64  # bytes: 16 float32


def run(cache, sampler="shuffle", samples="tuples", encoders=HashingEncoder, **settings):
    made = encoders()
    model = Model(made if isinstance(made, dict) else {"default": made}, cache, loss_for(samples))
    fit(model, functools.partial(SAMPLERS[sampler], SAMPLES[samples]()), **{"max_epochs": 3, **settings})
    return model


def report_of(model):
    return model.cache_callback.report.encoders["default"]


@pytest.mark.parametrize("sampler", ["shuffle", "weighted", "custom batch sampler", "workers", "persistent workers"])
@pytest.mark.parametrize("fill", ["eager", "lazy"])
def test_each_sampler_gives_the_same_training(sampler, fill):
    part = run(CacheConfig(max_size=12 * ROW, fill=fill), sampler)
    assert same_run(part, run(None, sampler))
    assert report_of(part).rows == 12


@pytest.mark.parametrize("samples", sorted(SAMPLES))
@pytest.mark.parametrize("labels", ["auto", False])
@pytest.mark.parametrize("tier", [CacheType.CPU, CacheType.DISK])
@pytest.mark.parametrize("fill", ["eager", "lazy"])
def test_each_kind_of_sample_gives_the_same_training(samples, labels, tier, fill, tmp_path):
    cache = CacheConfig(tier, max_size=12 * ROW, save_dir=tmp_path, labels=labels, fill=fill)
    for _ in range(2):
        assert same_run(run(cache, samples=samples), run(None, samples=samples))


def test_encoders_of_which_one_trains_give_the_same_training():
    def encoders():
        return {"default": HashingEncoder(), "moving": TrainableHashing(), "other": HashingEncoder(seed=5)}

    part = run(CacheConfig(max_size=7 * ROW), encoders=encoders)
    assert same_run(part, run(None, encoders=encoders))
    assert {name: one.rows for name, one in part.cache_callback.report.encoders.items()} == {"default": 7, "other": 7}


def test_an_epoch_encodes_only_what_has_no_row():
    data = Texts(texts(50))
    model = Model({"default": HashingEncoder()}, CacheConfig(max_size=40 * ROW))
    fit(model, lambda: loader(data, shuffle=True), max_epochs=4)
    report = report_of(model)
    # the fill cannot know the size of a row before its first chunk, which is encoded whole
    assert report.encoded == 50 + 4 * 10
    assert report.in_steps == 40
    assert report.rows == 40


def test_a_fill_stops_encoding_when_the_budget_is_used():
    data = Texts(texts(3000))
    encoder = HashingEncoder()
    model = Model({"default": encoder}, CacheConfig(max_size=600 * ROW, batch_size=4))
    fit(model, lambda: loader(data, shuffle=True), max_epochs=1, max_steps=200)
    report = report_of(model)
    assert report.encoded - report.in_steps == 600


def test_only_samples_without_a_row_are_read():
    data = Texts(texts(50))
    model = Model({"default": HashingEncoder()}, CacheConfig(max_size=40 * ROW))
    fit(model, lambda: loader(data, shuffle=True), max_epochs=0)
    filled = data.reads
    fit(model, lambda: loader(data, shuffle=True), max_epochs=0)
    again = Model({"default": HashingEncoder()}, CacheConfig(max_size=40 * ROW))
    data.reads = 0
    fit(again, lambda: loader(data, shuffle=True), max_epochs=3)
    assert data.reads == filled + 3 * 10


def test_a_second_run_reads_and_encodes_nothing_ahead(tmp_path):
    cache = CacheConfig(max_size=40 * ROW, save_dir=tmp_path)
    first = Model({"default": HashingEncoder()}, cache)
    fit(first, lambda: loader(Texts(texts(50)), shuffle=True), max_epochs=1)
    second = Model({"default": HashingEncoder()}, cache)
    fit(second, lambda: loader(Texts(texts(50)), shuffle=True), max_epochs=1)
    assert same_run(first, second)
    assert second.cache_callback.report.read == 0
    assert report_of(second).encoded == report_of(second).in_steps == 10


def test_a_larger_budget_encodes_what_it_adds(tmp_path):
    data = Texts(texts(50))
    for rows, encoded in ((20, 50), (35, 15), (60, 15), (10, 0)):
        model = Model({"default": HashingEncoder()}, CacheConfig(max_size=rows * ROW, save_dir=tmp_path))
        fit(model, loader(data), max_epochs=1)
        report = report_of(model)
        assert report.encoded - report.in_steps == encoded, rows
        assert report.in_steps == max(50 - max(rows, report.rows), 0)
    assert report.rows == 50  # nothing is removed


def test_a_size_in_words_is_a_budget():
    assert CacheConfig(max_size="8GiB").max_size == 8 << 30
    assert CacheConfig(max_size="1.5 kB").max_size == 1500


@pytest.mark.parametrize("size", [0, -1, True, "much", "8 GB/s", 1.5, "0"])
def test_no_budget_is_refused(size):
    with pytest.raises(ConfigError, match="max_size"):
        CacheConfig(max_size=size)


def test_a_budget_that_is_too_small_is_refused_where_steps_must_not_encode():
    model = Model({"default": HashingEncoder()}, CacheConfig(max_size=40 * ROW, on_miss="error"))
    message = r"max_size leaves 10 of 50 items of the train dataset without a row of encoder 'default'.*raise max_size"
    with pytest.raises(ConfigError, match=message):
        fit(model, loader(Texts(texts(50))))
    enough = Model({"default": HashingEncoder()}, CacheConfig(max_size=50 * ROW, on_miss="error"))
    fit(enough, loader(Texts(texts(50))), max_epochs=1)
    assert report_of(enough).in_steps == 0


def test_a_lazy_fill_that_must_not_encode_is_refused():
    with pytest.raises(ConfigError, match="fill is 'lazy' and on_miss is 'error'"):
        CacheConfig(fill="lazy", on_miss="error")


@pytest.mark.parametrize("setting", [{"fill": "later"}, {"on_miss": None}])
def test_unknown_values_are_refused(setting):
    with pytest.raises(ConfigError, match="use 'e"):
        CacheConfig(**setting)


def test_the_report_says_how_much_is_cached():
    model = Model({"default": HashingEncoder()}, CacheConfig(max_size=40 * ROW))
    fit(model, loader(Texts(texts(50))), max_epochs=2)
    report = model.cache_callback.report
    assert "40 rows" in report.line()
    assert report.metrics()["cache/encoded_in_steps"] == 20
    assert report_of(model).served == 80


class TestBudgetStore:
    """What a store with a budget takes."""

    def test_present_keys_get_the_new_row_whatever_the_budget(self):
        store = BudgetStore(TensorStore(), 2 * 8)
        keys = content_keys(["a", "b", "c"])
        store.put_many(keys[:2], torch.zeros(2, 2))
        store.put_many(keys, torch.ones(3, 2))
        assert store.get_many(keys).values.tolist() == [[1.0, 1.0]] * 2
        assert store.nbytes == 16

    def test_of_equal_keys_the_first_room_decides(self):
        store = BudgetStore(TensorStore(), 3 * 8)
        keys = content_keys(["a", "b", "a", "c", "b", "d", "c"])
        assert store.affordable(keys).tolist() == list(range(7))  # the size of a row is not known yet
        store.put_many(keys[:1], torch.zeros(1, 2))
        assert store.affordable(keys).tolist() == [0, 1, 2, 3, 4, 6]

    def test_a_row_larger_than_the_budget_is_declined(self):
        store = BudgetStore(TensorStore(), 7)
        store.put_many(content_keys(["a"]), torch.zeros(1, 2))
        assert len(store) == 0
        assert store.room == 0

    def test_rows_count_in_their_storage_dtype(self):
        store = BudgetStore(TensorStore(dtype=torch.float16), 4 * 4, torch.float16)
        store.put_many(content_keys(list("abcdef")), torch.zeros(6, 2))
        assert len(store) == 4


def test_a_copy_with_another_store_has_a_budget_of_its_own():
    store, other, keys = TensorStore(), TensorStore(), content_keys(["a", "b"])
    fill = EncoderFill("default", KeyScheme("default"), store, lambda: None, len, max_size=40 * ROW)
    fill.lacking(keys)
    assert replace(fill, store=other)._kept._store is other
