"""What a hit costs in caches that people use for functions and embeddings."""

from __future__ import annotations

import tempfile
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import process
from benchmarks.report import Bar
from benchmarks.settings import Found, Settings, installed
from benchmarks.turns import take_turns

__all__ = ["NAMES", "bench_hits"]

PASSES = 5
NAMES = [
    "dict",
    "lru_cache",
    "cachetools",
    "batche",
    "batche, bounded",
    "joblib.Memory",
    "diskcache",
    "langchain",
    "quatcache, memoize_batch",
    "quatcache, memoize_batch, bounded",
    "quatcache, MemoryStore",
    "quatcache, TensorStore",
    "quatcache, DiskStore",
    "quatcache, key and gather",
]
QUICKEST = "quatcache, key and gather"


def bench_hits(settings: Settings, console: Console) -> Found:
    """Time look-ups of batches of 1,000 texts, and see what becomes of equal misses."""
    names = installed(NAMES, console)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def once(name: str) -> float:
        with tempfile.TemporaryDirectory(prefix="hits-", dir=settings.folder) as folder:
            found[name].append(process.work("hits_contenders", "look_up", contender=name, passes=PASSES, folder=folder))
        return float(found[name][-1]["us_tensor"])

    runs = {name: lambda turn, name=name: once(name) for name in names}
    turns = take_turns(runs, settings.rounds, console, "hits, us an item as one tensor")
    each = {name: sorted(one["us_each"] for one in rounds)[len(rounds) // 2] for name, rounds in found.items()}
    computed = {name: rounds[0]["computed_of_three"] for name, rounds in found.items()}
    table = Table(
        "cache", "us/item", "us/item as one tensor", "computed of 3 misses, 2 of them equal",
        title=f"hits: batches of 1,000 short texts, rows of 384 float32, {settings.rounds} rounds",
    )  # fmt: skip
    for name in names:
        times = computed[name]
        table.add_row(name, f"{each[name]:.3f}", f"{turns.median(name):.3f}", "" if times is None else str(times))
    console.print(table)
    console.print("stocaching is left out: it caches items of a dataset by index, as the part slots shows")
    figures = {
        "us_per_item": each,
        "us_per_item_as_tensor": {name: turns.median(name) for name in names},
        "rounds_as_tensor": turns.values,
        "computed_of_three": computed,
    }
    bars = [
        Bar("hit of quatcache, key and gather / hit of a dict, as one tensor", turns.ratio(QUICKEST, "dict")),
        Bar("2 distinct misses among 3: computed by read_through", computed["quatcache, TensorStore"], 2.0),
    ]
    if "batche" in each:
        bars += [
            Bar(f"hit of memoize_batch / hit of batche{bounded}", _ratio(found, bounded), 1.0)
            for bounded in ("", ", bounded")
        ]
    return figures, bars


def _ratio(found: dict[str, list[dict[str, Any]]], bounded: str) -> float:
    """Give the median of the rounds' ratios."""
    ours, theirs = found[f"quatcache, memoize_batch{bounded}"], found[f"batche{bounded}"]
    return median(one["us_each"] / other["us_each"] for one, other in zip(ours, theirs, strict=True))
