"""The one module that knows private names of Lightning.

Each is used where there is no public way, stands in a function that says what it is wanted for, and has a test that
fails if a version of Lightning does without it.
"""

from __future__ import annotations

from typing import Any

from quatcache.training.lightning import Callback, LightningModule, Trainer

__all__ = [
    "acts_on_steps",
    "give_loaders",
    "is_attached",
    "loader_source",
    "loggers_are_due",
    "looks_between_steps",
    "set_loader_source",
]


def loader_source(loop: Any) -> Any:
    """Give what a loop asks for its loaders."""
    return loop._data_source


def set_loader_source(loop: Any, source: Any) -> None:
    """Have a loop ask something else for its loaders, once and at each reload."""
    loop._data_source = source


def give_loaders(loop: Any, combined: Any) -> None:
    """Exchange the loaders of a loop that has some."""
    if loop._combined_loader is not None:
        loop._combined_loader = combined


def is_attached(module: LightningModule) -> bool:
    """Say whether a module belongs to a trainer, so that its steps may ask for it."""
    return getattr(module, "_trainer", None) is not None


def loggers_are_due(trainer: Trainer) -> bool:
    """Say, in a training step, whether its metrics go to the loggers."""
    return bool(trainer._logger_connector.should_update_logs)


def looks_between_steps(trainer: Trainer, batch_idx: int) -> bool:
    """Say, in a training step, whether a validation or the end of training may follow it.

    Args:
        trainer: The trainer.
        batch_idx: Of the step within its epoch.
    """
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return True
    if trainer.max_steps != -1 and trainer.global_step + 1 >= trainer.max_steps:
        return True
    every: Any = trainer.val_check_batch
    if every in (None, float("inf")):
        return False
    seen: int = trainer.fit_loop.epoch_loop.total_batch_idx
    return bool((batch_idx + 1) % every == 0 or (seen + 1) % every == 0)


def acts_on_steps(callback: Callback) -> bool:
    """Say whether a callback of Lightning's own acts on the loss of a step, or may end the run after any step."""
    by_steps = getattr(callback, "_every_n_train_steps", 0) or getattr(callback, "_train_time_interval", None)
    return bool(by_steps) or type(callback).__name__ == "Timer"
