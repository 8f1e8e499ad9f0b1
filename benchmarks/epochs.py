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

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from benchmarks.shapes import (
    LEARNING_RATE, SEED, SHAPES, WIDTH, Data, Order, Run, Shape, differences, loader_order, make_data, tensor_order,
)
from quatcache import CacheConfig, CacheType, Encoder, TrainableModel
from quatcache.training.lightning import pl

__all__ = [
    "CONTENDERS", "CachedHead", "Gather", "HeadModule", "IndexBatches", "fit", "losses_of", "sample_loader", "seconds_of",
]

class EpochClock(pl.Callback):
    """Notes when each training epoch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def run_raw(shape: Shape, data: Data, epochs: int, order: Order, keep_losses: bool) -> Run:
    """Train in a plain torch loop."""
    result, ends = Run(), []
    head = shape.head()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for index in order(len(data.labels), generator).split(shape.batch_size):
            loss = criterion(head(data.rows.index_select(0, index)), data.labels.index_select(0, index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if keep_losses:
                result.losses.append(loss.detach())
        ends.append(time.perf_counter())
    result.epoch_seconds = differences(ends)
    return result


class HeadModule(pl.LightningModule):
    """The head alone under Lightning; a batch is ``(rows, labels)``."""

    def __init__(self, shape: Shape, logged: bool, losses: list[Tensor] | None) -> None:
        super().__init__()
        self.head = shape.head()
        self.criterion = nn.CrossEntropyLoss()
        self.logged = logged
        self.losses = losses

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of one batch."""
        rows, labels = batch
        loss: Tensor = self.criterion(self.head(rows), labels)
        if self.logged:
            self.log("train_loss", loss)
        if self.losses is not None:
            self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return what the raw loop uses."""
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


class IndexBatches(Sampler[Tensor]):
    """Yields one index tensor per batch."""

    def __init__(self, count: int, batch_size: int, order: Order) -> None:
        self.count, self.batch_size, self.order = count, batch_size, order
        self.generator = torch.Generator().manual_seed(SEED)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.order(self.count, self.generator).split(self.batch_size))

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)


class Gather(Dataset[tuple[Tensor, Tensor]]):
    """A dataset whose item is a whole batch."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.rows.index_select(0, index), self.data.labels.index_select(0, index)

    def __len__(self) -> int:
        return len(self.data.labels)


def fit(module: pl.LightningModule, loader: DataLoader[Any], epochs: int, *others: pl.Callback) -> list[float]:
    """Fit with everything off that is not training, and return the seconds of all epochs but the first."""
    clock = EpochClock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[clock, *others],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return differences(clock.ends)


def run_lean(shape: Shape, data: Data, epochs: int, order: Order, keep_losses: bool, logged: bool = False) -> Run:
    """Train under Lightning with one gather a step."""
    result = Run()
    sampler = IndexBatches(len(data.labels), shape.batch_size, order)
    loader: DataLoader[Any] = DataLoader(Gather(data), sampler=sampler, batch_size=None)
    result.epoch_seconds = fit(HeadModule(shape, logged, result.losses if keep_losses else None), loader, epochs)
    return result


def run_lean_logged(shape: Shape, data: Data, epochs: int, order: Order, keep_losses: bool) -> Run:
    """Train like ``lean`` and log the loss."""
    return run_lean(shape, data, epochs, order, keep_losses, logged=True)


def run_tensor_dataset(shape: Shape, data: Data, epochs: int, order: Order, keep_losses: bool) -> Run:
    """Train under Lightning with ``TensorDataset`` and a shuffling ``DataLoader``."""
    result = Run()
    loader: DataLoader[Any] = DataLoader(
        TensorDataset(data.rows, data.labels),
        batch_size=shape.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(SEED),
    )
    module = HeadModule(shape, shape.logged, result.losses if keep_losses else None)
    result.epoch_seconds = fit(module, loader, epochs)
    return result


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


def seconds_of(contender: str, shape: str, rows: int, epochs: int) -> list[float]:
    """Time one contender.

    Args:
        contender: A name of ``CONTENDERS``.
        shape: A name of ``SHAPES``.
        rows: Rows of data.
        epochs: Epochs in all, the warm-up included; > 1.

    Returns:
        Seconds of every epoch but the first.
    """
    return CONTENDERS[contender](SHAPES[shape], make_data(rows), epochs, tensor_order, False).epoch_seconds


def losses_of(contender: str, shape: str, rows: int, epochs: int) -> list[float]:
    """Train with every contender's batches in a shuffling loader's order, for the check that precedes the figures.

    Returns:
        The loss of each of the ``epochs * steps`` steps.
    """
    done = CONTENDERS[contender](SHAPES[shape], make_data(rows), epochs, loader_order, True)
    return [float(loss) for loss in torch.stack(done.losses)]
