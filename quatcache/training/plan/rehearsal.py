"""What a fit would work with, without running one: its trainer, its loaders, its config, and encoders as it has them.

Hooks run on shallow copies of their owners. What ``setup`` assigns, a random split for instance, is then not there when
the fit comes, which draws it from the same random numbers as it would have done.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from quatcache.data.devices import to_device
from quatcache.encoders import Encoder
from quatcache.encoders.frozen import FrozenEncoder
from quatcache.errors import ConfigError, LoaderError, ModelDefinitionError
from quatcache.training.callback import CacheCallback
from quatcache.training.config import CacheConfig, checked_config
from quatcache.training.lightning import (
    LIGHTNING_PACKAGES,
    CombinedLoader,
    LightningDataModule,
    LightningModule,
    Trainer,
    pl,
)
from quatcache.training.loaders import checked_loader

__all__ = ["config_of", "encoder_as_in", "frozen_as_in", "loaders_of", "trainer_without_settings"]


def trainer_without_settings() -> Trainer:
    """Make a trainer as ``Trainer()`` would be, for one device, in silence."""
    talker = logging.getLogger(pl.__name__)
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        return Trainer(
            devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
    finally:
        talker.setLevel(level)


def config_of(
    model: LightningModule, trainer: Trainer, remedy: str = "return a CacheConfig from it, or pass one as config"
) -> CacheConfig:
    """Give the config that a fit would cache by: that of a callback given to the trainer, or the model's own.

    Args:
        model: The model.
        trainer: The trainer of the fit to come.
        remedy: What to do where there is none.

    Raises:
        ConfigError: Neither would cache.
    """
    given = [callback for callback in trainer.callbacks if isinstance(callback, CacheCallback)]  # type: ignore[attr-defined]
    by_hand = [callback.config for callback in given if not callback.brought_by_model]
    hook = getattr(model, "configure_caches", None)
    found = f"{type(model).__name__}.configure_caches returned"
    config = by_hand[0] if by_hand else None if hook is None else checked_config(hook(), found, ModelDefinitionError)
    if config is None:
        raise ConfigError(f"{type(model).__name__} would not be cached: its configure_caches() gives None; {remedy}.")
    return config


@contextmanager
def loaders_of(
    model: LightningModule, train: Any, val: Any, datamodule: LightningDataModule | None, trainer: Trainer
) -> Iterator[list[tuple[DataLoader[Any], str]]]:
    """Give the loaders of a fit, each with what it is for.

    Args:
        model: Its hooks give what is given nowhere else.
        train: Loaders passed to ``fit``, or a data module in their place.
        val: Likewise.
        datamodule: Prepared and set up, in a copy, and torn down at the end.
        trainer: What hooks find as ``self.trainer``.

    Raises:
        LoaderError: There is no train loader, or a loader whose batches could not be reproduced.
    """
    if isinstance(train, LightningDataModule):
        train, datamodule = None, train
    given = {"train": train, "val": val}
    givers: dict[str, Any] = {}
    for stage, loaders in given.items():
        having = [owner for owner in (datamodule, model) if owner is not None and _has_hook(owner, stage)]
        if loaders is None and having:
            givers[stage] = having[0]
    used = [owner for owner in (datamodule, model) if owner is datamodule or owner in givers.values()]
    copies = {id(owner): copy.copy(owner) for owner in used if owner is not None}
    try:
        for owner in copies.values():
            owner.trainer = trainer
            owner.prepare_data()
            owner.setup("fit")
        for stage, owner in givers.items():
            given[stage] = getattr(copies[id(owner)], f"{stage}_dataloader")()
        if given["train"] is None:
            raise LoaderError(
                f"there is no train loader to plan for: pass one to plan(), or a data module, or give "
                f"{type(model).__name__} a train_dataloader()."
            )
        if trainer.limit_val_batches == 0:
            given["val"] = None
        yield list(chain.from_iterable(_named(loaders, stage) for stage, loaders in given.items()))
    finally:
        for owner in copies.values():
            owner.teardown("fit")


def _has_hook(owner: Any, stage: str) -> bool:
    name = f"{stage}_dataloader"
    return name in vars(owner) or not getattr(type(owner), name).__module__.startswith(LIGHTNING_PACKAGES)


def _named(loaders: Any, stage: str) -> Iterator[tuple[DataLoader[Any], str]]:
    if loaders is None:
        return
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    for place, loader in enumerate(combined.flattened):
        name = stage if len(combined.flattened) == 1 else f"{stage} {place}"
        checked = checked_loader(loader, name)
        if isinstance(checked.dataset, IterableDataset):
            raise LoaderError(
                f"the {name} loader reads an IterableDataset ({type(checked.dataset).__name__}), whose items cannot be "
                "counted or found by index; use a map-style dataset."
            )
        yield checked, name


@contextmanager
def encoder_as_in(trainer: Trainer, encoder: Encoder) -> Iterator[Encoder]:
    """Put an encoder on the device, and into the dtype, that it has in a fit; and back again.

    Casting loses digits, so a trainer that casts models is given a copy.
    """
    precision, device = trainer.precision_plugin, trainer.strategy.root_device
    if str(trainer.precision) != "32-true" and "mixed" not in str(trainer.precision):
        cast: Any = precision.convert_module(copy.deepcopy(encoder))
        yield cast.to(device)
        return
    places = {tensor.device for tensor in chain(encoder.parameters(), encoder.buffers())}
    if places <= {device}:
        yield encoder
        return
    before = next(iter(places))
    try:
        yield encoder.to(device)
    finally:
        encoder.to(before)


def frozen_as_in(trainer: Trainer, name: str, encoder: Encoder) -> FrozenEncoder:
    """Give what encodes batches in a fit.

    Args:
        trainer: The trainer.
        name: The encoder's name in its model.
        encoder: The encoder, from :func:`encoder_as_in`.

    Raises:
        NotFrozenError: Training could change it, or it is in training mode.
    """
    precision, device = trainer.precision_plugin, trainer.strategy.root_device

    def place(inputs: Any) -> Any:
        return to_device(precision.convert_input(inputs), device)

    return FrozenEncoder(name, encoder, place=place, context=precision.forward_context)
