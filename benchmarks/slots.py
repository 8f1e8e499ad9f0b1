"""Slots in shared memory: epochs over JPEG files with and without a cache, and what a slot costs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import process
from benchmarks.report import Bar
from benchmarks.settings import Found, Settings, installed
from benchmarks.turns import Turns, take_turns

__all__ = ["NAMES", "SHARES", "bench_slots", "straightness"]

NAMES = ["uncached", "stocaching", "quatcache, same code", "quatcache, CachedDataset"]
OURS, BY_HAND, THEIRS = NAMES[3], NAMES[2], NAMES[1]
LOADERS = {"no worker": (0, False), "2 workers": (2, False), "2 persistent workers": (2, True)}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH = 64
PASSES = 3
SLOTS = 200  # of the figures of single slots


def straightness(x: Sequence[float], y: Sequence[float]) -> float:
    """Say how near values lie to the line that fits them best: 1 is on it (the square of Pearson's correlation)."""
    middle_x, middle_y = mean(x), mean(y)
    common = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return common**2 / (sum((a - middle_x) ** 2 for a in x) * sum((b - middle_y) ** 2 for b in y))


def bench_slots(settings: Settings, console: Console) -> Found:
    """Time epochs, shares of a dataset that are cached, and single slots."""
    with tempfile.TemporaryDirectory(prefix="slots-", dir=settings.folder) as folder:
        size = process.work("slots_contenders", "make_images", folder=folder, count=settings.images)["bytes"]
        console.print(f"{settings.images} JPEG files of {size / 1000:.0f} kB, scaled to 3x224x224 uint8")
        epochs = _epochs(settings, console, folder)
        shares = _shares(settings, console, folder)
    single = _single(settings, console)
    figures = {"images": settings.images, "file_bytes": size, "epochs": epochs, "shares": shares, "single": single}
    return figures, _bars(epochs, shares, single)


def _epochs(settings: Settings, console: Console, folder: str) -> dict[str, Any]:
    names = installed(NAMES, console)
    figures: dict[str, Any] = {}
    for title, (workers, persistent) in LOADERS.items():
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}

        def once(name: str, found: Any = found, workers: int = workers, persistent: bool = persistent) -> float:
            answer = process.work(
                "slots_contenders", "epochs", contender=name, folder=folder, count=settings.images, batch=BATCH,
                workers=workers, persistent=persistent, passes=1 if name == NAMES[0] else PASSES,
            )  # fmt: skip
            found[name].append(answer)
            return float(answer["again_ms"])

        runs = {name: lambda turn, name=name, once=once: once(name) for name in names}
        turns = take_turns(runs, settings.rounds, console, f"slots, {title}, ms an image of a later epoch")
        turns.print(console, f"later epochs, {title}", OURS, {"ms/image": "{:.3f}".format})
        figures[title] = {
            "again_ms": {name: turns.median(name) for name in names},
            "first_ms": {name: median(one["first_ms"] for one in rounds) for name, rounds in found.items()},
            "ratios": _ratios(turns, OURS, BY_HAND),
        }
    return figures


def _ratios(turns: Turns, *ours: str) -> dict[str, float]:
    return {one: turns.ratio(one, THEIRS) for one in ours} if THEIRS in turns.values else {}


def _shares(settings: Settings, console: Console, folder: str) -> dict[str, Any]:
    """Time later epochs by how much of the dataset has slots, without workers: with them two would share the time."""

    def once(share: float) -> float:
        answer = process.work(
            "slots_contenders", "epochs", contender=OURS, folder=folder, count=settings.images, batch=BATCH, workers=0,
            persistent=False, passes=1, share=share,
        )  # fmt: skip
        return float(answer["again_ms"])

    runs = {f"{share:.0%}": lambda turn, share=share: once(share) for share in SHARES}
    turns = take_turns(runs, settings.rounds, console, "slots, ms an image by the share that is cached")
    turns.print(console, "cached share", "0%", {"ms/image": "{:.3f}".format})
    times = [turns.median(name) for name in runs]
    return {"shares": list(SHARES), "ms": times, "straightness": straightness(SHARES, times)}


def _single(settings: Settings, console: Console) -> dict[str, Any]:
    names = installed(["stocaching", "quatcache"], console)
    rounds: list[dict[str, dict[str, float]]] = [
        {
            name: process.work(
                "slots_contenders", "single", contender=name, count=min(SLOTS, settings.images), batch=min(BATCH,
                settings.images), passes=PASSES,
            )
            for name in names
        }
        for _ in range(settings.rounds)
    ]  # fmt: skip
    figures: dict[str, Any] = {
        name: {what: median(one[name][what] for one in rounds) for what in rounds[0][name]} for name in names
    }
    table = Table("us", *names, title=f"one slot of 3x224x224 uint8, and {BATCH} of them")
    for what in figures["quatcache"]:
        table.add_row(what.removesuffix("_us"), *[f"{figures[name].get(what, float('nan')):.1f}" for name in names])
    console.print(table)
    ratios = {
        what: median(one["quatcache"][what] / one["stocaching"][what] for one in rounds)
        for what in ("get_slot_us", "set_slot_us", "stacked_us")
        if "stocaching" in names
    }
    batch = median(one["quatcache"]["batch_us"] / one["quatcache"]["stacked_us"] for one in rounds)
    return {**figures, "ratios": {**ratios, "batch_to_stacked": batch}}


def _bars(epochs: dict[str, Any], shares: dict[str, Any], single: dict[str, Any]) -> list[Bar]:
    bars = []
    for title, (workers, _) in LOADERS.items():
        for name, ratio in epochs[title]["ratios"].items():
            judged = 1.0 if workers and name == OURS else None
            bars.append(Bar(f"later epoch, {title}: {name} / stocaching", ratio, judged))
        again = epochs[title]["again_ms"]
        bars.append(Bar(f"later epoch, {title}: uncached / {OURS}", again["uncached"] / again[OURS], at_most=False))
    bars.append(Bar("batch read / the same slots stacked", single["ratios"]["batch_to_stacked"], 1.0))
    for what in ("get_slot", "set_slot"):
        if f"{what}_us" in single["ratios"]:
            bars.append(Bar(f"{what}: quatcache / stocaching", single["ratios"][f"{what}_us"]))
    bars.append(Bar("time by the share that is cached: how straight (R squared)", shares["straightness"], 0.98, False))
    return bars
