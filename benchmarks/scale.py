"""How fill, epoch, warm start and memory grow with the rows; the encoder costs next to nothing, the rest is real."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import process
from benchmarks.report import Bar
from benchmarks.settings import Found, Settings

__all__ = ["bench_scale", "slope"]

BATCH = 512
EPOCHS = 2  # a warm-up and one that counts


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit a line to the logarithms: 1 is growth in proportion, 0 none.

    Args:
        sizes: At least two, > 0.
        values: One for each, > 0.
    """
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread


def bench_scale(settings: Settings, console: Console) -> Found:
    """Fill caches of several sizes by fits on tier DISK, and train from them in the next process."""
    found: list[dict[str, Any]] = []
    for rows in settings.sizes:
        with tempfile.TemporaryDirectory(prefix="scale-", dir=settings.folder) as folder:
            place = {"folder": folder, "rows": rows, "batch": BATCH}
            cold = process.work("scale_contender", "cold", **place)
            warm = process.work("scale_contender", "warm", epochs=EPOCHS, **place)
        found.append(
            {
                "rows": rows,
                "fill_seconds": cold["fill_seconds"],
                "epoch_seconds": warm["epoch_seconds"][-1],
                "warm_start_seconds": warm["first_step_seconds"],
                "fill_anonymous_mb": cold["anonymous_highest"] / 1e6,
                "warm_anonymous_mb": warm["anonymous_highest"] / 1e6,
            }
        )
        latest = ", ".join(f"{name} {value:,.3g}" for name, value in found[-1].items() if name != "rows")
        console.print(f"scale, {rows:,} rows: {latest}", highlight=False, soft_wrap=True)
    measured = [name for name in found[0] if name != "rows"]
    slopes = {name: slope(settings.sizes, [one[name] for one in found]) for name in measured}
    table = Table("figure", *[f"{rows:,}" for rows in settings.sizes], "slope", title="growth with the rows, tier DISK")
    for name in measured:
        table.add_row(name.replace("_", " "), *[f"{one[name]:.3g}" for one in found], f"{slopes[name]:.2f}")
    console.print(table)
    bars = [Bar(f"growth with the rows, slope: {name.replace('_', ' ')}", slopes[name]) for name in measured]
    return {"sizes": found, "slopes": slopes}, bars
