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
from ctypes import c_float
from dataclasses import dataclass, field
from typing import Any

import torch

from quatcache.training.internals import acts_on_steps, is_attached, let_metric_rest, unseen_steps
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
    "backward",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
)
_OWN = (*LIGHTNING_PACKAGES, "quatcache.")


@dataclass
class _Mean:
    """A mean in the making, with the arithmetic that Lightning has for means over an epoch."""

    number: float = 0.0
    total: torch.Tensor | None = None  # None: the number is the total
    count: int = 0

    def add(self, loss: torch.Tensor, size: int) -> None:
        self.count += size
        if self.total is None and loss.is_cpu and loss.dtype is torch.float32 and not loss.dim():
            # two operations on tensors take a tenth of a small step's loss; float64, rounded, gives what float32 does
            self.number = c_float(self.number + c_float(loss.item() * size).value).value
            return
        value = loss.detach()
        if value.dtype not in (torch.float32, torch.float64):
            value = value.to(torch.float32)
        self.total = (self.number if self.total is None else self.total) + value * size

    def result(self) -> torch.Tensor:
        total = torch.tensor(self.number, dtype=torch.float32) if self.total is None else self.total
        return total / torch.tensor(self.count, device=total.device)


@dataclass
class LossLog:
    """Logs ``<stage>_loss`` with the values, and at the places, where a ``self.log`` in each step would show them.

    Attributes:
        time_func: Clock in seconds.
    """

    time_func: Callable[[], float] = time.monotonic
    _means: dict[str, _Mean] = field(default_factory=dict)
    _each_step: bool = True
    _logged: bool = False  # by the step before
    _unseen_until: int = 0  # of this epoch: no step before it is looked at
    _has_bar: bool = True
    _shown: float = -math.inf  # when a progress bar was last given a loss

    def stay_untraced(self) -> None:
        """Keep out of the graphs of a compiled model: what is logged depends on the trainer, and on the clock.

        Called for those models alone, for it imports the compiler.
        """
        for name in ("train", "evaluate"):
            method = getattr(type(self), name).__get__(self)
            setattr(self, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what :meth:`stay_untraced` has put in the place of methods: it would not pickle."""
        return {name: value for name, value in vars(self).items() if name not in ("train", "evaluate")}

    def begin(self, module: LightningModule) -> None:
        """Find out at the start of a training epoch who may look at the loss of a step."""
        self._means.clear()
        self._unseen_until = 0
        self._each_step = _watched(module.trainer, module)
        self._has_bar = module.trainer.progress_bar_callback is not None

    def train(self, module: LightningModule, loss: torch.Tensor, size: int, batch_idx: int) -> None:
        """Log the loss of a training step if it is seen, and its mean over the epoch in the last step of it."""
        if not is_attached(module):
            module.log("train_loss", loss, batch_size=size, prog_bar=True)
            return
        trainer = module.trainer
        self._means.setdefault("train", _Mean()).add(loss, size)
        seen = self._each_step or (self._has_bar and self._shows())
        if batch_idx >= self._unseen_until or trainer.should_stop:
            unseen = unseen_steps(trainer, batch_idx)
            self._unseen_until = batch_idx + unseen
            seen = seen or not unseen or trainer.should_stop
        if seen:
            module.log("train_loss", loss, batch_size=size, prog_bar=True)
        elif self._logged:
            let_metric_rest(trainer, "train_loss")
        self._logged = seen
        if batch_idx >= self._unseen_until and trainer.is_last_batch:
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
        if len(batches) != 1 or batches[0] == math.inf:  # a mean for each loader; or no telling which step is the last
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

    def _shows(self) -> bool:
        """Say whether a progress bar wants another loss."""
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
    if vars(owner).get(hook) is not None:
        return True
    method = getattr(type(owner), hook, None)
    return method is not getattr(base, hook, None) and not str(getattr(method, "__module__", "")).startswith(_OWN)
