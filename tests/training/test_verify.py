"""What a fit says of a dataset that no index table describes, or only a part of it."""

from __future__ import annotations

import pytest

from quatcache import CacheConfig
from quatcache.training import verify
from tests.fits import Model, Texts, fit, loader, texts


def messages(caplog, root, *datasets):
    """Fit datasets one after the other on one directory; give what was said of the last one's index."""
    for data in datasets:
        caplog.clear()
        with caplog.at_level("INFO", logger="quatcache"):
            fit(Model(cache=CacheConfig(save_dir=root)), loader(data), max_epochs=1)
    said = [record.getMessage() for record in caplog.records]
    return [line for line in said if line.startswith("The train dataset")]


def test_nothing_is_said_where_there_is_no_index_or_the_right_one(tmp_path, caplog):
    data = Texts(texts(40))
    assert messages(caplog, tmp_path, data) == []
    assert messages(caplog, tmp_path, data) == []


@pytest.mark.parametrize(("count", "read"), [(30, "its 30 samples are read"), (1, "its 1 sample is read")])
def test_another_dataset_is_said_to_be_none_of_those_indexed(tmp_path, caplog, count, read):
    said = messages(caplog, tmp_path, Texts(texts(40)), Texts([f"other {text}" for text in texts(count)]))
    assert said == [
        "The train dataset is none of those indexed here (new, edited, reordered or relabelled): "
        f"{read} to find their rows."
    ]


@pytest.mark.parametrize(("more", "read"), [(6, "6 samples longer"), (1, "1 sample longer")])
def test_a_grown_dataset_is_said_to_be_longer(tmp_path, caplog, more, read):
    said = messages(caplog, tmp_path, Texts(texts(40)), Texts(texts(40 + more)))
    (line,) = set(said)
    assert line.startswith(f"The train dataset is {read} than when it was indexed: ")


@pytest.mark.parametrize("size", [1, 2, 70, 1 << 16, 200_000])
def test_items_that_are_compared_are_distinct_and_many_and_both_ends_are_first(size):
    first, *others = verify._random_batches(size)
    indices = [*first, *(index for batch in others for index in batch)]
    assert set(first[:2]) == {0, size - 1} and len(first) <= verify.SAMPLED
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(size))
    assert len(indices) == size if size <= 1 << 16 else len(indices) > 50_000
    assert indices != sorted(indices) or size <= 2
