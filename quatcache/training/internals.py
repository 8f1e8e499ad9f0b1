"""The one module that knows private names of Lightning.

Each is used where there is no public way, stands in a function that says what it is wanted for, and has a test that
fails if a version of Lightning does without it.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from types import FrameType
from typing import Any

from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader

from quatcache.training.lightning import LIGHTNING_PACKAGES, Callback, LightningModule, Trainer, pl

__all__ = [
    "acts_on_steps",
    "averages_of",
    "give_loaders",
    "is_attached",
    "is_bookkeeping",
    "is_compiled",
    "leave_out_hooks",
    "let_metric_rest",
    "loader_source",
    "looks_in_passing",
    "pass_profiler_by",
    "restore_profiler",
    "set_loader_source",
    "try_to_share_out",
    "unseen_steps",
]

_ON_THE_WAY = ("torch.", "quatcache.")
_HOOKS_OF_EACH_STEP = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_BOOKKEEPERS = (*LIGHTNING_PACKAGES, "lightning_fabric.")


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


def try_to_share_out(trainer: Trainer, loader: DataLoader[Any]) -> None:
    """Have Lightning share out the batches of a loader among ranks, for the error that it would raise after the fill.

    It is not asked about batch samplers of which it would make others: making one may draw random numbers.

    Args:
        trainer: The trainer, in a run.
        loader: One of the user's.

    Raises:
        TypeError: Its batches are those of a batch sampler that Lightning does not know how to make.
    """
    batches: Any = loader.batch_sampler
    is_made = isinstance(batches, BatchSampler) or (hasattr(batches, "batch_size") and hasattr(batches, "drop_last"))
    if trainer.world_size > 1 and not is_made:
        alike: DataLoader[Any] = DataLoader(loader.dataset, batch_sampler=batches)
        trainer._data_connector._prepare_dataloader(alike, False, trainer.state.stage)  # type: ignore[arg-type]


def is_attached(module: LightningModule) -> bool:
    """Say whether a module belongs to a trainer, so that its steps may ask for it."""
    return getattr(module, "_trainer", None) is not None


def is_compiled(module: LightningModule) -> bool:
    """Say whether Lightning runs the steps of a module as ``torch.compile`` has made them."""
    return getattr(module, "_compiler_ctx", None) is not None


def leave_out_hooks(callback: Callback) -> None:
    """Have Lightning not call the hooks of a step that a callback leaves as they are.

    It enters the context of a profiler for each of them, six a step. A hook that cannot be called is passed over; the
    class keeps it, for subclasses that call it.
    """
    for hook in _HOOKS_OF_EACH_STEP:
        if getattr(type(callback), hook) is getattr(Callback, hook):
            setattr(callback, hook, None)


def pass_profiler_by(trainer: Trainer) -> None:
    """Have a trainer without a profiler enter no context of one.

    Lightning then has one that records nothing, and still runs a generator for each of two dozen actions a step, which
    takes 60 us. A profiler of another kind, and a subclass of this one, is left alone.
    """
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is pl.profilers.PassThroughProfiler:
        vars(profiler).setdefault("profile", nullcontext)


def restore_profiler(trainer: Trainer) -> None:
    """Undo what :func:`pass_profiler_by` did."""
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    if vars(profiler).get("profile") is nullcontext:
        del profiler.profile


def unseen_steps(trainer: Trainer, batch_idx: int) -> int:
    """Count the training steps, from the one under way on, after which neither loggers nor monitors look at the loss.

    They look every so many steps, when a validation follows, and when the epoch or the training ends.

    Args:
        trainer: The trainer, in a training step.
        batch_idx: Of the step within its epoch.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    every: Any = trainer.val_check_batch
    if getattr(trainer, "_val_check_time_interval", None) is not None or math.isinf(trainer.num_training_batches):
        return 0  # by the clock, or by what the loader has: it can be any step
    left = [trainer.num_training_batches - 1 - batch_idx]
    logged: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if logged:
        left.append(logged - 1 - loop._batches_that_stepped % logged)
    if every not in (None, float("inf")):
        left += [every - 1 - batch_idx % every, every - 1 - loop.total_batch_idx % every]
    if trainer.max_steps != -1:
        left.append(
            trainer.max_steps - 1 - trainer.global_step if trainer.lightning_module.automatic_optimization else 0
        )
    return max(int(min(left)), 0)


def let_metric_rest(trainer: Trainer, name: str) -> None:
    """Have a metric of a training step not be read again in steps that do not log it.

    After each step Lightning would compute it once more, and for a progress bar wait for the device. The value that was
    logged last stays where callbacks, loggers and bars find it.

    Args:
        trainer: The trainer, in a training step.
        name: Of a tensor that is logged by steps only.
    """
    results: Any = trainer._results
    if results and f"training_step.{name}" in results:
        results[f"training_step.{name}"].reset()


def acts_on_steps(callback: Callback) -> bool:
    """Say whether a callback of Lightning's own acts on the loss of a step, or may end the run after any step."""
    by_steps = getattr(callback, "_every_n_train_steps", 0) or getattr(callback, "_train_time_interval", None)
    return bool(by_steps) or isinstance(callback, pl.callbacks.Timer)


def averages_of(trainer: Trainer) -> list[Any]:
    """Give the copies of the model in which callbacks of Lightning's own average its weights."""
    averages = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    models = (average.module for average in averages if isinstance(average, AveragedModel))
    return [model for model in models if isinstance(model, LightningModule)]  # one of users may be of a part


def looks_in_passing(module: LightningModule) -> bool:
    """Say whether it is Lightning, and no code of the user's, that looks through the parts of a module right now.

    In a run it does so between hooks: to move modules, wrap them, note their modes. In hooks it is the user who looks,
    or a callback that changes what it finds; but for some bookkeeping.
    """
    if is_bookkeeping():
        return True
    trainer = module._trainer
    if trainer is None or trainer.state.status != "running":
        return False
    return module._current_fx_name is None or not _is_in_hook()


def _is_in_hook() -> bool:
    """Say whether a hook is being called: a run that an error ended has left the name of its last one behind."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        calls = frame.f_globals.get("__name__", "").endswith(".trainer.call")
        if calls and "prev_fx_name" in frame.f_code.co_varnames:
            return True
        frame = frame.f_back
    return False


def is_bookkeeping() -> bool:
    """Say whether the caller works for Lightning's model summary, a change of device, or the search for a metric."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if name.startswith(_BOOKKEEPERS):
            if ".model_summary" in name or name.endswith(".device_dtype_mixin"):
                return True
            if not function.startswith("<"):  # a comprehension is part of what it stands in
                return name.endswith(".core.module") and function == "log"
        elif not name.startswith(_ON_THE_WAY):
            return False
        frame = frame.f_back
    return False
