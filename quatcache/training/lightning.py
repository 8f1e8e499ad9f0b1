"""The one place that binds to Lightning, under whichever of its two names the user has.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code twice: a module of one is refused by the trainer of
the other. So the name that is already imported wins; if none or both are, ``pytorch_lightning`` does; and the
environment variable ``QUATCACHE_LIGHTNING`` decides otherwise.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quatcache.errors import ConfigError, MissingDependencyError

__all__ = [
    "LIGHTNING_PACKAGES",
    "Callback",
    "CombinedLoader",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "isolate_rng",
    "pl",
]

LIGHTNING_PACKAGES = ("pytorch_lightning.", "lightning.")
"""How the names of Lightning's own modules begin."""

_NAMES = ("pytorch_lightning", "lightning.pytorch")


def _chosen_name() -> str:
    wish = os.environ.get("QUATCACHE_LIGHTNING")
    if wish:
        if wish not in _NAMES:
            raise ConfigError(f"QUATCACHE_LIGHTNING is {wish!r}; set it to one of {' or '.join(_NAMES)}.")
        return wish
    imported = [name for name in _NAMES if name in sys.modules]
    if len(imported) == 1:
        return imported[0]
    for name in _NAMES:
        if find_spec(name.partition(".")[0]) is not None:
            return name
    raise MissingDependencyError("Lightning is not installed; pip install pytorch-lightning.")


if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.utilities import CombinedLoader
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    pl = import_module(_chosen_name())
    Callback = pl.Callback
    LightningDataModule = pl.LightningDataModule
    LightningModule = pl.LightningModule
    Trainer = pl.Trainer
    CombinedLoader = import_module(f"{pl.__name__}.utilities").CombinedLoader
    isolate_rng = import_module(f"{pl.__name__}.utilities.seed").isolate_rng


def cli_module() -> Any:
    """Import Lightning's command-line module from the distribution that is bound."""
    return import_module(f"{pl.__name__}.cli")
