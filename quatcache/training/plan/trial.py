"""What an encoder costs, measured on a sample of items that are really read and encoded.

The sample goes through what fills a cache, into a store that is thrown away; and once more through the encoder in the
batches of an uncached epoch: unsorted, in the size of the user's loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from quatcache.encoders.calls import WINDOW
from quatcache.encoders.extracted import ExtractedKeys
from quatcache.keys import KeyArray
from quatcache.read_through import Counts
from quatcache.store import TensorStore
from quatcache.store.protocol import RowShape, Values
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import Chunk
from quatcache.training.plan.counting import KeysOf, random_parts

__all__ = ["Timed", "read_sample_chunks", "time_encoder"]

Advance = Callable[[int], None]
"""Told how many items were encoded."""

WARM_UP = 8
"""Items encoded before the clock starts: the first batch is encoded twice, and libraries set themselves up."""


@dataclass(frozen=True)
class Timed:
    """What encoding costs, in seconds per item.

    Attributes:
        fill: In a fill.
        uncached: In the batches of an uncached epoch.
        cached: Of gathering a stored row.
        row_shape: Shape of one row.
        values: How many values a row has; of sequences, those of the sample on average.
        given_dtype: Dtype that the encoder gives.
        stored_dtype: Dtype that is stored.
    """

    fill: float
    uncached: float
    cached: float
    row_shape: RowShape
    values: int
    given_dtype: torch.dtype
    stored_dtype: torch.dtype


class _ThrownAway(TensorStore):
    """A store for a trial: it tells a progress bar of each batch."""

    def __init__(self, dtype: torch.dtype | None, advance: Advance) -> None:
        super().__init__(dtype=dtype)
        self._advance = advance

    def put_many(self, keys: KeyArray, values: Values) -> None:
        super().put_many(keys, values)
        self._advance(len(keys))


def time_encoder(
    planned: EncoderFill,
    chunks: Sequence[tuple[Chunk, int]],
    batch_size: int,
    dtype: torch.dtype | None,
    advance: Advance,
    time_func: Callable[[], float],
) -> Timed:
    """Encode a sample in both ways.

    Args:
        planned: The encoder; its store is left alone.
        chunks: The sample, each chunk with the batch size of the loader of its dataset.
        batch_size: Upper bound of items per encoder call in a fill.
        dtype: Storage dtype; None: as the encoder gives it.
        advance: Told of each batch.
        time_func: Clock in seconds.
    """
    frozen = planned.frozen()
    frozen.encode(chunks[0][0].items[:WARM_UP])
    store = _ThrownAway(dtype, advance)
    extracted = None if planned.extracted is None else ExtractedKeys(planned.scheme)
    fill = replace(planned, store=store, frozen=lambda: frozen, counts=Counts(), extracted=extracted, canary=None)
    items = sum(len(chunk.items) for chunk, _ in chunks)

    started = time_func()
    resolved = []
    for chunk, size in chunks:
        resolved.append((fill.resolve(chunk), size))
        fill.fill(resolved[-1][0], batch_size)
    filled = time_func() - started
    advance(items - fill.counts.computed)

    started = time_func()
    for chunk, size in chunks:
        step = size * len(chunk.items) // len(chunk.indices)
        for start in range(0, len(chunk.items), step):
            batch = chunk.items[start : start + step]
            frozen.encode(batch)
            advance(len(batch))
    uncached = time_func() - started

    started = time_func()
    for chunk, size in resolved:
        keys = chunk.keys[planned.scheme.row_column].reshape(-1, 2)
        for rows in torch.split(torch.from_numpy(store.rows_of(keys)), size):
            store.gather(rows)
    cached = time_func() - started
    assert store.row_shape is not None and store.given_dtype is not None
    return Timed(
        filled / fill.counts.computed,
        uncached / items,
        cached / items,
        store.row_shape,
        round(store.nbytes / max(len(store), 1) / store.rows.dtype.itemsize),
        store.given_dtype,
        store.rows.dtype,
    )


def read_sample_chunks(datasets: Sequence[KeysOf], sample: int, batch_size: int) -> list[tuple[Chunk, int]]:
    """Read a random sample of all datasets, in chunks as a fill reads them.

    Args:
        datasets: The datasets, with the epochs of their loaders.
        sample: How many samples in all, at most as many as there are.
        batch_size: Upper bound of items per encoder call in a fill.

    Returns:
        Chunks, each with the batch size of the loader of its dataset.
    """
    sizes = [len(data.fill.dataset) for data in datasets]
    chunks = []
    for place, indices in random_parts(sizes, sample, sample):
        data = datasets[place]
        for start in range(0, len(indices), batch_size * WINDOW):
            chunk = data.fill.chunk_reader.__getitems__(indices[start : start + batch_size * WINDOW].tolist())
            chunks.append((chunk, data.epochs[0].batch_size))
    return chunks
