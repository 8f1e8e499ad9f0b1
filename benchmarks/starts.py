"""Runs that start warm: how soon they train, what they load, and what memory they take."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks import process
from benchmarks.report import Bar
from benchmarks.settings import Found, Settings
from benchmarks.turns import take_turns

__all__ = ["bench_large", "bench_warm_start"]

MB, GB = 1e6, 1e9
LARGE_BATCH = 1024


def bench_warm_start(settings: Settings, console: Console) -> Found:
    """Start from a million rows with MiniLM declared, beside a process that trains on a bare file."""
    found: list[dict[str, Any]] = []
    unpickled: list[dict[str, Any]] = []
    rows, steps = settings.warm_rows, settings.warm_steps
    with tempfile.TemporaryDirectory(prefix="warm-", dir=settings.folder) as parent:
        cache, bare, pickled = f"{parent}/cache", f"{parent}/bare.safetensors", f"{parent}/quaterion"
        process.work("warm", "prepare", folder=cache, rows=rows)
        process.work("bare", "write", file=bare, rows=rows)

        def quatcache(turn: int) -> float:
            found.append(process.work("warm", "first_step", folder=cache, rows=rows, steps=1))  # looks at its memory
            started = time.perf_counter()
            process.work("warm", "train", folder=cache, rows=rows, steps=steps)
            return time.perf_counter() - started

        def by_hand(turn: int) -> float:
            started = time.perf_counter()
            process.work("bare", "train", file=bare, rows=rows, steps=steps)
            return time.perf_counter() - started

        by_hand(0)  # its file comes into the page cache
        runs = {"bare file": by_hand, "quatcache": quatcache}
        turns = take_turns(runs, settings.rounds, console, f"whole process of {steps} steps, seconds")
        if settings.with_quaterion(console):
            python, less = str(settings.quaterion), settings.quaterion_rows
            given = {"folder": pickled, "rows": less}
            process.work("quaterion_contender", "prepare", python=python, **given)
            unpickled += [
                process.work("quaterion_contender", "first_step", python=python, **given)
                for _ in range(min(settings.rounds, 3))
            ]
    if any(one["encoded"] for one in found):
        raise SystemExit("a warm start encoded something; no figure is given")
    turns.print(
        console, f"warm start, {rows:,} x 384, whole process of {steps} steps", "bare file", {"s": "{:.2f}".format}
    )
    first = median(one["first_step_seconds"] for one in found)
    memory = max(one["anonymous_highest"] for one in found)
    loaded = sum(one["encoder_loaded"] for one in found)
    imported = sum(one["library_imported"] for one in found)
    console.print(
        f"warm start: first step {first:.2f} s after the imports, {memory / MB:.0f} MB of anonymous memory at most; "
        f"sentence_transformers imported in {imported} of {len(found)} runs, its model loaded in {loaded}"
    )
    figures: dict[str, Any] = {
        "rows": rows,
        "steps": steps,
        "runs": found,
        "process_seconds": turns.values,
        "first_step_seconds": {"quatcache": first},
        "anonymous_mb": {"quatcache": memory / MB},
    }
    if unpickled:
        name = f"quaterion, {settings.quaterion_rows:,} rows"
        figures["quaterion"] = {"rows": settings.quaterion_rows, "runs": unpickled}
        figures["first_step_seconds"][name] = median(one["first_step_seconds"] for one in unpickled)
        figures["anonymous_mb"][name] = max(one["anonymous_left"] for one in unpickled) / MB
        console.print(
            f"{name}: first step {figures['first_step_seconds'][name]:.2f} s after the imports, "
            f"{figures['anonymous_mb'][name]:.0f} MB of anonymous memory"
        )
    bars = [
        Bar("warm start, MiniLM declared: seconds from after the imports to the first step", first, 1.0),
        Bar("warm start: runs that loaded the encoder", loaded, 0.0),
        Bar("warm start: runs that imported sentence_transformers", imported),
        Bar("warm start: MB of anonymous memory on tier DISK, at its highest", memory / MB, 100.0),
        Bar("warm start: whole process / one that trains on a bare file", turns.ratio("quatcache", "bare file"), 1.15),
    ]
    return figures, bars


def bench_large(settings: Settings, console: Console) -> Found:
    """Train an epoch from ten million rows of float16 on disk, and one from a million."""
    sizes = {"small": settings.large_rows // 10, "large": settings.large_rows}
    found: dict[str, Any] = {}
    for name, rows in sizes.items():
        with tempfile.TemporaryDirectory(prefix="large-", dir=settings.folder) as folder:
            place = {"folder": folder, "batch": LARGE_BATCH, "dtype": "float16"}
            process.work("scale_contender", "prepare", rows=rows, **place)
            found[name] = process.work("scale_contender", "warm", rows=rows, epochs=1, **place)
            found[name]["bytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        found[name]["rows"] = rows
        found[name]["us_per_row"] = 1e6 * found[name]["epoch_seconds"][0] / rows
        console.print(
            f"large, {rows:,} x 384 float16, {found[name]['bytes'] / GB:.1f} GB: epoch "
            f"{found[name]['us_per_row']:.2f} us/row, {found[name]['anonymous_highest'] / GB:.2f} GB anonymous"
        )
    bars = [
        Bar(
            f"{settings.large_rows:,} x 384 float16 on tier DISK: GB of anonymous memory",
            found["large"]["anonymous_highest"] / GB,
            2.0,
        ),
        Bar(
            f"an epoch of {settings.large_rows:,} rows / of {sizes['small']:,}, per row",
            found["large"]["us_per_row"] / found["small"]["us_per_row"],
            1.5,
        ),
    ]
    return found, bars
