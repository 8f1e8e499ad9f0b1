"""Where a trainer's loops get their loaders from, and who looks: the one module that knows Lightning's private names.

Each loop holds a source, whose ``dataloader()`` Lightning calls once a run, or again and again with
``reload_dataloaders_every_n_epochs``. Replacing the source rather than a loader serves every kind of loader (passed to
``fit``, from hooks, from a datamodule, lists, dicts, combined) and every reload, and it is undone by putting the old
source back: nothing of the user's is modified.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from quatcache.training.lightning import LIGHTNING_PACKAGES, CombinedLoader, LightningModule, Trainer

__all__ = ["LoaderSources", "is_bookkeeping", "looks_in_passing"]

_ON_THE_WAY = ("torch.", "quatcache.")
_BOOKKEEPERS = (*LIGHTNING_PACKAGES, "lightning_fabric.")

Convert = Callable[[Any, str], Any]
"""From one of the user's loaders, and what it is for (``"train"``, ``"val 1"``), to the loader that takes its place."""


class _ConvertedSource:
    """A source whose loaders are converted on their way to a loop."""

    def __init__(self, source: Any, stage: str, mode: str, convert: Convert) -> None:
        self.source = source
        self._stage = stage
        self._mode = mode
        self._convert = convert
        self._requested: Any = None
        self.given: Any = None  # the user's loaders as the loop would have had them

    @property
    def name(self) -> str:
        return self.source.name  # type: ignore[no-any-return]

    @property
    def instance(self) -> Any:
        return self.source.instance

    @instance.setter
    def instance(self, value: Any) -> None:  # a trainer sets it at the start of the next run
        self.source.instance = value
        self._requested = None

    def is_defined(self) -> bool:
        return self.source.is_defined()  # type: ignore[no-any-return]

    def is_module(self) -> bool:
        return self.source.is_module()  # type: ignore[no-any-return]

    def request(self) -> list[tuple[Any, str]]:
        """Ask for the user's loaders, once: a hook may make new ones at every call."""
        loaders = self.source.dataloader()
        combined = (
            copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, self._mode)  # type: ignore[arg-type]
        )
        self._requested, self.given = combined, copy.copy(combined)
        return self._named(combined)

    def dataloader(self) -> Any:
        """Give the loop converted loaders: those requested ahead, or new ones."""
        if self._requested is None:
            self.request()
        combined, self._requested = self._requested, None
        combined.flattened = [self._convert(loader, name) for loader, name in self._named(combined)]
        return combined

    def _named(self, combined: Any) -> list[tuple[Any, str]]:
        flat = combined.flattened
        names = [self._stage] if len(flat) == 1 else [f"{self._stage} {place}" for place in range(len(flat))]
        return list(zip(flat, names, strict=True))


class LoaderSources:
    """The loader sources of one trainer run, converted until :meth:`restore`.

    Args:
        trainer: A trainer in ``setup`` or ``on_fit_start``.
        convert: Called for each loader.
    """

    def __init__(self, trainer: Trainer, convert: Convert) -> None:
        """Put converting sources in place; no loader is asked for yet."""
        self._replaced: list[tuple[Any, Any]] = []
        self._trainer = trainer
        fit = trainer.fit_loop
        if trainer.state.fn == "fit":
            self._replace(fit, "train", "max_size_cycle", convert)
            self._replace(fit.epoch_loop.val_loop, "val", "sequential", convert)
        elif trainer.state.fn == "validate":
            self._replace(trainer.validate_loop, "val", "sequential", convert)
        elif trainer.state.fn == "test":
            self._replace(trainer.test_loop, "test", "sequential", convert)
        elif trainer.state.fn == "predict":
            self._replace(trainer.predict_loop, "predict", "sequential", convert)

    def _replace(self, loop: Any, stage: str, mode: str, convert: Convert) -> None:
        source = loop._data_source
        if isinstance(source, _ConvertedSource):  # left over from a run that was cut off
            source = source.source
        converted = _ConvertedSource(source, stage, mode, convert)
        loop._data_source = converted
        self._replaced.append((loop, converted))

    def request(self) -> list[tuple[Any, str]]:
        """Ask for the loaders of a fit ahead: the train loaders, and the validation loaders if they are used.

        Returns:
            The user's loaders, each with what it is for. The loops get these, converted.
        """
        loaders = []
        for loop, source in self._replaced:
            used = (
                self._trainer.limit_train_batches if loop is self._trainer.fit_loop else self._trainer.limit_val_batches
            )
            if used != 0 and source.is_defined():
                loaders += source.request()
        return loaders

    def given_together(self) -> Any:
        """Give the list or dict of train loaders of which each step gets a batch of each; None: there is none."""
        given = next((source.given for loop, source in self._replaced if loop is self._trainer.fit_loop), None)
        return given.iterables if given is not None and isinstance(given.iterables, list | tuple | dict) else None

    def restore(self) -> None:
        """Put the user's sources back; and to the loops the user's loaders."""
        for loop, converted in self._replaced:
            if loop._data_source is converted:
                loop._data_source = converted.source
            if loop._combined_loader is not None:
                loop._combined_loader = converted.given
        self._replaced.clear()


def looks_in_passing(module: LightningModule) -> bool:
    """Say whether it is Lightning, and no code of the user's, that looks through the parts of a module right now.

    In a run it does so between hooks: to move modules, wrap them, note their modes. In hooks it is the user who looks,
    or a callback that changes what it finds; but for some bookkeeping.
    """
    if is_bookkeeping():
        return True
    trainer = module._trainer
    return trainer is not None and trainer.state.status == "running" and module._current_fx_name is None


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
