"""Opening the rows of an encoder: the log says why there are none, and nothing where that is not the reason."""

from __future__ import annotations

import torch

from quatcache import CacheConfig
from tests.caches_for_tests import flip, shards
from tests.fits import HashingEncoder, Model, Texts, fit, loader, texts


def filled(root, seed=0, **settings):
    """Fit once; give the directories of the stores there are then."""
    model = Model({"default": HashingEncoder(seed)}, CacheConfig(save_dir=root, **settings))
    fit(model, loader(Texts(texts(12))), max_epochs=1)
    return set(root.glob("encoders/*")), model.cache_callback.report.encoded


def test_an_encoder_without_rows_is_compared_with_the_closest_one(tmp_path, caplog):
    filled(tmp_path)
    with caplog.at_level("INFO", logger="quatcache"):
        filled(tmp_path, seed=1)
    assert "has no rows in" in caplog.text and "the closest one there differs: weights differ in" in caplog.text


def test_where_all_rows_of_the_encoder_itself_are_damaged_no_other_is_named(tmp_path, caplog):
    (home,), _ = filled(tmp_path)
    filled(tmp_path, seed=1)
    for shard in shards(home):
        flip(shard)
    caplog.clear()
    with caplog.at_level("INFO", logger="quatcache"):
        _, encoded = filled(tmp_path)
    assert encoded == 12 and "differs" not in caplog.text


def test_where_the_encoder_has_rows_of_another_dtype_no_other_is_named(tmp_path, caplog):
    filled(tmp_path)
    filled(tmp_path, seed=1)
    caplog.clear()
    with caplog.at_level("INFO", logger="quatcache"):
        _, encoded = filled(tmp_path, dtype=torch.float16)
    assert encoded == 12 and "differs" not in caplog.text
