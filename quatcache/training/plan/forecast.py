"""What caching would cost and save, in numbers, in a table and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quatcache.units import readable_shape, readable_size, readable_time

__all__ = ["CachePlan", "DatasetPlan", "EncoderPlan"]


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset as one encoder sees it.

    Attributes:
        name: What the dataset is for, such as ``"train"`` or ``"val 1"``.
        items: Items that an encoder would be called for without a cache, duplicates included.
        distinct: Distinct items.
        stored: Distinct items that have rows already: in ``save_dir``, or made for an encoder of the same identity.
        to_encode: Distinct items that have none.
        estimated: Whether the last three were estimated from a sample, because reading everything would take long.
    """

    name: str
    items: int
    distinct: int
    stored: int
    to_encode: int
    estimated: bool


@dataclass(frozen=True)
class EncoderPlan(DatasetPlan):
    """One encoder that would be cached, with the counts of all datasets: an item of several datasets counts once.

    Attributes:
        name: Its name in the model.
        datasets: The counts of each dataset alone.
        row_shape: Shape of one row; of sequences the first size is None.
        dtype: Dtype in which rows would be stored.
        row_bytes: Bytes of one stored row, without its key.
        total_bytes: Bytes of the distinct rows, stored or not; rows that an encoder of the same identity before this
            one has are counted there.
        bytes_by_dtype: The same for other values of ``CacheConfig.dtype``.
        tier: Where the rows would be while the model trains.
        tier_reason: Why.
        source: Directory of the rows; None: they would not persist.
        fill_seconds: To encode what must be encoded, as measured on a sample.
        epoch_seconds: Spent in this encoder by one uncached epoch, collating included.
        cached_epoch_seconds: Spent instead on gathering rows.
    """

    datasets: tuple[DatasetPlan, ...]
    row_shape: tuple[int | None, ...]
    dtype: str
    row_bytes: int
    total_bytes: int
    bytes_by_dtype: dict[str, int]
    tier: str
    tier_reason: str
    source: str | None
    fill_seconds: float
    epoch_seconds: float
    cached_epoch_seconds: float


@dataclass(frozen=True)
class CachePlan:
    """What caching a model's frozen encoders would cost and save.

    An epoch is one pass over every train and validation loader. Of it only what encoders cost is counted: head, loss
    and optimizer cost the same with a cache, and what a cache of labels saves in reading is left out.

    Attributes:
        encoders: The encoders that would be cached.
        sample: Samples that were encoded to measure.
        batch_size: Items per encoder call in the fill.
        read_seconds: For the fill to read the samples that it must read.
        save_dir: Where rows would persist; None: nowhere.
        disk_free: Bytes free there; None without a directory.
        memory_free: Bytes of main memory that are free.
        epochs: How long a training is compared; None: not told.

    Example:
        >>> encoder = EncoderPlan(
        ...     "default", items=1000, distinct=900, stored=0, to_encode=900, estimated=False, datasets=(),
        ...     row_shape=(384,), dtype="float32", row_bytes=1536, total_bytes=1382400,
        ...     bytes_by_dtype={"float16": 691200}, tier="CPU", tier_reason="it fits", source=None,
        ...     fill_seconds=9.0, epoch_seconds=10.0, cached_epoch_seconds=0.1,
        ... )
        >>> plan = CachePlan((encoder,), 256, 32, 0.9, None, None, 8_000_000_000, epochs=100)
        >>> plan.break_even_epoch, plan.total_bytes
        (2, 1382400)
        >>> print(plan.summary())
        900 of 1,000 items would be encoded in 9.9 s and kept in 1.4 MB; an uncached epoch spends 10.0 s in encoders, so
        the cache is ahead after epoch 2, and after 100 epochs encoders will have taken 19.9 s instead of 16.7 min.
    """

    encoders: tuple[EncoderPlan, ...]
    sample: int
    batch_size: int
    read_seconds: float
    save_dir: str | None
    disk_free: int | None
    memory_free: int
    epochs: int | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of the rows of all encoders, those that are stored already included."""
        return sum(encoder.total_bytes for encoder in self.encoders)

    @property
    def new_bytes(self) -> int:
        """Bytes that the fill would add, keys included."""
        return sum(encoder.to_encode * (encoder.row_bytes + 16) for encoder in self.encoders)

    @property
    def to_encode(self) -> int:
        """Rows that the fill would compute."""
        return sum(encoder.to_encode for encoder in self.encoders)

    @property
    def fill_seconds(self) -> float:
        """Time of the fill: reading and encoding."""
        return self.read_seconds + sum(encoder.fill_seconds for encoder in self.encoders)

    @property
    def epoch_seconds(self) -> float:
        """Time that one uncached epoch spends in the encoders."""
        return sum(encoder.epoch_seconds for encoder in self.encoders)

    @property
    def cached_epoch_seconds(self) -> float:
        """Time that one cached epoch spends on gathering rows in their place."""
        return sum(encoder.cached_epoch_seconds for encoder in self.encoders)

    @property
    def break_even(self) -> float | None:
        """Epochs, with a fraction, at which both have cost the same; None: a cache would never save time."""
        saved = self.epoch_seconds - self.cached_epoch_seconds
        return self.fill_seconds / saved if saved > 0 else None

    @property
    def break_even_epoch(self) -> int | None:
        """The first epoch after which fill and cached epochs have cost less than uncached epochs; None: none."""
        return None if self.break_even is None else math.floor(self.break_even) + 1

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Give headings and rows: one for each encoder and dataset, and one for the encoder where it has several."""
        headings = ["encoder", "dataset", "items", "distinct", "stored", "to encode", "row", "bytes", "tier", "fill"]
        headings += ["uncached epoch", "cached epoch"]
        rows = []
        for encoder in self.encoders:
            costs = [
                f"{readable_shape(encoder.row_shape)} {encoder.dtype}",
                readable_size(encoder.total_bytes),
                encoder.tier,
                readable_time(encoder.fill_seconds),
                readable_time(encoder.epoch_seconds),
                readable_time(encoder.cached_epoch_seconds),
            ]
            if len(encoder.datasets) == 1:
                rows.append([encoder.name, encoder.datasets[0].name, *_counts(encoder), *costs])
                continue
            rows += [[encoder.name, data.name, *_counts(data), *[""] * len(costs)] for data in encoder.datasets]
            rows.append([encoder.name, "together", *_counts(encoder), *costs])
        return headings, rows

    def summary(self) -> str:
        """Say in a sentence or two what the fill costs, and from which epoch on it pays."""
        items = sum(encoder.items for encoder in self.encoders)
        about = "about " if any(encoder.estimated for encoder in self.encoders) else ""
        if self.to_encode:
            fill = (
                f"{about}{self.to_encode:,} of {items:,} items would be encoded in {readable_time(self.fill_seconds)} "
                f"and kept in {readable_size(self.total_bytes)}"
            )
        else:
            fill = (
                f"all {items:,} items have rows already, {readable_size(self.total_bytes)} of them: nothing is encoded"
            )
        epoch = f"an uncached epoch spends {readable_time(self.epoch_seconds)} in encoders"
        if self.break_even_epoch is None:
            gain = "and a cache would not save any of it"
        else:
            gain = f"so the cache is ahead after epoch {self.break_even_epoch}"
        if self.epochs and self.break_even_epoch is not None:
            cached = self.fill_seconds + self.epochs * self.cached_epoch_seconds
            gain += (
                f", and after {self.epochs} epochs encoders will have taken {readable_time(cached)} instead of "
                f"{readable_time(self.epochs * self.epoch_seconds)}"
            )
        room = ""
        if self.disk_free is not None and self.new_bytes > self.disk_free:
            new, free = readable_size(self.new_bytes), readable_size(self.disk_free)
            room = f" The {new} to be written do not fit into the {free} that are free in {self.save_dir}."
        return f"{fill[0].upper()}{fill[1:]}; {epoch}, {gain}.{room}"

    def to_json(self) -> dict[str, Any]:
        """Give everything in numbers, strings, lists and dicts."""
        totals = (
            "total_bytes", "new_bytes", "to_encode", "fill_seconds", "epoch_seconds", "cached_epoch_seconds",
            "break_even", "break_even_epoch",
        )  # fmt: skip
        content = asdict(self) | {name: getattr(self, name) for name in totals}
        content["encoders"] = [
            {**encoder, "datasets": list(encoder["datasets"]), "row_shape": list(encoder["row_shape"])}
            for encoder in content["encoders"]
        ]
        return content


def _counts(counted: DatasetPlan) -> Sequence[str]:
    about = "~" if counted.estimated else ""
    return [f"{counted.items:,}", *(f"{about}{n:,}" for n in (counted.distinct, counted.stored, counted.to_encode))]
