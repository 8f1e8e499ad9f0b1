"""The loading of an epoch alone: batches of 256 are brought, in a random order, and nothing is computed with them.

* ``raw``: one gather a batch, by hand;
* ``lean``: a ``DataLoader`` with ``batch_size=None`` over a sampler of index tensors, one gather a batch;
* ``tensor-dataset``: ``TensorDataset`` in a shuffling ``DataLoader``;
* ``quatcache``: the loader that a cached fit trains from, taken from the running trainer.

Every contender's batches are held against the data before they are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.epochs import CachedHead, sample_loader
from benchmarks.lean import Gather, IndexBatches, fit
from benchmarks.shapes import SEED, SHAPES, Data, check_batches, make_data, tensor_order
from quatcache.training.lightning import pl

__all__ = ["LOADERS", "seconds_of"]

SHAPE = SHAPES["mlp"]

Pair = tuple[Tensor, Tensor]
"""Rows ``(B, 384)`` and labels ``(B,)``."""


def timed(start: Callable[[], Iterator[Any]], pairs: Callable[[Any], Pair], data: Data, epochs: int) -> list[float]:
    """Check one epoch, which warms up too, and time the others.

    Args:
        start: Starts an epoch.
        pairs: Takes rows and labels out of a batch.
        data: What an epoch must bring.
        epochs: Epochs in all, > 1.

    Returns:
        Seconds of all epochs but the first.
    """
    check_batches([pairs(batch) for batch in start()], data)
    seconds = []
    for _ in range(epochs - 1):
        started = time.perf_counter()
        for _batch in start():
            pass
        seconds.append(time.perf_counter() - started)
    return seconds


def as_it_is(batch: Any) -> Pair:
    """Take a batch that is a pair."""
    rows, labels = batch
    return rows, labels


def load_raw(data: Data, epochs: int) -> list[float]:
    """Gather by hand."""
    generator, gather = torch.Generator().manual_seed(SEED), Gather(data)
    return timed(
        lambda: map(gather.__getitem__, tensor_order(len(gather), generator).split(SHAPE.batch_size)),
        as_it_is, data, epochs,
    )  # fmt: skip


def load_lean(data: Data, epochs: int) -> list[float]:
    """Gather in a ``DataLoader``."""
    sampler = IndexBatches(len(data.labels), SHAPE.batch_size, tensor_order)
    loader: DataLoader[Any] = DataLoader(Gather(data), sampler=sampler, batch_size=None)
    return timed(lambda: iter(loader), as_it_is, data, epochs)


def load_tensor_dataset(data: Data, epochs: int) -> list[float]:
    """Collate single rows."""
    loader: DataLoader[Any] = DataLoader(
        TensorDataset(data.rows, data.labels), batch_size=SHAPE.batch_size, shuffle=True
    )
    return timed(lambda: iter(loader), as_it_is, data, epochs)


class TimeLoader(pl.Callback):
    """Times the loader of a fit before its first step."""

    def __init__(self, data: Data, epochs: int) -> None:
        self.data, self.epochs = data, epochs
        self.seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Iterate as an epoch does, and end the fit."""
        self.seconds = timed(
            lambda: iter(trainer.train_dataloader),
            lambda batch: (batch.inputs["default"], batch.targets[0]),
            self.data, self.epochs,
        )  # fmt: skip
        trainer.should_stop = True


def load_quatcache(data: Data, epochs: int) -> list[float]:
    """Take the loader of a cached fit."""
    timer = TimeLoader(data, epochs)
    fit(CachedHead(SHAPE, data), sample_loader(SHAPE, data), 1, timer)
    return timer.seconds


LOADERS: dict[str, Callable[[Data, int], list[float]]] = {
    "raw": load_raw,
    "lean": load_lean,
    "tensor-dataset": load_tensor_dataset,
    "quatcache": load_quatcache,
}


def seconds_of(contender: str, rows: int, epochs: int) -> list[float]:
    """Time one contender.

    Returns:
        Seconds of every epoch but the first.
    """
    return LOADERS[contender](make_data(rows), epochs)
