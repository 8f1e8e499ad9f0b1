"""How much is measured, and what a part of the benchmarks answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import Bar
from benchmarks.store import FULL, Sizes

__all__ = ["Found", "Settings", "installed"]

Found = tuple[dict[str, Any], list[Bar]]
"""Figures, such as JSON can hold, and the bars that stand on them."""

QUATERION = Path("results/quaterion/bin/python")

_NEEDS = {
    "batche": "batche",
    "batche, bounded": "batche",
    "cachetools": "cachetools",
    "datasets.map": "datasets",
    "diskcache": "diskcache",
    "joblib.Memory": "joblib",
    "langchain": "langchain_classic",
    "stocaching": "stocaching",
}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: Rounds of every part, > 0; the median counts.
        rows: Rows of an epoch, 384 float32 each.
        check_rows: Rows of the comparison that precedes the times.
        texts: Descriptions that MiniLM encodes.
        glosses: Glosses that static embeddings encode.
        images: JPEG files that are read through slots.
        warm_rows: Rows of a warm start.
        warm_steps: Steps of a whole process that starts warm.
        quaterion_rows: Rows of Quaterion's warm start.
        sizes: Rows of the caches by which growth is drawn.
        large_rows: Rows of float16 of the largest cache.
        folder: Where caches are written; what is written there is deleted.
        quaterion: The interpreter of Quaterion's environment.
        store: Sizes of the figures of the store.
        store_parts: Which of them are taken; ``None``: all.
        tmpfs: A folder in memory where the write rate is taken as well; ``None``: it is not.
    """

    rounds: int = 5
    rows: int = 200_000
    check_rows: int = 20_000
    texts: int = 800
    glosses: int = 117_000
    images: int = 500
    warm_rows: int = 1_000_000
    warm_steps: int = 200
    quaterion_rows: int = 200_000
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    large_rows: int = 10_000_000
    folder: Path = Path("results")
    quaterion: Path = QUATERION
    store: Sizes = field(default=FULL)
    store_parts: list[str] | None = None
    tmpfs: Path | None = None

    def with_quaterion(self, console: Console) -> bool:
        """Say whether Quaterion takes part; where it does not, print how it would."""
        if self.quaterion.parent.with_name(".installed").exists():  # the last thing that make bench-quaterion makes
            return True
        console.print("quaterion is left out: make bench-quaterion gives it an environment of its own (Python 3.11)")
        return False


def installed(contenders: Iterable[str], console: Console) -> list[str]:
    """Leave out contenders whose package is not installed, and say which.

    Args:
        contenders: Their names.
        console: Told of those that are left out.
    """
    kept = []
    for name in contenders:
        package = _NEEDS.get(name)
        if package is None or find_spec(package) is not None:
            kept.append(name)
        else:
            console.print(f"{name} is left out: {package} is not installed; pip install '.\\[bench]'")
    return kept
