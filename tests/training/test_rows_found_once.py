"""The rows of a dataset's keys are looked up once a start, and again as soon as the answer may be another one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quatcache import CacheConfig
from quatcache.data import read_sample
from quatcache.encoders.calls import CallPlan
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.keys import content_keys
from quatcache.store import DatasetTable, DiskStore, TensorStore
from quatcache.training.columns import ColumnsInMaking
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import Chunk
from quatcache.training.meeting import MetSamples
from tests.fits import HashingEncoder, Model, Texts, fit, loader, texts
from tests.stores_for_tests import DIGEST

COUNT = 40


@pytest.fixture
def asked(monkeypatch):
    """How many keys each look-up among stored rows was given."""
    asked, look_up = [], DiskStore.rows_of
    monkeypatch.setattr(DiskStore, "rows_of", lambda store, keys: asked.append(len(keys)) or look_up(store, keys))
    return asked


@pytest.mark.parametrize(
    ("cache", "limits"),
    [({}, {}), ({}, {"max_steps": 1}), ({"fill": "lazy"}, {}), ({"on_miss": "error"}, {"max_steps": 1})],
    ids=["whole", "few steps", "lazy", "filled for few steps"],
)
def test_warm_start_looks_the_keys_of_a_dataset_up_once(tmp_path, asked, cache, limits):
    def run():
        model, data = Model(cache=CacheConfig(save_dir=tmp_path, **cache)), Texts(texts(COUNT))
        fit(model, lambda: loader(data, shuffle=True), **{"max_epochs": 2, **limits})
        return model

    fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(Texts(texts(COUNT))))
    asked.clear()
    model = run()
    assert model.cache_callback.report.encoded == 0 and model.cache_callback.report.hits == COUNT
    assert asked == [COUNT]


def keys_of(*names):
    return content_keys([str(name) for name in names])


def filled(store, names):
    """A planned dataset of these names, whose index table is known."""
    encoder = HashingEncoder()
    calls = CallPlan("default", encoder, torch.device("cpu"))
    one = EncoderFill("default", KeyScheme("default"), store, lambda: None, calls)
    table = DatasetTable({"default": keys_of(*names).reshape(-1, 1, 2)}, None, "group")
    data = [(name, 0) for name in names]
    return DatasetFill("train", data, read_sample, encoders=(one,), table=table), one


@pytest.mark.parametrize("make", [TensorStore, lambda: None], ids=["memory", "disk"])
def test_rows_that_are_put_are_found(make, tmp_path):
    store = make() or DiskStore(tmp_path, DIGEST)
    fill, one = filled(store, "abc")
    assert fill.rows_of(one).tolist() == [[-1], [-1], [-1]]
    for names in ("b", "ca", "b"):  # the last one is put again
        store.put_many(keys_of(*names), torch.ones(len(names), 2))
        assert fill.rows_of(one).tolist() == store.rows_of(keys_of(*"abc")).reshape(-1, 1).tolist()
    rows = fill.rows_of(one)
    assert (rows >= 0).all() and fill.rows_of(one) is rows


def test_rows_of_others_are_found_once_they_are_taken_in(tmp_path):
    store, other = DiskStore(tmp_path, DIGEST), DiskStore(tmp_path, DIGEST)
    fill, one = filled(store, "abc")
    assert fill.rows_of(one).tolist() == [[-1], [-1], [-1]]
    other.put_many(keys_of("c", "a"), torch.ones(2, 2))
    other.flush()
    assert fill.rows_of(one).tolist() == [[-1], [-1], [-1]]
    store.refresh()
    assert fill.rows_of(one).tolist() == [[1], [-1], [0]]
    other.put_many(keys_of("a"), torch.zeros(1, 2))
    other.flush()
    store.refresh()
    assert fill.rows_of(one).tolist() == [[2], [-1], [0]]


def test_rows_of_another_table_are_looked_up(tmp_path):
    store = DiskStore(tmp_path, DIGEST)
    store.put_many(keys_of(*"abc"), torch.ones(3, 2))
    fill, one = filled(store, "abc")
    assert fill.rows_of(one).tolist() == [[0], [1], [2]]
    fill.table = DatasetTable({"default": keys_of(*"ca").reshape(-1, 1, 2)}, None, "group")
    assert fill.rows_of(one).tolist() == [[2], [0]]


def chunk_of(index, name):
    return Chunk([index], [name], (torch.tensor([9]),), "group", {"default": keys_of(name).reshape(1, 1, 2)})


@pytest.mark.parametrize("size", [3, 4])
def test_table_of_which_nothing_changed_is_kept_and_one_that_changed_is_copied(size):
    known = DatasetTable({"default": keys_of(*"abc").reshape(3, 1, 2)}, (torch.tensor([1, 2, 3]),), "group")
    untouched = ColumnsInMaking(3, known)
    assert untouched.table(True) is known and untouched.table(False).targets is None
    making = ColumnsInMaking(size, known)
    making.put(chunk_of(size - 1, "z"))
    table = making.table(True)
    assert np.array_equal(table.keys["default"].reshape(-1, 2), keys_of(*"abc"[: size - 1], "z"))
    assert table.targets[0].tolist() == [*range(1, size), 9]
    assert np.array_equal(known.keys["default"].reshape(-1, 2), keys_of(*"abc")) and known.targets[0][2] == 3


def test_workers_see_what_is_met_after_they_started_and_the_table_stays_as_it_was():
    store = TensorStore()
    store.put_many(keys_of(*"ab"), torch.ones(2, 2))
    fill, _ = filled(store, "abc")
    fill.table = table = DatasetTable(fill.table.keys, (torch.tensor([1, 2, 3]),), "group")
    fill.targets = True
    met = MetSamples(fill)
    met.share()
    seen = met.columns  # what workers were given
    store.put_many(keys_of("z"), torch.ones(1, 2))
    met.put(chunk_of(2, "z"))
    assert seen.targets[0].tolist() == [1, 2, 9] and seen.rows["default"].tolist() == [[0], [1], [2]]
    assert seen.targets[0].is_shared() and not table.targets[0].is_shared() and table.targets[0][2] == 3
