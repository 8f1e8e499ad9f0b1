"""Training on precomputed rows without quatcache: by hand, and the leanest ways under Lightning.

Imports nothing of quatcache, so that a process of these contenders takes no time for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from benchmarks.shapes import LEARNING_RATE, SEED, Data, Order, Run, Shape, differences

__all__ = [
    "EpochClock",
    "Gather",
    "HeadModule",
    "IndexBatches",
    "fit",
    "run_lean",
    "run_lean_logged",
    "run_raw",
    "run_tensor_dataset",
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
