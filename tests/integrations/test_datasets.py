"""Embeddings as a column of a Hugging Face dataset, found again by the identity of the encoder."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from quatcache import EmbeddingCache
from quatcache.errors import ConfigError
from quatcache.integrations.datasets import EmbedColumn, add_embeddings
from tests.fits import HashingEncoder, texts

TEXTS = texts(30)


@pytest.fixture
def data(tmp_path):
    """A dataset on disk: only what map makes of one is cached by the library."""
    Dataset.from_dict({"text": TEXTS, "number": list(range(30))}).save_to_disk(tmp_path / "data")
    return load_from_disk(tmp_path / "data")


def rows(dataset, column="embedding"):
    return np.array(dataset[column][:], np.float32)


def test_a_column_of_rows_is_added(data):
    cache = EmbeddingCache(HashingEncoder())
    added = add_embeddings(data, cache, batch_size=7)
    assert added.column_names == ["text", "number", "embedding"]
    assert np.array_equal(rows(added), cache.encode(TEXTS, convert_to_numpy=True))
    assert cache.stats.computed == 30


def test_the_result_is_found_again_as_long_as_the_encoder_gives_the_same_rows(data):
    def made(seed=0, scale=1.0, **given):
        encoder = HashingEncoder(seed)
        encoder.matrix.mul_(scale)
        cache = EmbeddingCache(encoder, dtype=given.pop("dtype", None))
        return add_embeddings(data, cache, **given), cache.stats.computed

    first, computed = made()
    assert computed == 30
    again, computed = made()
    assert computed == 0 and again._fingerprint == first._fingerprint and np.array_equal(rows(again), rows(first))
    others = [made(seed=1), made(scale=2.0), made(dtype="float16"), made(into="other"), made(remove_columns=["number"])]
    assert all(computed == 30 for _, computed in others)
    assert len({other._fingerprint for other, _ in others} | {first._fingerprint}) == 6
    assert "number" not in others[-1][0].column_names


def test_the_fingerprint_is_the_same_for_a_model_that_is_loaded_and_for_one_that_is_not(data, tmp_path, minilm_path):
    from quatcache.encoders import SentenceTransformerEncoder
    from tests.tiny import write_tiny

    path = write_tiny(tmp_path / "model", minilm_path)
    EmbeddingCache(str(path), tmp_path / "cache").encode(TEXTS[:1])
    loaded = SentenceTransformerEncoder(path)
    loaded.ensure_loaded()
    one, other = (EmbedColumn(EmbeddingCache(encoder, tmp_path / "cache")) for encoder in (loaded, str(path)))
    assert one.fingerprint(data) == other.fingerprint(data)


@pytest.mark.slow
def test_several_processes_share_the_rows_through_the_directory(data, tmp_path):
    cache = EmbeddingCache(HashingEncoder(), tmp_path / "cache")
    added = add_embeddings(data, cache, num_proc=2, batch_size=5)
    assert np.array_equal(rows(added), cache.encode(TEXTS, convert_to_numpy=True)) and cache.stats.computed == 0


def test_every_part_of_a_dict_gets_the_column_and_streams_do(data):
    cache = EmbeddingCache(HashingEncoder())
    both = add_embeddings(DatasetDict({"train": data, "test": data.select(range(3))}), cache)
    assert isinstance(both, DatasetDict) and rows(both["test"]).shape == (3, 16)
    stream = add_embeddings(data.to_iterable_dataset(), cache, batch_size=4)
    assert np.array_equal(np.array([row["embedding"] for row in stream], np.float32), rows(both["train"]))
    assert cache.stats.computed == 30


def test_a_column_that_is_not_there_is_refused(data):
    with pytest.raises(ConfigError, match=r"column is 'texts'; the dataset has \['text', 'number'\]"):
        add_embeddings(data, EmbeddingCache(HashingEncoder()), "texts")
