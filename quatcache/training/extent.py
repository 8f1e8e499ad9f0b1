"""How much of a dataset a run takes: where it is little, filling a cache with all of it would be a waste."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler

from quatcache.training.lightning import Trainer

__all__ = ["takes_little"]

LITTLE = 0.5
"""A run that takes a smaller share of a dataset has its rows cached as they are met."""


def takes_little(trainer: Trainer, loader: DataLoader[Any], name: str, views: int = 1) -> bool:
    """Say whether a run ends before it has taken half of what a loader has.

    Args:
        trainer: Its limits decide, ``fast_dev_run`` and ``overfit_batches`` among them.
        loader: The loader.
        name: What it is for, such as ``"train"`` or ``"val 1"``.
        views: How many views each sample has; an epoch takes one of them.
    """
    stage = name.split()[0]
    limit = getattr(trainer, f"limit_{stage}_batches")
    steps = trainer.max_steps if stage == "train" and trainer.max_steps >= 0 else math.inf
    if limit == 1.0 and isinstance(limit, float) and math.isinf(steps) and views == 1:
        return False
    try:
        whole = len(loader)
    except TypeError:  # of a batch sampler without a length
        return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    taken = whole * limit if isinstance(limit, float) else min(whole, limit)
    if stage == "train":
        overfits = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        repeats_itself = views == 1 and (overfits or isinstance(loader.sampler, SequentialSampler))
        epochs = 1 if repeats_itself else trainer.max_epochs
        taken *= math.inf if epochs is None or epochs < 0 else epochs
        taken = min(taken, steps * trainer.accumulate_grad_batches)
    return taken < LITTLE * whole * views
