"""A fit whose encoder costs next to nothing: what is left is the cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.anonymous import Peak
from benchmarks.lean import EpochClock
from benchmarks.rows import ENCODER, WIDTH, mark, numbers_of, text_of
from benchmarks.shapes import differences
from quatcache import CacheConfig, CacheType, Encoder, TrainableModel
from quatcache.training.lightning import Callback, LightningModule, Trainer

__all__ = ["cheap_fit"]


class Texts(Dataset[tuple[str, int]]):
    """A dataset of any length that takes no memory."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[str, int]:
        return text_of(index), index % 2


class CheapEncoder(Encoder):
    """Gives the rows above at next to no cost, but with other noise."""

    trainable = False
    embedding_size = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))

    def collate(self, items: Any) -> Tensor:
        """Read the number at the end of each text."""
        return torch.tensor([int(item[5:]) for item in items])

    def forward(self, inputs: Tensor) -> Tensor:
        """Give rows ``(B, 384)``."""
        rows = self.noise.repeat(len(inputs), 1)
        mark(rows, inputs)
        return rows


class CheapModel(TrainableModel):
    """A linear head on the cheap encoder, cached on disk."""

    def __init__(self, folder: Path, batch_size: int, checksums: bool = True, dtype: str | None = None) -> None:
        super().__init__()
        self.config = CacheConfig(
            CacheType.DISK,
            batch_size=batch_size,
            save_dir=folder,
            checksums=checksums,
            labels=True,
            dtype=dtype,
            on_miss="error",  # few steps follow, for which rows would be cached as they are met
        )

    def configure_encoders(self) -> Encoder:
        """Return the encoder."""
        return CheapEncoder()

    def configure_head(self, input_embedding_size: int) -> nn.Module:
        """Return a linear head."""
        return nn.Linear(input_embedding_size, 2)

    def configure_loss(self) -> nn.Module:
        """Return a loss on groups."""
        return nn.CrossEntropyLoss()

    def configure_caches(self) -> CacheConfig:
        """Return the config."""
        return self.config


class FirstStep(Callback):
    """Notes when the first training step is about to compute."""

    def __init__(self) -> None:
        self.at = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time, once, and check that the rows are those of their items."""
        if not self.at:
            self.at = time.perf_counter()
            self.check(numbers_of(batch.inputs[ENCODER]), batch.targets[0])

    def check(self, numbers: Tensor, targets: Tensor) -> None:
        """See that labels tell odd from even, and that no row comes twice.

        Args:
            numbers: Those that the rows of the batch say, ``(B,)``.
            targets: The labels of the batch, ``(B,)``.
        """
        if not torch.equal(numbers % 2, targets) or len(numbers.unique()) < len(numbers):
            raise SystemExit("rows do not go with their labels; no figure is given")


def cheap_fit(
    folder: Path, rows: int, batch_size: int, checksums: bool = True, epochs: int = 0, dtype: str | None = None
) -> dict[str, Any]:
    """Fit on tier DISK.

    Args:
        folder: Where the rows persist.
        rows: Samples of the dataset.
        batch_size: In the fill and in training.
        checksums: Whether they are compared when a cache is opened.
        epochs: How many; 0: three steps.
        dtype: In which the rows are stored; ``None``: float32.

    Returns:
        Seconds to the first step, of the fill and of each epoch; items encoded, samples read, and bytes of
        anonymous memory.
    """
    first, clock = FirstStep(), EpochClock()
    with Peak() as memory:
        model = CheapModel(folder, batch_size, checksums, dtype)
        loader = DataLoader(Texts(rows), batch_size=batch_size, shuffle=True)
        trainer = Trainer(
            accelerator="cpu", max_steps=-1 if epochs else 3, max_epochs=epochs or None, callbacks=[first, clock],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.fit(model, loader)
    report = model.cache_callback.report
    assert report.encoders[ENCODER].tier == "DISK"
    return {
        "first_step_seconds": first.at - started,
        "fill_seconds": report.fill_seconds,
        "epoch_seconds": differences([first.at, *clock.ends]),
        "encoded": report.encoded,
        "read": report.read,
        "anonymous_left": memory.left,
        "anonymous_highest": memory.highest,
    }
