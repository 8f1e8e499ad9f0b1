"""The figures of the store: warm start, memory, write rate, hashing; medians of rounds that take turns."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import one_process
from benchmarks.report import Bar

__all__ = ["FULL", "PARTS", "Sizes", "bench_store"]

MB = 1e6


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rows: Rows of the warm start, 384 float32 each.
        written: Rows of the write rate.
        filled: Rows of two fills, whose memory is compared; each more than two shards, which are in memory at most.
        texts: Texts whose keys are hashed.
        weights: Bytes of the encoder whose identity is found.
        batch: Items of a batch, in a fill and in training.
        shard_bytes: Size of a shard in the fills; 0: the package's own.
        rounds: How often each figure is taken.
    """

    rows: int = 1_000_000
    written: int = 500_000
    filled: tuple[int, int] = (400_000, 1_000_000)
    texts: int = 1_000_000
    weights: int = 100_000_000
    batch: int = 512
    shard_bytes: int = 0
    rounds: int = 5


FULL = Sizes()

Found = tuple[dict[str, Any], list[Bar]]


def measured(name: str, *arguments: object) -> dict[str, Any]:
    """Run one measure in a process of its own."""
    found: dict[str, Any] = one_process("measures", name, *arguments)
    return found


def warm_start(folder: Path, sizes: Sizes, console: Console) -> Found:
    """Time the first look-up in a cache that is there, with and without checksums, and weigh an epoch on tier DISK."""
    place = ["--folder", folder / "cache", "--rows", sizes.rows]
    written = measured("cache", *place)["bytes"]
    ways: dict[str, list[object]] = {
        "checksums": [],
        "no checksums": ["--no-checksums"],
        "checksums, cold": ["--cold"],
        "no checksums, cold": ["--no-checksums", "--cold"],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(sizes.rounds):
        for way, options in ways.items():
            seconds[way].append(measured("first_look_up", *place, "--seed", turn, *options)["seconds"])
    epochs = {way: measured("epoch", *place, *ways[way]) for way in ("checksums", "no checksums")}
    shutil.rmtree(folder / "cache")

    first = {way: median(times) for way, times in seconds.items()}
    table = Table("first look-up", "s", title=f"warm start: {sizes.rows:,} x 384 float32, {written / MB:,.0f} MB")
    for way, took in first.items():
        table.add_row(way, f"{took:.3f}")
    console.print(table)
    left = epochs["checksums"]["anonymous_left"]
    bars = [
        Bar("warm start: seconds from after the imports to the first look-up, checksums on", first["checksums"], 1.0),
        Bar("the same with checksums off", first["no checksums"]),
        Bar("the same with checksums on, nothing of it in the page cache", first["checksums, cold"]),
        Bar("warm start: MB of anonymous memory after an epoch of random batches on tier DISK", left / MB, 100.0),
        Bar("the same at its highest", epochs["checksums"]["anonymous_highest"] / MB),
    ]
    return {"bytes": written, "first_look_up_seconds": seconds, "epoch": epochs}, bars


def warm_fit(folder: Path, sizes: Sizes, console: Console) -> Found:
    """Fill by a fit, and time the first step of the fit after it."""
    place = ["--folder", folder / "cache", "--rows", sizes.rows, "--batch", sizes.batch]
    cold = measured("fit", *place)
    warm = [measured("fit", *place) for _ in range(sizes.rounds)]
    shutil.rmtree(folder / "cache")
    if cold["encoded"] != sizes.rows or any(run["encoded"] for run in warm):
        raise SystemExit("the second fit was not a warm start; no figure is given")
    first = median(run["first_step_seconds"] for run in warm)
    memory = max(run["anonymous_left"] for run in warm)
    console.print(f"first step of a fit: {cold['first_step_seconds']:.1f} s with a fill, {first:.2f} s warm")
    bars = [
        Bar("warm fit: seconds from Trainer.fit to the first training step, checksums on", first),
        Bar("warm fit: MB of anonymous memory, Lightning included", memory / MB),
    ]
    return {"cold": cold, "warm": warm}, bars


def write_rate(folder: Path, sizes: Sizes, console: Console) -> Found:
    """Write the same rows through a store and in one plain file, in turns."""
    contenders = ("store", "plain", "plain-fsync")
    rates: dict[str, list[float]] = {contender: [] for contender in contenders}
    for turn in range(sizes.rounds):
        for contender in contenders:
            place = folder / f"{contender} {turn}"
            options = ["--folder", place, "--rows", sizes.written, "--batch", sizes.batch, "--contender", contender]
            rates[contender].append(measured("write", *options)["bytes_per_second"])
            shutil.rmtree(place)
        latest = ", ".join(f"{contender} {found[-1] / MB:,.0f} MB/s" for contender, found in rates.items())
        console.print(f"write, round {turn + 1} of {sizes.rounds}: {latest}", highlight=False, soft_wrap=True)
    ratio = {
        other: median(a / b for a, b in zip(rates["store"], rates[other], strict=True))
        for other in ("plain", "plain-fsync")
    }
    bars = [
        Bar("write rate: store, flushed to the device / one plain save_file", ratio["plain"], 0.8, at_most=False),
        Bar("write rate: store / one plain save_file and fsync", ratio["plain-fsync"]),
    ]
    return {"bytes_per_second": rates, "medians": {name: median(found) for name, found in rates.items()}}, bars


def hashing(folder: Path, sizes: Sizes, console: Console) -> Found:
    """Hash the keys of short texts, and the weights of an encoder."""
    keys = [measured("keys", "--rows", sizes.texts) for _ in range(sizes.rounds)]
    weights = [measured("identity", "--bytes", sizes.weights) for _ in range(sizes.rounds)]
    per_second = median(found["per_second"] for found in keys)
    per_100_mb = median(found["seconds"] / found["bytes"] for found in weights) * 100 * MB
    again = median(found["again_seconds"] for found in weights)
    console.print(
        f"keys: {per_second:,.0f} texts/s of {keys[0]['characters']:.0f} characters; "
        f"identity: {per_100_mb:.3f} s per 100 MB, {1000 * again:.1f} ms again in the same process"
    )
    bars = [
        Bar("key hashing: million short texts a second, one thread", per_second / 1e6, 1.0, at_most=False),
        Bar("identity: seconds for 100 MB of weights", per_100_mb, 0.3),
    ]
    return {"keys": keys, "identity": weights}, bars


def fill_memory(folder: Path, sizes: Sizes, console: Console) -> Found:
    """Fill by fits of two sizes, and compare the anonymous memory that they take."""
    fills = []
    for rows in sizes.filled:
        place = ["--folder", folder / f"{rows}", "--rows", rows, "--batch", sizes.batch]
        fills.append({"rows": rows, **measured("fit", *place, "--shard-bytes", sizes.shard_bytes)})
        shutil.rmtree(folder / f"{rows}")
    small, large = fills
    if [fill["encoded"] for fill in fills] != list(sizes.filled):
        raise SystemExit("a fill did not encode every item once; no figure is given")
    grown = large["anonymous_highest"] - small["anonymous_highest"]
    per_row = grown / (large["rows"] - small["rows"])
    for fill in fills:
        console.print(
            f"fill of {fill['rows']:,} rows: {fill['anonymous_highest'] / MB:,.0f} MB of anonymous memory at most, "
            f"{fill['fill_seconds']:.1f} s"
        )
    return {"fills": fills}, [
        Bar("fill: bytes of anonymous memory for each further row of 1,536 bytes", per_row, 154.0)
    ]


PARTS: dict[str, Callable[[Path, Sizes, Console], Found]] = {
    "warm_start": warm_start,
    "warm_fit": warm_fit,
    "write_rate": write_rate,
    "hashing": hashing,
    "fill_memory": fill_memory,
}


def bench_store(
    sizes: Sizes, console: Console, parent: Path = Path("results"), parts: list[str] | None = None
) -> Found:
    """Take all figures of the store.

    Args:
        sizes: How much is measured.
        console: Where to print.
        parent: On the disk that is measured; what is written there is deleted.
        parts: Names of ``PARTS``; ``None``: all.

    Returns:
        The figures and the bars that stand on them.
    """
    parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"sizes": vars(sizes)}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="store-", dir=parent) as folder:
        for name in parts or PARTS:
            figures[name], found = PARTS[name](Path(folder), sizes, console)
            bars += found
    return figures, bars
