"""Embeddings as a column of a Hugging Face dataset, found again by the identity of the encoder."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_from_disk

from quatcache import EmbeddingCache
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.errors import ConfigError
from quatcache.integrations.datasets import EmbedColumn, add_embeddings
from tests.fits import HashingEncoder, texts
from tests.tiny import write_tiny

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


def test_rows_that_no_identity_decides_are_not_found_again(data):
    def first(value):
        return add_embeddings(data, EmbeddingCache(lambda items: [[value]] * len(items)))["embedding"][0]

    assert first(1.0) == [1.0] and first(2.0) == [2.0]
    plain, alike = (EmbeddingCache(HashingEncoder(), key_extractor=key) for key in (None, lambda text: 0))
    one, other = (rows(add_embeddings(data, cache)) for cache in (alike, plain))
    assert (one == one[0]).all() and not (other == other[0]).all()


def test_the_fingerprint_of_the_library_itself_tells_two_models_of_one_name(data, tmp_path, minilm_path):
    found = []
    for seed in (0, 1):
        path = write_tiny(tmp_path / "model", minilm_path, seed=seed)
        found.append(rows(data.map(EmbedColumn(EmbeddingCache(str(path))), batched=True)))
    assert not np.allclose(*found)


def test_a_stream_without_known_columns_and_a_dict_of_streams_get_the_column(data):
    def read():
        yield from ({"text": text} for text in TEXTS)

    cache = EmbeddingCache(HashingEncoder())
    added = add_embeddings(IterableDatasetDict({"train": IterableDataset.from_generator(read)}), cache)
    assert isinstance(added, IterableDatasetDict) and sum("embedding" in row for row in added["train"]) == 30
    with pytest.raises(ConfigError, match=r"column is 'words'; the dataset has \['text'\]"):
        next(iter(add_embeddings(IterableDataset.from_generator(read), cache, "words")))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda data, cache: add_embeddings(data, cache, "texts"),
            r"column is 'texts'; the dataset has \['text', 'num",
        ),
        (lambda data, cache: add_embeddings(data, "model"), r"cache is 'model'; pass EmbeddingCache"),
        (lambda data, cache: add_embeddings(TEXTS, cache), r"dataset is \[.*; pass a Dataset or an IterableDataset"),
        (
            lambda data, cache: data.map(EmbedColumn(cache)),
            r"'text' is 'alder 0', of one row; use map\(..., batched=Tr",
        ),
    ],
    ids=["column", "cache", "dataset", "unbatched"],
)
def test_what_cannot_work_is_refused_in_one_sentence(data, call, told):
    with pytest.raises(ConfigError, match=told):
        call(data, EmbeddingCache(HashingEncoder()))
