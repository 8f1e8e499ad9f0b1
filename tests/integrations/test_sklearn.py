"""A scikit-learn transformer whose features are cached rows."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from quatcache.errors import ConfigError
from quatcache.integrations.sklearn import EmbeddingTransformer
from tests.fits import HashingEncoder, texts

TEXTS = texts(60)
GROUPS = [int(len(text) > 15) for text in TEXTS]


def letters(items):
    return [[float(text.count("a")), float(text.count("o"))] for text in items]


def test_rows_are_the_features_of_a_pipeline():
    model = make_pipeline(EmbeddingTransformer(HashingEncoder()), LogisticRegression(max_iter=1000)).fit(TEXTS, GROUPS)
    assert model.score(TEXTS, GROUPS) > 0.9
    features = model[0].transform(TEXTS)
    assert isinstance(features, np.ndarray) and features.shape == (60, 16)
    assert model[0].cache.stats.computed == 60
    assert model[0].get_feature_names_out()[-1] == "embedding15"


def test_a_search_in_this_process_encodes_each_item_once_without_a_directory():
    encoder = HashingEncoder()
    pipeline = make_pipeline(EmbeddingTransformer(encoder).fit(TEXTS), LogisticRegression(max_iter=1000))
    search = GridSearchCV(pipeline, {"logisticregression__C": [0.1, 1.0, 10.0]}, cv=3).fit(TEXTS, GROUPS)
    assert search.best_score_ > 0.8
    assert sorted(encoder._collated) == sorted(TEXTS)


@pytest.mark.slow
def test_a_search_in_two_processes_finds_the_rows_on_disk(tmp_path):
    transformer = EmbeddingTransformer(HashingEncoder(), tmp_path)
    pipeline = make_pipeline(transformer, LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [0.1, 1.0], "embeddingtransformer__dtype": [None, "float16"]}
    alone = GridSearchCV(pipeline, grid, cv=2).fit(TEXTS, GROUPS)
    before = sorted(path.name for path in tmp_path.rglob("shard-*"))
    together = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(TEXTS, GROUPS)
    assert np.allclose(together.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert sorted(path.name for path in tmp_path.rglob("shard-*")) == before  # nothing was encoded, so nothing put


def test_a_function_given_by_name_is_cached_in_a_search(tmp_path):
    transformer = EmbeddingTransformer(letters, tmp_path, identity="letters, 1")
    assert cross_val_score(make_pipeline(transformer, LogisticRegression()), TEXTS, GROUPS, cv=3).min() > 0.3
    warm = EmbeddingTransformer(letters, tmp_path, identity="letters, 1")
    warm.fit_transform(TEXTS)
    assert warm.cache.stats.computed == 0 and warm.get_feature_names_out().tolist() == ["embedding0", "embedding1"]


def test_parameters_can_be_read_set_and_cloned_and_a_clone_shares_the_encoder_and_its_rows():
    encoder = HashingEncoder()
    transformer = EmbeddingTransformer(encoder, batch_size=4)
    transformer.transform(TEXTS)
    twin = clone(transformer)
    assert twin is not transformer and twin.get_params() == transformer.get_params() and twin.encoder is encoder
    twin.transform(TEXTS)
    assert sorted(encoder._collated) == sorted(TEXTS)
    other = clone(transformer).set_params(dtype="float16")
    assert other.cache is not transformer.cache and other.cache.dtype is not None
    check_is_fitted(transformer)  # there is nothing to fit


def test_a_pickled_transformer_finds_its_rows_on_disk(tmp_path):
    transformer = EmbeddingTransformer(HashingEncoder(), tmp_path)
    rows = transformer.transform(TEXTS)
    twin = pickle.loads(pickle.dumps(transformer))
    assert np.array_equal(twin.transform(TEXTS), rows) and twin.cache.stats.computed == 0


def test_a_table_of_one_column_is_taken_and_one_of_several_refused():
    transformer, expected = EmbeddingTransformer(letters), np.array(letters(TEXTS[:3]), np.float32)
    column = np.array(TEXTS[:3], dtype=object)
    assert np.array_equal(transformer.transform(column), expected)
    assert np.array_equal(transformer.transform(column[:, None]), expected)
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": TEXTS[:3], "number": [1, 2, 3]})
    assert np.array_equal(transformer.transform(table["text"]), expected)
    assert np.array_equal(transformer.transform(table[["text"]]), expected)
    with pytest.raises(ConfigError, match=r"X is a table of 2 columns; choose one: ColumnTransformer"):
        transformer.transform(table)


def test_features_are_named_as_many_as_there_are():
    maps = EmbeddingTransformer(lambda items: torch.ones(len(items), 2, 3))
    with pytest.raises(NotFittedError, match="was not called yet, so how many features it gives is not known"):
        maps.fit(TEXTS).get_feature_names_out()
    assert maps.transform(TEXTS).shape == (60, 6) and len(maps.get_feature_names_out()) == 6
    assert maps.transform([]).shape == (0, 6)
    assert len(EmbeddingTransformer(HashingEncoder()).get_feature_names_out()) == 16


def test_a_grid_may_be_an_array():
    pipeline = make_pipeline(EmbeddingTransformer(HashingEncoder()), LogisticRegression(max_iter=1000))
    grid = {"embeddingtransformer__batch_size": np.array([4, 8])}
    assert GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(TEXTS, GROUPS).best_score_ > 0.8


def test_a_setting_that_cannot_work_is_refused_when_it_is_fitted():
    with pytest.raises(ConfigError, match="dtype is 'half'"):
        EmbeddingTransformer(HashingEncoder(), dtype="half").fit(TEXTS)
    with pytest.raises(NotFittedError):
        make_pipeline(EmbeddingTransformer(letters), LogisticRegression()).predict(TEXTS)
