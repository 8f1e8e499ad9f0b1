"""The epoch itself: on precomputed rows, its loading alone, and from disk beside memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks import process
from benchmarks.report import Bar
from benchmarks.settings import Found, Settings
from benchmarks.turns import Turns, take_turns

__all__ = ["EPOCHS", "TRAINED", "bench_disk", "bench_epochs", "bench_loading"]

EPOCHS = {"mlp": 3, "linear": 4}
"""A warm-up, and those that count."""

CHECK_EPOCHS = 2
LOADING_EPOCHS = 5
TOLERANCE = 1e-6
BOTH = ["mlp", "linear"]
TRAINED = {
    "raw": BOTH,
    "lean": BOTH,
    "lean-logged": BOTH,
    "tensor-dataset": BOTH,
    "quatcache": BOTH,
    "quatcache-unlogged": ["linear"],
    "quaterion": BOTH,
}
"""The shapes that each contender trains."""


def _work(contender: str, settings: Settings, module: str, function: str, **options: Any) -> Any:
    """Run a contender in its own process, Quaterion in its own environment."""
    if contender == "quaterion":
        return process.work(
            "quaterion_contender", function, python=str(settings.quaterion), contender=contender, **options
        )
    return process.work(module, function, contender=contender, **options)


def check_losses(losses: Mapping[str, list[float]], what: str, reference: str) -> float:
    """Show that all contenders train alike, before any of them is timed.

    Args:
        losses: Of every step, by contender.
        what: What is trained.
        reference: The contender that the others are held against.

    Returns:
        The largest difference of two losses at one step.

    Raises:
        SystemExit: Two contenders differ: their times would compare different work.
    """
    worst, expected = 0.0, losses[reference]
    for contender, found in losses.items():
        same_steps = len(found) == len(expected)
        differences = [abs(a - b) for a, b in zip(expected, found, strict=False)] if same_steps else [float("inf")]
        apart = max(differences)
        if not all(one <= TOLERANCE for one in differences):  # a loss that is no number is near to none
            raise SystemExit(
                f"{what}: losses of {contender} are up to {apart:g} from those of {reference}; no time is taken"
            )
        worst = max(worst, apart)
    return worst


def bench_epochs(settings: Settings, console: Console) -> Found:
    """Time an epoch of two heads, written in several ways."""
    with_quaterion = settings.with_quaterion(console)
    contenders = {name: shapes for name, shapes in TRAINED.items() if name != "quaterion" or with_quaterion}
    checked = {
        name: _work(name, settings, "epochs", "losses_of", shapes=shapes, rows=settings.check_rows, epochs=CHECK_EPOCHS)
        for name, shapes in contenders.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {shape: {} for shape in BOTH}
    figures: dict[str, Any] = {"rows": settings.rows, "rounds": settings.rounds}
    for shape in BOTH:
        losses = {name: found[shape] for name, found in checked.items() if shape in found}
        worst = check_losses(losses, shape, "raw")
        figures[shape] = {"largest_loss_difference": worst}
        console.print(f"{shape}: {len(losses['raw'])} losses of each contender agree (largest difference {worst:g})")

    def both_shapes(name: str) -> float:
        found = _work(
            name, settings, "epochs", "seconds_of",
            shapes={shape: EPOCHS[shape] for shape in contenders[name]}, rows=settings.rows,
        )  # fmt: skip
        for shape, epochs in found.items():
            # What disturbs an epoch can only slow it down.
            seconds[shape].setdefault(name, []).append(min(epochs))
        return min(found["linear"])

    runs = {name: lambda turn, name=name: both_shapes(name) for name in contenders}
    take_turns(runs, settings.rounds, console, "epochs (seconds of the linear head)")
    turns = {shape: Turns(seconds[shape]) for shape in BOTH}
    for shape, of_shape in turns.items():
        columns = {"epoch s": "{:.3f}".format, "us/row": lambda took: f"{1e6 * took / settings.rows:.1f}"}
        of_shape.print(console, f"{shape}: {settings.rows:,} x 384, {settings.rounds} rounds", "raw", columns)
        figures[shape] |= {"epoch_seconds": of_shape.values, "us_per_row": _us_per_row(of_shape, settings.rows)}
    mlp, linear = turns["mlp"], turns["linear"]
    bars = [
        Bar("MLP head, batch 256, loss logged: cached epoch / raw torch loop", mlp.ratio("quatcache", "raw"), 1.30),
        Bar(
            "MLP head, batch 256: cached epoch, loss logged / leanest Lightning loop, nothing logged",
            mlp.ratio("quatcache", "lean"),
            1.05,
        ),
        Bar("MLP head, batch 256, loss logged by both: cached epoch / lean", mlp.ratio("quatcache", "lean-logged")),
        Bar(
            "linear head, batch 1024, nothing logged: cached epoch / leanest Lightning loop",
            linear.ratio("quatcache-unlogged", "lean"),
            1.05,
        ),
        Bar(
            "linear head, batch 1024: cached epoch, loss logged / leanest Lightning loop, nothing logged",
            linear.ratio("quatcache", "lean"),
            1.05,
        ),
        Bar(
            "linear head, batch 1024: TensorDataset + DataLoader, nothing logged / cached epoch, loss logged",
            linear.ratio("tensor-dataset", "quatcache"),
            2.5,
            at_most=False,
        ),
    ]
    return figures, bars


def _us_per_row(turns: Turns, rows: int) -> dict[str, float]:
    return {name: 1e6 * median(values) / rows for name, values in turns.values.items()}


def bench_loading(settings: Settings, console: Console) -> Found:
    """Time what brings the rows of an epoch, with nothing computed from them."""
    names = ["raw", "lean", "tensor-dataset", "quatcache"] + ["quaterion"] * settings.with_quaterion(console)

    def once(name: str) -> float:
        function = "load" if name == "quaterion" else "seconds_of"
        return float(min(_work(name, settings, "loading", function, rows=settings.rows, epochs=LOADING_EPOCHS)))

    turns = take_turns(
        {name: lambda turn, name=name: once(name) for name in names}, settings.rounds, console, "loading alone, seconds"
    )
    us = _us_per_row(turns, settings.rows)
    columns = {"us/row": lambda took: f"{1e6 * took / settings.rows:.2f}"}
    turns.print(console, f"loading alone: {settings.rows:,} x 384, batch 256", "raw", columns)
    bars = [Bar("loading alone: us a row", us["quatcache"], 0.8)]
    return {"rows": settings.rows, "epoch_seconds": turns.values, "us_per_row": us}, bars


def bench_disk(settings: Settings, console: Console) -> Found:
    """Train from disk and from memory, the files in the page cache."""
    names = ["CPU", "DISK"]
    with tempfile.TemporaryDirectory(prefix="tiers-", dir=settings.folder) as folder:
        place = {"shape": "linear", "folder": f"{folder}/cache"}
        small = {"shape": "linear", "folder": f"{folder}/small", "rows": settings.check_rows, "epochs": CHECK_EPOCHS}
        losses = {name: process.work("tiers", "train", tier=name, **small)["losses"] for name in names}
        worst = check_losses(losses, "tiers", "CPU")
        console.print(f"tiers: losses from both agree (largest difference {worst:g})")
        filled = process.work("tiers", "train", tier="DISK", rows=settings.rows, epochs=2, **place)

        def once(name: str) -> float:
            found = process.work("tiers", "train", tier=name, rows=settings.rows, epochs=EPOCHS["linear"], **place)
            if found["encoded"]:
                raise SystemExit("a tier did not start warm; no figure is given")
            return float(min(found["seconds"]))

        runs = {name: lambda turn, name=name: once(name) for name in names}
        turns = take_turns(runs, settings.rounds, console, "tiers, epoch seconds")
    assert filled["encoded"] == settings.rows
    columns = {"epoch s": "{:.3f}".format, "us/row": lambda took: f"{1e6 * took / settings.rows:.1f}"}
    turns.print(
        console, f"tiers, linear head, batch 1024: {settings.rows:,} x 384, files in the page cache", "CPU", columns
    )
    bars = [Bar("epoch on tier DISK, files in the page cache / on tier CPU", turns.ratio("DISK", "CPU"), 1.25)]
    return {"rows": settings.rows, "epoch_seconds": turns.values}, bars
