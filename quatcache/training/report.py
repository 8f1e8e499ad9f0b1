"""What a fill did, in numbers and in one line."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CacheReport", "EncoderReport", "readable_size"]


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


@dataclass
class CacheReport:
    """One run of a trainer.

    Attributes:
        encoders: By name, the cached ones only.
        labels: Whether targets are cached.
        labels_reason: Why they are or are not.
        fill_seconds: Wall time of the fill, the reading of datasets included; 0 where nothing was cached.
        read: Samples read from datasets in the fill.
    """

    encoders: dict[str, EncoderReport] = field(default_factory=dict)
    labels: bool = False
    labels_reason: str = "nothing is cached"
    fill_seconds: float = 0.0
    read: int = 0

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

    def line(self) -> str:
        """Say in one line what is cached, on which tier, from where, and why labels are or are not.

        Example:
            >>> CacheReport({"default": EncoderReport("default", "CPU", 3, 4608, 4, 3, 0, 1)}, True, "so", 0.5).line()
            "encoder 'default' on CPU: 3 rows, 4.6 kB in memory; 3 items encoded in 0.5 s; labels cached: so."
        """
        if not self.encoders:
            return f"No encoder is cached; labels not cached: {self.labels_reason}."
        parts = [
            f"encoder {report.name!r} on {report.tier}{report.tier_reason and f' (AUTO: {report.tier_reason})'}: "
            f"{report.rows:,} rows, {readable_size(report.nbytes)} "
            + (f"from {report.source}" if report.source else "in memory")
            for report in self.encoders.values()
        ]
        labels = "labels cached" if self.labels else "labels not cached"
        return (
            f"{', '.join(parts)}; {self.encoded:,} items encoded in {self.fill_seconds:.1f} s; {labels}: "
            f"{self.labels_reason}."
        )


def readable_size(nbytes: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> readable_size(1_536_000)
        '1.5 MB'
    """
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
