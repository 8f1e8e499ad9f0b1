"""One training epoch on precomputed rows, written in several ways.

Every contender trains the same head with the same optimizer on the same batches; what differs is who brings the rows:

* ``raw``: a torch loop, one gather per step, no framework at all;
* ``lean``: the leanest loop one can write by hand under Lightning: a sampler that yields index tensors,
  ``batch_size=None`` and one gather, nothing logged;
* ``lean-logged``: the same with ``self.log`` of the loss;
* ``tensor-dataset``: what most people write: ``TensorDataset`` in a ``DataLoader`` under Lightning;
* ``quatcache``: an encoder behind a cache, as a user writes it, filled before the first epoch; it logs its loss;
* ``quatcache-unlogged``: the same with a ``training_step`` that logs nothing, to stand beside ``lean``.

An epoch lasts from the end of the one before to its own end, so that the making of iterators, shuffling and the
epoch's hooks count. The first epoch warms up and is not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.lean import fit, run_lean, run_lean_logged, run_raw, run_tensor_dataset
from benchmarks.shapes import (
    LEARNING_RATE,
    SEED,
    SHAPES,
    WIDTH,
    Data,
    Order,
    Run,
    Shape,
    loader_order,
    make_data,
    tensor_order,
)
from quatcache import CacheConfig, CacheType, Encoder, TrainableModel

__all__ = ["CONTENDERS", "CachedHead", "losses_of", "sample_loader", "seconds_of"]


class RowEncoder(Encoder):
    """A frozen encoder that looks rows up in a table: item *i* has row *i*."""

    trainable = False
    embedding_size = WIDTH

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def collate(self, items: Any) -> Tensor:
        """Make positions ``(B,)`` int64 of the items."""
        return torch.tensor(items)

    def forward(self, inputs: Tensor) -> Tensor:
        """Look the rows ``(B, 384)`` up."""
        return self.table[inputs]


class CachedHead(TrainableModel):
    """The same head behind a cached encoder."""

    def __init__(
        self,
        shape: Shape,
        data: Data,
        logged: bool = True,
        losses: list[Tensor] | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.data, self.logged, self.kept = shape, data, logged, losses
        self.cache = cache or CacheConfig(CacheType.CPU, batch_size=4096)
        self.lr = LEARNING_RATE

    def configure_encoders(self) -> Encoder:
        """Return the table."""
        return RowEncoder(self.data.rows)

    def configure_head(self, input_embedding_size: int) -> nn.Module:
        """Return the head of the shape."""
        return self.shape.head()

    def configure_loss(self) -> nn.Module:
        """Return what the raw loop uses."""
        return nn.CrossEntropyLoss()

    def configure_caches(self) -> CacheConfig:
        """Return the config; without one, rows are kept in memory."""
        return self.cache

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Train as the framework does, or log nothing; and keep the loss where the check asks for it."""
        if self.logged:
            loss: Tensor = super().training_step(batch, batch_idx)
        else:
            loss = self.loss(self(batch.inputs), *batch.targets)
        if self.kept is not None:
            self.kept.append(loss.detach())
        return loss


def sample_loader(shape: Shape, data: Data) -> DataLoader[Any]:
    """Load samples ``(position, label)``, shuffled, as a user does."""
    return DataLoader(
        list(enumerate(data.labels.tolist())),  # type: ignore[arg-type]  # a list of samples is a dataset
        batch_size=shape.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(SEED),
    )


def run_quatcache(shape: Shape, data: Data, epochs: int, order: Order, keep_losses: bool, logged: bool = True) -> Run:
    """Train the cached model with a plain shuffling ``DataLoader`` over ``(item, label)``."""
    result = Run()
    model = CachedHead(shape, data, logged, result.losses if keep_losses else None)
    result.epoch_seconds = fit(model, sample_loader(shape, data), epochs)
    return result


def run_quatcache_unlogged(shape: Shape, data: Data, epochs: int, order: Order, keep_losses: bool) -> Run:
    """Train like ``quatcache`` and log nothing."""
    return run_quatcache(shape, data, epochs, order, keep_losses, logged=False)


CONTENDERS: dict[str, Callable[[Shape, Data, int, Order, bool], Run]] = {
    "raw": run_raw,
    "lean": run_lean,
    "lean-logged": run_lean_logged,
    "tensor-dataset": run_tensor_dataset,
    "quatcache": run_quatcache,
    "quatcache-unlogged": run_quatcache_unlogged,
}


def seconds_of(contender: str, shapes: Mapping[str, int], rows: int) -> dict[str, list[float]]:
    """Time one contender.

    Args:
        contender: A name of ``CONTENDERS``.
        shapes: Names of ``SHAPES``, each with its epochs in all, the warm-up included; > 1.
        rows: Rows of data.

    Returns:
        For each shape the seconds of every epoch but the first.
    """
    data, train = make_data(rows), CONTENDERS[contender]
    return {
        name: train(SHAPES[name], data, epochs, tensor_order, False).epoch_seconds for name, epochs in shapes.items()
    }


def losses_of(contender: str, shapes: Sequence[str], rows: int, epochs: int) -> dict[str, list[float]]:
    """Train with every contender's batches in a shuffling loader's order, for the check that precedes the figures.

    Returns:
        For each shape the loss of each of the ``epochs * steps`` steps.
    """
    data, train = make_data(rows), CONTENDERS[contender]
    done = {name: train(SHAPES[name], data, epochs, loader_order, True).losses for name in shapes}
    return {name: torch.stack(losses).tolist() for name, losses in done.items()}
