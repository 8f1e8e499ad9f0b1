"""Losses of steps, logged when somebody can see them.

``self.log`` costs a step about 0.7 ms on one core, which is a quarter of what a small head takes. Most of these calls
nobody sees: loggers are written to every ``log_every_n_steps`` steps, callbacks look when an epoch or a validation
ends, and of a mean over an epoch only its end counts. So the loss goes to ``self.log`` in the steps in which its value
is read, and in every step where it cannot be known who reads it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quatcache.training.internals import acts_on_steps, is_attached, loggers_are_due, looks_between_steps
from quatcache.training.lightning import LIGHTNING_PACKAGES, Callback, LightningModule, Trainer

__all__ = ["LossLog"]

REFRESH_SECONDS = 0.1
"""A progress bar shows a loss that is at most so old."""

_HOOKS_OF_STEPS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_start",
    "on_train_batch_end",
)
_OWN = (*LIGHTNING_PACKAGES, "quatcache.")


@dataclass
class _Mean:
    """A mean in the making, with the arithmetic that Lightning has for means over an epoch."""

    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def add(self, loss: torch.Tensor, size: int) -> None:
        value = loss.detach()
        if value.dtype not in (torch.float32, torch.float64):
            value = value.to(torch.float32)
        self.total = self.total.to(value.device) + value * size
        self.count += size

    def result(self) -> torch.Tensor:
        return self.total / torch.tensor(self.count, device=self.total.device)


@dataclass
class LossLog:
    """Logs ``<stage>_loss`` with the values, and at the places, where a ``self.log`` in each step would show them.

    Attributes:
        time_func: Clock in seconds.
    """

    time_func: Callable[[], float] = time.monotonic
    _means: dict[str, _Mean] = field(default_factory=dict)
    _each_step: bool = True
    _shown: float = -math.inf  # when a progress bar was last given a loss

    def begin(self, module: LightningModule) -> None:
        """Find out at the start of a training epoch who may look at the loss of a step."""
        self._means.clear()
        self._each_step = _watched(module.trainer, module)

    def train(self, module: LightningModule, loss: torch.Tensor, size: int, batch_idx: int) -> None:
        """Log the loss of a training step if it is seen, and its mean over the epoch in the last step of it."""
        if not is_attached(module):
            module.log("train_loss", loss, batch_size=size, prog_bar=True)
            return
        trainer, mean = module.trainer, self._means.setdefault("train", _Mean())
        mean.add(loss, size)
        last = bool(trainer.is_last_batch)
        if self._each_step or last or self._is_seen(trainer, batch_idx):
            module.log("train_loss", loss, batch_size=size, prog_bar=True)
        if last:
            self.conclude(module, "train")

    def evaluate(self, module: LightningModule, stage: str, loss: torch.Tensor, size: int, batch_idx: int) -> None:
        """Log the mean loss over an evaluation in the last step of it.

        Args:
            module: In the middle of an evaluation step.
            stage: ``"val"`` or ``"test"``.
            loss: A mean over the batch.
            size: Of the batch.
            batch_idx: Of the batch.
        """
        batches = _batches(module.trainer, stage) if is_attached(module) else []
        if len(batches) != 1:  # a mean for each loader, named by Lightning
            module.log(f"{stage}_loss", loss, batch_size=size, prog_bar=True)
            return
        if batch_idx == 0:
            self._means.pop(stage, None)  # what an evaluation that was broken off has left
        self._means.setdefault(stage, _Mean()).add(loss, size)
        if batch_idx + 1 == batches[0]:
            self.conclude(module, stage)

    def conclude(self, module: LightningModule, stage: str) -> None:
        """Log the mean of an epoch, unless that was done: a loader may have had fewer batches than it said."""
        mean = self._means.pop(stage, None)
        if mean is None:
            return
        name = "train_loss_epoch" if stage == "train" else f"{stage}_loss"
        # the sum of one value is that value, bit for bit; a mean would weigh it once more
        settings: dict[str, Any] = {"on_step": False, "on_epoch": True, "reduce_fx": "sum", "batch_size": mean.count}
        module.log(name, mean.result(), prog_bar=stage != "train", **settings)

    def _is_seen(self, trainer: Trainer, batch_idx: int) -> bool:
        if loggers_are_due(trainer) or looks_between_steps(trainer, batch_idx):
            return True
        if trainer.progress_bar_callback is None:
            return False
        now = self.time_func()
        if now - self._shown < REFRESH_SECONDS:
            return False
        self._shown = now
        return True


def _batches(trainer: Trainer, stage: str) -> list[int | float]:
    """Count the batches of each loader of an evaluation."""
    counts = trainer.num_sanity_val_batches if trainer.sanity_checking else getattr(trainer, f"num_{stage}_batches")
    return counts if isinstance(counts, list) else [counts]


def _watched(trainer: Trainer, module: LightningModule) -> bool:
    """Say whether code that is not known here may look at the loss of any step."""
    if trainer.fast_dev_run or any(  # type: ignore[attr-defined]
        one.interval == "step" and one.monitor for one in trainer.lr_scheduler_configs
    ):
        return True
    if any(_is_foreign(module, LightningModule, hook) for hook in _HOOKS_OF_STEPS):
        return True
    return any(
        acts_on_steps(callback) or any(_is_foreign(callback, Callback, hook) for hook in _HOOKS_OF_STEPS)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


def _is_foreign(owner: object, base: type, hook: str) -> bool:
    """Say whether a hook is neither left as it is nor implemented by Lightning or here."""
    if hook in vars(owner):
        return True
    method = getattr(type(owner), hook, None)
    return method is not getattr(base, hook, None) and not str(getattr(method, "__module__", "")).startswith(_OWN)
