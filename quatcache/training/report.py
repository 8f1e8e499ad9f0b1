"""What a cache did for a run: in one line before training, and as a receipt after it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quatcache.units import counted, readable_size, readable_time

__all__ = ["CacheReport", "EncoderReport"]

_WIDE = 1000


@dataclass
class EncoderReport:
    """One cached encoder.

    Attributes:
        name: Its name in the model.
        tier: Where its rows are while the model trains.
        rows: Rows in its store.
        nbytes: Bytes of these rows.
        asked: Items of all datasets, each counted as often as it occurs.
        encoded: Items that the encoder was called for.
        hits: Items found in the store.
        duplicates: Items that equal an earlier one of the same chunk.
        source: Where the rows persist; None: in memory only.
        tier_reason: Why AUTO took that tier; empty where the user named it.
        verified: Stored rows that were encoded again and agreed.
        pace: Seconds in the encoder for an item, collating included, in this or an earlier run; None: not known.
        served: Rows that training and validation took and that were not encoded for it, over all measured epochs.
        in_steps: Items of ``encoded`` that were encoded in a step of training or validation.
        loaded: Whether the encoder's model is in memory; a run that finds all rows does not need it.
    """

    name: str
    tier: str = ""
    rows: int = 0
    nbytes: int = 0
    asked: int = 0
    encoded: int = 0
    hits: int = 0
    duplicates: int = 0
    source: str | None = None
    tier_reason: str = ""
    verified: int = 0
    pace: float | None = None
    served: int = 0
    in_steps: int = 0
    loaded: bool = True


@dataclass
class CacheReport:
    """One run of a trainer.

    Attributes:
        encoders: By name, the cached ones only.
        labels: Whether targets are cached.
        labels_reason: Why they are or are not; where no encoder is cached, why none is.
        fill_seconds: Wall time of the fill, the reading of datasets included; 0 where nothing was cached.
        read: Samples read from datasets in the fill.
        met: Whether rows are cached as batches meet them, instead of before the run or beside that.
        epoch_seconds: Wall time of each training epoch that the cache served, its validation included.
        epochs: Training epochs of the run; those after the cache stepped aside are among them.

    Example:
        >>> print(CacheReport({"default": EncoderReport("default", "CPU", 3, 4608, 4, 3, 0, 1)}, fill_seconds=0.5))
        ┏━━━━━━━━━┳━━━━━━┳━━━━━━┳━━━━━━━━┳━━━━━━━━━┳━━━━━━┳━━━━━━━━━━━━┓
        ┃ encoder ┃ tier ┃ rows ┃   size ┃ encoded ┃ hits ┃ duplicates ┃
        ┡━━━━━━━━━╇━━━━━━╇━━━━━━╇━━━━━━━━╇━━━━━━━━━╇━━━━━━╇━━━━━━━━━━━━┩
        │ default │ CPU  │    3 │ 4.6 kB │       3 │    0 │          1 │
        └─────────┴──────┴──────┴────────┴─────────┴──────┴────────────┘
        fill 0.5 s
    """

    encoders: dict[str, EncoderReport] = field(default_factory=dict)
    labels: bool = False
    labels_reason: str = "there was no run with a CacheConfig"
    fill_seconds: float = 0.0
    read: int = 0
    met: bool = False
    epoch_seconds: list[float] = field(default_factory=list)
    epochs: int = 0

    @property
    def encoded(self) -> int:
        """Count the items that were encoded, over all encoders."""
        return sum(encoder.encoded for encoder in self.encoders.values())

    @property
    def hits(self) -> int:
        """Count the items that were found, over all encoders."""
        return sum(encoder.hits for encoder in self.encoders.values())

    @property
    def duplicates(self) -> int:
        """Count the items that equal an earlier one, over all encoders."""
        return sum(encoder.duplicates for encoder in self.encoders.values())

    @property
    def cached_epoch(self) -> float | None:
        """Median wall time of an epoch with the cache; None: none was measured."""
        return median(self.epoch_seconds) if self.epoch_seconds else None

    @property
    def uncached_epoch(self) -> float | None:
        """Estimate of the wall time of an epoch without the cache; None: no encoding was measured to go by.

        It is the epoch with the cache, and what encoding would take for the rows that it used instead: at the pace of
        the fill, which packs items of like length together, so that an epoch in dataset order would rather be slower.
        """
        if self.cached_epoch is None or any(one.pace is None for one in self.encoders.values()):
            return None
        encoding = sum(one.served * (one.pace or 0.0) for one in self.encoders.values())
        return self.cached_epoch + encoding / len(self.epoch_seconds) if encoding else None

    @property
    def break_even_epoch(self) -> int | None:
        """The first epoch after which fill and cached epochs take less time than uncached ones; None: not known.

        It is computed, so it may lie beyond the epochs that were run. There is none where encoding takes too little to
        be seen beside the rest of an epoch.
        """
        if self.uncached_epoch is None or self.cached_epoch is None:
            return None
        won = self.uncached_epoch - self.cached_epoch
        epochs = self.fill_seconds / won if won > 0 else math.inf
        return math.floor(epochs) + 1 if math.isfinite(epochs) else None

    def metrics(self) -> dict[str, float]:
        """Give the numbers that a logger gets, each as ``cache/...``; what is not known is left out.

        Example:
            >>> CacheReport({"default": EncoderReport("default", "CPU", 3, 4608, 4, 3, 0, 1)}).metrics()["cache/rows"]
            3.0
        """
        reports = self.encoders.values()
        known = {
            "rows": sum(one.rows for one in reports),
            "bytes": sum(one.nbytes for one in reports),
            "encoded": self.encoded,
            "encoded_in_steps": sum(one.in_steps for one in reports),
            "hits": self.hits,
            "duplicates": self.duplicates,
            "fill_seconds": self.fill_seconds,
            "epoch_seconds": self.cached_epoch,
            "epoch_seconds_uncached": self.uncached_epoch,
            "break_even_epoch": self.break_even_epoch,
        }
        return {f"cache/{name}": float(value) for name, value in known.items() if value is not None}

    def table(self) -> Table:
        """Put what was cached into a table, one row for each encoder."""
        table = Table()
        table.add_column("encoder")
        table.add_column("tier")
        for name in ("rows", "size", "encoded", "hits", "duplicates"):
            table.add_column(name, justify="right")
        for one in self.encoders.values():
            counts = (f"{number:,}" for number in (one.encoded, one.hits, one.duplicates))
            table.add_row(Text(one.name), one.tier, f"{one.rows:,}", readable_size(one.nbytes), *counts)
        return table

    def gain(self) -> str:
        """Say what the cache cost and what it won.

        Example:
            >>> one = EncoderReport("default", "CPU", 60, 4608, 60, 60, 0, 0, pace=0.1, served=200)
            >>> CacheReport({"default": one}, fill_seconds=7.0, epoch_seconds=[0.2, 0.2]).gain()
            'fill 7.0 s; an epoch 0.2 s, without the cache about 10.2 s; ahead after epoch 1'
        """
        parts = [f"fill {readable_time(self.fill_seconds)}"]
        if self.cached_epoch is not None:
            parts.append(f"an epoch {readable_time(self.cached_epoch)}")
        if self.uncached_epoch is not None:
            parts[-1] += f", without the cache about {readable_time(self.uncached_epoch)}"
        if len(self.epoch_seconds) < self.epochs:
            parts.append(f"cached for {len(self.epoch_seconds)} of {counted(self.epochs, 'epoch')}")
        if self.break_even_epoch is not None:
            ahead = self.break_even_epoch <= len(self.epoch_seconds)
            parts.append(
                f"ahead after epoch {self.break_even_epoch}"
                if ahead
                else f"not yet ahead: that would take {self.break_even_epoch:,} epochs"
            )
        return "; ".join(parts)

    def __str__(self) -> str:
        """Write table and gain as text; where nothing is cached, why."""
        if not self.encoders:
            return self.line()
        text = io.StringIO()
        Console(width=_WIDE, color_system=None, file=text).print(self.table())
        return text.getvalue() + self.gain()

    def _work(self) -> str:
        found = f"{counted(self.hits, 'row')} found, " if self.hits else ""
        encoded = f"{counted(self.encoded, 'item')} encoded"
        if not self.met:
            return f"{found}{encoded} in {self.fill_seconds:.1f} s"
        return f"{found}{encoded} so far, others as batches meet them"

    def line(self) -> str:
        """Say in one line what is cached, on which tier and from where, what was found, and whether labels are.

        Example:
            >>> CacheReport({"default": EncoderReport("default", "CPU", 3, 4608, 4, 3, 0, 1)}, True, "so", 0.5).line()
            "encoder 'default' on CPU: 3 rows, 4.6 kB in memory; 3 items encoded in 0.5 s; labels cached."
        """
        if not self.encoders:
            return f"nothing is cached: {self.labels_reason}."
        parts = [
            f"encoder {report.name!r} on {report.tier}{report.tier_reason and f' (AUTO: {report.tier_reason})'}: "
            f"{counted(report.rows, 'row')}, {readable_size(report.nbytes)} "
            + (f"from {report.source}" if report.source else "in memory")
            + ("" if report.loaded else ", encoder not loaded")
            for report in self.encoders.values()
        ]
        labels = "labels cached" if self.labels else f"labels not cached: {self.labels_reason}"
        return f"{', '.join(parts)}; {self._work()}; {labels}."
