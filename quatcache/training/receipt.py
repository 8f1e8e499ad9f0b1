"""What a run is told about its cache when it ends: measured epochs, logged and shown."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from rich.console import Console

from quatcache.training.gathering import RowGatherer
from quatcache.training.lightning import Trainer
from quatcache.training.report import CacheReport

__all__ = ["Receipt"]


class Receipt:
    """Measures epochs into a report, and gives the report to loggers and people.

    Args:
        trainer: The trainer of the run.
        report: What is measured goes there.
        gatherer: Counts the rows that are used.
        filling: Gives the seconds that went, in steps, into rows that were kept.
    """

    def __init__(
        self, trainer: Trainer, report: CacheReport, gatherer: RowGatherer, filling: Callable[[], float]
    ) -> None:
        """Measure nothing yet."""
        self._filling = filling
        self._trainer = trainer
        self._report = report
        self._gatherer = gatherer
        self._start: tuple[float, float, Counter[str]] | None = None
        self._served: Counter[str] = Counter()

    def begin_epoch(self) -> None:
        """Note when a training epoch starts."""
        self._start = time.monotonic(), self._filling(), Counter(self._gatherer.served)

    def end_epoch(self) -> None:
        """Note what a training epoch took, its validation included; unless the cache stepped aside in it."""
        self._report.epochs += 1
        if self._start is None or self._gatherer.aside:
            return
        started, filling, served = self._start
        filled = self._filling() - filling  # rows that were made in this epoch and serve the next ones
        self._report.fill_seconds += filled
        self._report.epoch_seconds.append(time.monotonic() - started - filled)
        for name, total in self._gatherer.served.items():
            self._served[name] += total - served[name]
        self._start = None
        self._tell()

    def _tell(self) -> None:
        """Put the sums into the report: the report of an encoder is made anew when loaders are reloaded."""
        for name, report in self._report.encoders.items():
            report.served = self._served[name]

    def log(self) -> None:
        """Give the loggers of the trainer what the cache did."""
        self._tell()
        for logger in self._trainer.loggers if self._report.encoders else ():
            logger.log_metrics(self._report.metrics(), step=self._trainer.global_step)

    def show(self) -> None:
        """Show what the cache did, where somebody looks."""
        self._tell()
        if self._report.encoders and self._trainer.is_global_zero and self._trainer.progress_bar_callback is not None:
            console = Console(highlight=False)
            console.print(self._report.table())
            console.print(f"quatcache: {self._report.gain()}")
