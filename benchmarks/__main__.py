"""Run the benchmarks: ``python -m benchmarks [--only epochs fill ...] [--rounds 5] [--full] [--json FILE]``.

Each contender runs in a process of its own, one thread, in rounds that take turns, so that a slow minute of the machine
falls on all of them alike; of the rounds the median counts, and a ratio is taken within a round. What contenders
compute is compared before their times count: losses step by step, vectors value by value.

The parts:

    epochs      an epoch on precomputed rows          loading     what brings its rows, alone
    disk        rows on disk beside rows in memory    fill        MiniLM on descriptions of packages
    fill-cheap  static embeddings on glosses          growth      1% more data
    hits        what a look-up costs                  warm-start  a million rows, MiniLM declared
    slots       a dataset in shared memory            scale       how all of it grows with the rows
    store       the figures of the store              demo        the demo
    large       ten million rows; with --full or by name, it takes 9 GB of disk for a while

Each part prints its bars and writes its figures at its end, into the one JSON file, where the other parts stay as they
are. So parts can be run one by one, and a run that is stopped loses the part that it was in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks.filling import bench_fill, bench_fill_cheap, bench_growth
from benchmarks.lookups import bench_hits
from benchmarks.report import Bar, merge_json, print_bars, read_bars
from benchmarks.scale import bench_scale
from benchmarks.settings import Found, Settings
from benchmarks.slots import bench_slots
from benchmarks.starts import bench_large, bench_warm_start
from benchmarks.store import PARTS as STORE_PARTS
from benchmarks.store import bench_store
from benchmarks.training import bench_disk, bench_epochs, bench_loading

__all__ = ["ON_DEMAND", "PARTS", "main"]


def store(settings: Settings, console: Console) -> Found:
    """Take the figures of the store, and on a tmpfs, where one is named, the write rate without a disk."""
    sizes = replace(settings.store, rounds=settings.rounds)
    figures, bars = bench_store(sizes, console, settings.folder, settings.store_parts)
    if settings.tmpfs is not None:
        console.print(f"write rate in {settings.tmpfs}:")
        in_memory, found = bench_store(sizes, console, settings.tmpfs, ["write_rate"])
        figures["write_rate_tmpfs"] = in_memory["write_rate"]
        bars += [replace(bar, what=f"on tmpfs, {bar.what}") for bar in found]
    return figures, bars


def demo(settings: Settings, console: Console) -> Found:
    """Run the demo in a fresh cache and take its ratio of an uncached to a cached epoch."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "demo.json"
        command = [sys.executable, "-m", "quatcache.demo", "--json", str(target), "--cache-dir", f"{folder}/cache"]
        subprocess.run(command, check=True)
        figures = json.loads(target.read_text(encoding="utf-8"))
    bar = Bar("demo, MiniLM on diagnosis texts: uncached epoch / cached epoch", figures["ratio"], at_most=False)
    return figures, [bar]


PARTS: dict[str, Callable[[Settings, Console], Found]] = {
    "epochs": bench_epochs,
    "loading": bench_loading,
    "disk": bench_disk,
    "fill": bench_fill,
    "fill-cheap": bench_fill_cheap,
    "growth": bench_growth,
    "hits": bench_hits,
    "slots": bench_slots,
    "warm-start": bench_warm_start,
    "scale": bench_scale,
    "store": store,
    "demo": demo,
    "large": bench_large,
}
ON_DEMAND = ("large",)


def parse(arguments: Sequence[str] | None) -> tuple[list[str], Settings, Path | None]:
    """Read a command line: the parts, how much is measured, and where figures go."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="large too, and ten million rows in scale")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--rows", type=int, default=default.rows, help="of an epoch")
    parser.add_argument("--texts", type=int, default=default.texts, help="that MiniLM encodes")
    parser.add_argument("--glosses", type=int, default=default.glosses, help="that static embeddings encode")
    parser.add_argument("--images", type=int, default=default.images, help="that are read through slots")
    parser.add_argument("--warm-rows", type=int, default=default.warm_rows, help="of a warm start")
    parser.add_argument("--large-rows", type=int, default=default.large_rows)
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="rows of the caches of scale")
    parser.add_argument("--folder", type=Path, default=default.folder, help="where caches are written and deleted")
    parser.add_argument(
        "--tmpfs", type=Path, default=None, help="a folder in memory, for the write rate without a disk"
    )
    parser.add_argument("--store-parts", nargs="+", choices=list(STORE_PARTS), default=None)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args(arguments)
    sizes = tuple(given.sizes or (*default.sizes, *((default.large_rows,) if given.full else ())))
    settings = Settings(
        rounds=given.rounds,
        rows=given.rows,
        check_rows=min(default.check_rows, given.rows),
        texts=given.texts,
        glosses=given.glosses,
        images=given.images,
        warm_rows=given.warm_rows,
        sizes=sizes,
        large_rows=given.large_rows,
        folder=given.folder,
        store_parts=given.store_parts,
        tmpfs=given.tmpfs,
    )
    parts = given.only or [name for name in PARTS if given.full or name not in ON_DEMAND]
    return parts, settings, given.json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        0; 1 if a part could not be measured, because contenders computed different things for instance.
    """
    parts, settings, target = parse(arguments)
    settings.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    bars: list[Bar] = []
    failed = []
    for name in parts:
        console.rule(name)
        started = time.perf_counter()
        try:
            figures, found = PARTS[name](settings, console)
        except SystemExit as error:
            console.print(f"[red]{name} gives no figures:[/] {escape(str(error))}")
            failed.append(name)
            continue
        minutes = (time.perf_counter() - started) / 60
        if found:
            print_bars(found, console, title=f"{name}, {minutes:.1f} min")
            bars += found
        if target is not None and figures:
            merge_json(target, name, figures, found)
    if len(parts) > 1:
        console.rule("all parts")
        print_bars(bars, console)
    if target is not None:
        known = read_bars(target)
        console.print(f"figures written to {target}: {sum(bar.held is False for bar in known)} bars missed in it")
    if failed:
        console.print(f"[red]without figures: {', '.join(failed)}[/]")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
