"""Run the benchmarks: ``python -m benchmarks [--only mlp linear store demo] [--rounds 5] [--rows N] [--json FILE]``.

Each contender runs in a process of its own, one thread, in rounds that take turns, so that a slow minute of the machine
falls on all of them alike. A process gives its fastest epoch after a warm-up, since what disturbs an epoch can only
slow it down; of the rounds the median counts. Before the first time is taken, the losses of all contenders are compared
step by step.

``store`` stands for the figures of the store, see ``benchmarks.store``; their sizes are their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import one_process
from benchmarks.report import Bar, print_bars, write_json
from benchmarks.store import FULL, bench_store

EPOCHS = 4  # a warm-up and three that count
CHECK_ROWS, CHECK_EPOCHS = 20_000, 2
TOLERANCE = 1e-6
CONTENDERS = {
    "mlp": ("raw", "lean", "lean-logged", "tensor-dataset", "quatcache"),
    "linear": ("raw", "lean", "lean-logged", "tensor-dataset", "quatcache", "quatcache-unlogged"),
}
GROUPS = [*CONTENDERS, "store", "demo"]


def check_losses(shape: str, console: Console) -> float:
    """Show that all contenders train alike, before any of them is timed.

    Returns:
        The largest difference of two losses at one step.

    Raises:
        SystemExit: Two contenders differ: their times would compare different work.
    """
    losses = {
        contender: one_process(
            "run_one", shape, contender, "--rows", str(CHECK_ROWS), "--epochs", str(CHECK_EPOCHS), "--losses"
        )
        for contender in CONTENDERS[shape]
    }
    reference = losses["raw"]
    worst = 0.0
    for contender, found in losses.items():
        apart = (
            max(abs(a - b) for a, b in zip(reference, found, strict=True))
            if len(found) == len(reference)
            else float("inf")
        )
        if not apart <= TOLERANCE:
            raise SystemExit(f"{shape}: losses of {contender} are up to {apart:g} from those of raw; no time is taken")
        worst = max(worst, apart)
    console.print(f"{shape}: {len(reference)} losses of each contender agree (largest difference {worst:g})")
    return worst


def bench_epochs(shape: str, rows: int, rounds: int, console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Time all contenders on one shape.

    Returns:
        The figures and the bars that stand on them.
    """
    worst = check_losses(shape, console)
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS[shape]}
    for turn in range(rounds):
        for contender in seconds:
            epochs = one_process("run_one", shape, contender, "--rows", str(rows), "--epochs", str(EPOCHS))
            seconds[contender].append(min(epochs))
        latest = ", ".join(f"{contender} {times[-1]:.2f} s" for contender, times in seconds.items())
        console.print(f"{shape}, round {turn + 1} of {rounds}: {latest}", highlight=False, soft_wrap=True)

    epoch = {contender: median(times) for contender, times in seconds.items()}
    # A ratio is taken within each round, where both had the same machine; the median round counts.
    ratio = {
        (one, other): median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        for one in seconds
        for other in seconds
    }
    title = f"{shape}: {rows:,} x 384, {rounds} rounds"
    table = Table("contender", "epoch s", "us/row", "x raw", "x lean", title=title)
    for contender, took in epoch.items():
        table.add_row(
            contender,
            f"{took:.3f}",
            f"{1e6 * took / rows:.1f}",
            f"{ratio[contender, 'raw']:.2f}",
            f"{ratio[contender, 'lean']:.2f}",
        )
    console.print(table)

    if shape == "mlp":
        bars = [
            Bar("MLP head, batch 256: cached epoch / raw torch loop", ratio["quatcache", "raw"], 1.40),
            Bar("MLP head, batch 256: cached epoch / lean Lightning that logs", ratio["quatcache", "lean-logged"]),
        ]
    else:
        bars = [
            Bar(
                "linear head, batch 1024, nothing logged: cached epoch / leanest Lightning loop",
                ratio["quatcache-unlogged", "lean"],
                1.15,
            ),
            Bar(
                "linear head, batch 1024, loss logged by the cached run alone: cached epoch / leanest Lightning loop",
                ratio["quatcache", "lean"],
            ),
            Bar(
                "linear head, batch 1024, loss logged by both: cached epoch / lean Lightning loop",
                ratio["quatcache", "lean-logged"],
            ),
            Bar(
                "linear head, batch 1024: TensorDataset + DataLoader, nothing logged / cached epoch, loss logged",
                ratio["tensor-dataset", "quatcache"],
                2.5,
                at_most=False,
            ),
        ]
    figures = {
        "rows": rows,
        "rounds": rounds,
        "largest_loss_difference": worst,
        "epoch_seconds": seconds,
        "median_epoch_seconds": epoch,
    }
    return figures, bars


def bench_demo(console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Run the demo in a fresh cache and take its ratio of an uncached to a cached epoch."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "demo.json"
        command = [sys.executable, "-m", "quatcache.demo", "--json", str(target), "--cache-dir", f"{folder}/cache"]
        subprocess.run(command, check=True)
        figures = json.loads(target.read_text(encoding="utf-8"))
    bar = Bar("demo, MiniLM on diagnosis texts: uncached epoch / cached epoch", figures["ratio"], at_most=False)
    return figures, [bar]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()

    console = Console()
    results: dict[str, Any] = {}
    bars: list[Bar] = []
    for name in arguments.only:
        if name == "demo":
            results[name], found = bench_demo(console)
        elif name == "store":
            results[name], found = bench_store(replace(FULL, rounds=arguments.rounds), console)
        else:
            results[name], found = bench_epochs(name, arguments.rows, arguments.rounds, console)
        bars += found
    print_bars(bars, console)
    if arguments.json is not None:
        write_json(arguments.json, results, bars)
        console.print(f"figures written to {arguments.json}")


if __name__ == "__main__":
    main()
