"""Chunks come keyed and in order, from worker processes as from this one."""

from __future__ import annotations

import numpy as np
import pytest

from quatcache.data import read_sample
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.keys import content_keys
from quatcache.training.chunk_loading import load_chunks
from quatcache.training.keying import ChunkReader
from tests.fits import Texts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_chunks_are_those_that_were_asked_for_in_their_order(num_workers):
    texts = [f"text {number}" for number in range(9)]
    reader = ChunkReader(Texts(texts), read_sample, [KeyScheme("words")])
    asked = [np.array([8, 0]), [3], np.array([1, 2, 4])]
    chunks = list(load_chunks(reader, iter(asked), num_workers, None, "train"))
    assert [list(chunk.indices) for chunk in chunks] == [[8, 0], [3], [1, 2, 4]]
    for chunk in chunks:
        items = [texts[index] for index in chunk.indices]
        assert chunk.items == items and np.array_equal(chunk.keys["words"][:, 0], content_keys(items))
