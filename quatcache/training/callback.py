"""The Lightning callback: when a session starts, and when it ends."""

from __future__ import annotations

import logging
from typing import Any

from quatcache.errors import ConfigError
from quatcache.training.config import CacheConfig, CacheType, checked_config
from quatcache.training.guards import checked_metrics, encoders_of
from quatcache.training.internals import is_compiled, leave_out_hooks
from quatcache.training.lightning import Callback, LightningModule, Trainer
from quatcache.training.loss_log import LossLog
from quatcache.training.report import CacheReport
from quatcache.training.session import CacheSession

__all__ = ["CacheCallback"]

logger = logging.getLogger(__name__)


class CacheCallback(Callback):
    """Fills the cache before a run, trains from it, and leaves everything as it was.

    A :class:`TrainableModel` brings its own along. By hand it serves any LightningModule whose ``encoders`` attribute
    maps names to :class:`~quatcache.Encoder` objects, and whose steps take a :class:`~quatcache.data.Batch`.

    Args:
        config: How to cache; None: loaders collate through the encoders, and nothing is cached.

    Attributes:
        report: What the last run cached; see :class:`~quatcache.training.CacheReport`.

    Example:
        >>> CacheCallback(CacheConfig(batch_size=64)).report.encoded
        0
    """

    def __init__(self, config: CacheConfig | None = None) -> None:
        """Keep the config; nothing is touched before a run."""
        self.config = checked_config(config, "config is", remedy="pass")
        self.report = CacheReport()
        self.brought_by_model = False
        self._session: CacheSession | None = None
        leave_out_hooks(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the loader sources, before Lightning asks them for loaders."""
        if self._session is not None and self._session.is_running_elsewhere(trainer):
            raise ConfigError(
                f"{type(pl_module).__name__} is in the middle of a run of another trainer; give this run "
                "copy.deepcopy(model)."
            )
        self._end()
        losses = _loss_log_of(pl_module)
        if losses is not None and is_compiled(pl_module):
            losses.stay_untraced()
        self._session = CacheSession(trainer, pl_module, self.config)
        self.report = self._session.report
        if self.config is not None:
            self._tell_if_nothing_is_cached(pl_module, self.config)

    def _tell_if_nothing_is_cached(self, module: LightningModule, config: CacheConfig) -> None:
        reasons = []
        for name, encoder in sorted(encoders_of(module).items()):
            if not encoder.trainable and config.tier_of(name) is not CacheType.NONE:
                return
            reasons.append(f"encoder {name!r} is {'trainable' if encoder.trainable else 'on tier NONE'}")
        self.report.labels_reason = ", ".join(reasons)
        logger.info(self.report.line())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill, now that the model is on its device and its weights are restored, and no loader was made."""
        if isinstance(getattr(pl_module, "cache_callback", None), CacheCallback):  # a TrainableModel
            model: Any = pl_module
            checked_metrics(model.configure_metrics())  # what the first validation would refuse, before the fill
        if self._session is not None:
            self._session.prepare()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the losses of an earlier run: one that resumes in the middle of an epoch has no start of it."""
        losses = _loss_log_of(pl_module)
        if losses is not None:
            losses.begin(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the encoders are still those that filled the cache."""
        if self._session is not None:
            self._session.begin_epoch()
        losses = _loss_log_of(pl_module)
        if losses is not None:
            losses.begin(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the epoch took."""
        if self._session is not None:
            self._session.receipt.end_epoch()
            self._session.keep_frozen()
        self._conclude(pl_module, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the averages which some callbacks validate with have the same frozen encoders."""
        if self._session is not None:
            self._session.keep_frozen()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean loss if the last batch came early."""
        self._conclude(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean loss if the last batch came early."""
        self._conclude(pl_module, "test")

    @staticmethod
    def _conclude(module: LightningModule, stage: str) -> None:
        losses = _loss_log_of(module)
        if losses is not None:
            losses.conclude(module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commit what was cached in steps, and log the report, while the loggers are open."""
        if self._session is not None:
            self._session.finish()
            self._session.receipt.log()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Step aside if an encoder was unfrozen, as a fine-tuning callback may do at any step."""
        if self._session is not None:
            self._session.look(batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, for what users do in ``on_fit_end`` and after; and show the report."""
        session = self._session
        self._end()
        if session is not None:
            session.receipt.show()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back: after an error or Ctrl-C ``teardown`` is not called."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back after a run of any kind."""
        self._end()

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.restore()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run behind: copies of a model, as some callbacks and spawned workers make them, are not in it."""
        return {**self.__dict__, "_session": None}

    def state_dict(self) -> dict[str, Any]:
        """Give nothing: a cache is not part of a checkpoint."""
        return {}


def _loss_log_of(module: LightningModule) -> LossLog | None:
    """Give what logs the losses of a TrainableModel; None: a module of another kind logs as it likes."""
    losses = getattr(module, "loss_log", None)
    return losses if isinstance(losses, LossLog) else None
