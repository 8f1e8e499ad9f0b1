"""What the demo measures of a fit, as callbacks: seconds per epoch, accuracy per epoch, and the rows that pass by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quatcache import CacheConfig
from quatcache.demo.model import DiagnosisClassifier, ICD10DataModule
from quatcache.training.lightning import Callback, LightningModule, Trainer, pl
from quatcache.training.report import CacheReport

__all__ = ["EpochLog", "Fit", "RowCollector", "fit"]


class EpochLog(Callback):
    """Times each epoch, validation included, and notes the accuracy at its end.

    Args:
        clock: Seconds since some moment; tests give their own.

    Attributes:
        seconds: One entry per epoch.
        accuracy: ``val_accuracy`` after each epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.clock = clock
        self.seconds: list[float] = []
        self.accuracy: list[float] = []
        self._begun = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._begun = self.clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it; Lightning has validated by now."""
        self.seconds.append(self.clock() - self._begun)
        self.accuracy.append(float(trainer.callback_metrics["val_accuracy"]))


class RowCollector(Callback):
    """Keeps the embeddings and labels of one epoch's batches.

    While an encoder is cached, the inputs of a batch are its rows, so this costs no encoder call.

    Args:
        encoder: Name of the encoder.
        epoch: The epoch to keep.
    """

    def __init__(self, encoder: str = "default", epoch: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.epoch = epoch
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "validation": []}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep a training batch."""
        self._keep("train", trainer, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a validation batch."""
        if not trainer.sanity_checking:
            self._keep("validation", trainer, batch)

    def rows(self, side: str) -> tuple[Tensor, Tensor]:
        """Give what was kept.

        Args:
            side: ``"train"`` or ``"validation"``.

        Returns:
            Embeddings ``(N, D)`` and labels ``(N,)``, on the CPU.
        """
        embeddings, labels = zip(*self._kept[side], strict=True)
        return torch.cat(embeddings), torch.cat(labels)

    def _keep(self, side: str, trainer: Trainer, batch: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self._kept[side].append((batch.inputs[self.encoder].cpu(), batch.targets[0].cpu()))


@dataclass
class Fit:
    """One fit of the demo's model.

    Attributes:
        report: What the cache did; ``None`` where there was none.
        epochs: Seconds and accuracies.
        total_seconds: Wall time of the whole fit, fill and set-up included.
        collector: The rows of the first epoch, where they were asked for.
    """

    report: CacheReport | None
    epochs: EpochLog
    total_seconds: float = 0.0
    collector: RowCollector | None = None


def fit(
    data: ICD10DataModule,
    cache: CacheConfig | None,
    epochs: int,
    *,
    encoder: str | None = None,
    collect: bool = False,
    seed: int = 0,
) -> Fit:
    """Train the classifier as any Lightning user would, with the measuring callbacks added.

    Args:
        data: The texts.
        cache: How to cache; ``None``: not at all.
        epochs: How many, > 0.
        encoder: Path or name; ``None``: the packaged one.
        collect: Whether to keep the rows of the first epoch; the encoder must then be cached.
        seed: Of the head's weights and its dropout.

    Returns:
        What was measured.
    """
    begun = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    log = EpochLog()
    collector = RowCollector() if collect else None
    trainer = pl.Trainer(
        max_epochs=epochs,
        devices=1,
        callbacks=[log] if collector is None else [log, collector],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = DiagnosisClassifier(encoder=encoder, cache=cache)
    trainer.fit(model, datamodule=data)
    return Fit(
        report=None if cache is None else model.cache_callback.report,
        epochs=log,
        total_seconds=time.perf_counter() - begun,
        collector=collector,
    )
