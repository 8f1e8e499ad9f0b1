"""Draw benchmarks.png, growth.png and slots.png from what was measured: ``python imgs/draw_benchmarks.py FILE.json``.

The file is the one of ``python -m benchmarks --json FILE.json``. A panel whose part was not measured is not drawn.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

OURS, OTHERS, FLOOR = "#0b6e4f", "#b8bec4", "#5b6670"

FLOORS = ("raw", "bare file", "gather by hand")
"""What nothing can beat: the same work without a framework, or without a cache."""

NAMES = {
    "raw": "torch loop by hand, no framework",
    "lean": "leanest Lightning loop, no logging",
    "lean-logged": "leanest Lightning loop, loss logged",
    "tensor-dataset": "TensorDataset + DataLoader",
    "quaterion": "Quaterion 0.1.35",
    "quatcache-unlogged": "quatcache, no logging",
    "encode": "SentenceTransformer.encode",
    "dataset-order": "batches in dataset order",
    "langchain": "LangChain CacheBackedEmbeddings",
    "datasets.map": "Hugging Face datasets.map",
    "bare file": "bare safetensors file by hand",
}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


def is_ours(name: str) -> bool:
    """Say whether a contender is quatcache, in one of its forms."""
    return name.startswith("quatcache")


def bars(axes: Axes, values: Mapping[str, float], title: str, unit: str, *, log: bool = False) -> None:
    """Draw one horizontal bar for each contender, the shortest at the top, its figure behind it.

    Args:
        axes: Where.
        values: Figures by contender, > 0; smaller is better.
        title: What is measured.
        unit: Of the figures.
        log: Whether lengths are logarithms.
    """
    names = sorted(values, key=lambda name: values[name], reverse=True)
    colours = [OURS if is_ours(name) else FLOOR if name in FLOORS else OTHERS for name in names]
    axes.barh(
        [NAMES.get(name, name.replace("quaterion", NAMES["quaterion"])) for name in names],
        [values[name] for name in names],
        color=colours,
        height=0.72,
    )
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(values.values()) / 3, max(values.values()) * 6)
    else:
        axes.set_xlim(0, max(values.values()) * 1.17)
    for place, name in enumerate(names):
        text = f" {_short(values[name])}"
        axes.text(values[name], place, text, va="center", fontweight="bold" if is_ours(name) else "normal", fontsize=10)
    axes.set_ylim(
        min(-0.6, (len(names) - 5) / 2 - 0.6), max(len(names) - 0.4, (len(names) + 3) / 2 + 0.6)
    )  # no fat bars
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if is_ours(name) else "normal")
    axes.set_title(title, fontsize=12, fontweight="bold")
    axes.set_xlabel(f"{unit}  (shorter is better)", fontsize=9.5, color=FLOOR)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9, colors=FLOOR)


def _short(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def epoch_panels(parts: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """Give what draws the epochs of the two heads."""
    panels: list[Callable[[Axes], None]] = []
    for shape, title in (
        ("mlp", "Training epoch, MLP head, batch 256"),
        ("linear", "Training epoch, linear head, batch 1024"),
    ):
        us = dict(parts["epochs"][shape]["us_per_row"])
        us["quatcache, loss logged"] = us.pop("quatcache")
        panels.append(lambda axes, us=us, title=title: bars(axes, us, title, "microseconds a row"))  # type: ignore[misc]
    return panels


def loading_panels(parts: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """Give what draws the loading."""
    us = dict(parts["loading"]["us_per_row"])
    us["DataLoader, one gather a batch"] = us.pop("lean")
    us["gather by hand"] = us.pop("raw")
    return [lambda axes: bars(axes, us, "Bringing the rows of an epoch", "microseconds a row")]


def fill_panels(parts: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """Give what draws the first encoding."""
    part = parts["fill"]
    title = f"First encoding, MiniLM, {part['texts']:,} full descriptions"
    return [lambda axes: bars(axes, part["ms_per_text"], title, "milliseconds a text")]


def cheap_panels(parts: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """Give what draws the encoding with static embeddings."""
    part = parts["fill-cheap"]
    us = {name: 1e3 * value for name, value in part["ms_per_text"].items()}
    title = f"First encoding, static embeddings, {_rows(part['texts'])} glosses"
    return [lambda axes: bars(axes, us, title, "microseconds a text")]


def hit_panels(parts: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """Give what draws the hits."""
    us = parts["hits"]["us_per_item_as_tensor"]
    return [
        lambda axes: bars(axes, us, "Looking up a cached text, batch of 1,000", "microseconds, logarithmic", log=True)
    ]


def warm_panels(parts: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    """Give what draws the warm start."""
    part = parts["warm-start"]
    seconds = {name: median(values) for name, values in part["process_seconds"].items()}
    whole = f"Warm run, whole process, {_rows(part['rows'])} rows"
    first = f"Warm run, {_rows(part['rows'])} rows, MiniLM declared"
    return [
        lambda axes: bars(axes, part["first_step_seconds"], first, "seconds from after the imports to the first step"),
        lambda axes: bars(axes, seconds, whole, f"seconds, imports and {part['steps']} steps"),
    ]


PANELS = {
    "epochs": epoch_panels,
    "loading": loading_panels,
    "fill": fill_panels,
    "fill-cheap": cheap_panels,
    "hits": hit_panels,
    "warm-start": warm_panels,
}


def save(figure: Any, target: Path) -> None:
    """Write a PNG; the same figures give the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, metadata={"Software": None})
    plt.close(figure)
    print(f"drawn: {target}")


def draw_contenders(parts: Mapping[str, Any], target: Path) -> bool:
    """Draw a panel for each part that was measured.

    Returns:
        Whether there was one.
    """
    panels = [panel for name, make in PANELS.items() if name in parts for panel in make(parts)]
    if not panels:
        return False
    rows = math.ceil(len(panels) / 2)
    figure, grid = plt.subplots(rows, 2, figsize=(15, 0.9 + 3.3 * rows), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(
        "quatcache (green) beside what people use instead (grey; dark: by hand)", fontsize=14, x=0.01, ha="left"
    )
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    save(figure, target)
    return True


SERIES = {
    "fill_seconds": "fill, cheap encoder",
    "epoch_seconds": "epoch",
    "warm_start_seconds": "warm start to first step",
    "fill_anonymous_mb": "fill",
    "warm_anonymous_mb": "training from disk",
}
COLOURS = ("#0b6e4f", "#2d6cb5", "#d08a1d")


def curves(axes: Axes, part: Mapping[str, Any], names: list[str], title: str, unit: str) -> None:
    """Draw figures over the rows of a cache, both logarithmic, each with its fitted slope."""
    sizes = [one["rows"] for one in part["sizes"]]
    all_values = [one[name] for one in part["sizes"] for name in names]
    for name, colour in zip(names, COLOURS, strict=False):
        values = [one[name] for one in part["sizes"]]
        axes.plot(
            sizes, values, "o-", color=colour, lw=2.2, ms=6, label=f"{SERIES[name]}: slope {part['slopes'][name]:.2f}"
        )
        axes.annotate(
            _short(values[-1]), (sizes[-1], values[-1]), (8, 0), textcoords="offset points", va="center", color=colour
        )
    axes.set(xscale="log", yscale="log", xlabel="rows of 384 values", ylabel=unit)
    axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 2.4)
    axes.set_xticks(sizes, [_rows(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(all_values) < 50 * min(all_values) else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, color="#e3e6e8", lw=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.28)  # room for the legend
    axes.legend(frameon=False, loc="upper left", fontsize=10.5)
    axes.set_title(title, fontsize=12, fontweight="bold")


def _rows(size: int) -> str:
    return f"{size / 1e6:g} M" if size >= 1_000_000 else f"{size / 1e3:g} k"


def draw_growth(part: Mapping[str, Any], target: Path) -> None:
    """Draw how seconds and memory grow with the rows."""
    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    times = ["fill_seconds", "epoch_seconds", "warm_start_seconds"]
    curves(seconds, part, times, "Time, tier DISK (slope 1: in proportion)", "seconds")
    megabytes = ["fill_anonymous_mb", "warm_anonymous_mb"]
    curves(memory, part, megabytes, "Anonymous memory, files not counted", "MB")
    save(figure, target)


def share_line(axes: Axes, part: Mapping[str, Any]) -> None:
    """Draw the time an image takes over the share of the dataset that has slots, beside the straight line."""
    shares, ms = part["shares"], part["ms"]
    axes.plot([0, 100], [ms[0], ms[-1]], "--", color=OTHERS, lw=1.6, label="straight line from none to all")
    axes.plot([100 * share for share in shares], ms, "o-", color=OURS, lw=2.2, ms=7, label="quatcache, CachedDataset")
    for share, value in zip(shares, ms, strict=True):
        text = f"{value:.2f} ms, {_short(ms[0] / value)} x as fast"
        axes.annotate(text, (100 * share, value), (6, 8), textcoords="offset points", fontsize=10)
    axes.set(xlabel="share of the images with a slot, percent", ylabel="milliseconds an image", xlim=(-4, 152))
    axes.set_xticks([100 * share for share in shares])
    axes.set_ylim(0, ms[0] * 1.2)
    axes.grid(True, color="#e3e6e8", lw=0.8)
    axes.legend(frameon=False, loc="upper right", fontsize=10)
    axes.set_title(f"A later epoch by cached share (R² {part['straightness']:.4f})", fontsize=12, fontweight="bold")


def draw_slots(part: Mapping[str, Any], target: Path) -> None:
    """Draw epochs over images: by the share that is cached, and beside those of other caches."""
    figure, grid = plt.subplots(2, 2, figsize=(15, 8), layout="constrained")
    share_line(grid.flat[0], part["shares"])
    for axes, (title, epochs) in zip(grid.flat[1:], part["epochs"].items(), strict=False):
        us = {name: 1e3 * ms for name, ms in epochs["again_ms"].items()}
        bars(axes, us, f"A later epoch, {title}", "microseconds an image, logarithmic", log=True)
    what = f"{part['images']} JPEG files of {part['file_bytes'] / 1000:.0f} kB, scaled to 3x224x224 uint8"
    figure.suptitle(f"Slots in shared memory: {what}", fontsize=14, x=0.01, ha="left")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    save(figure, target)


def main() -> None:
    """Draw what the file has figures for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="JSON written by python -m benchmarks --json")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the pictures go")
    arguments = parser.parse_args()
    parts = {
        name: part["figures"]
        for name, part in json.loads(arguments.figures.read_text(encoding="utf-8"))["parts"].items()
    }
    plt.rcParams.update(STYLE)
    if not draw_contenders(parts, arguments.folder / "benchmarks.png"):
        print("no part of these figures has contenders to draw")
    if "scale" in parts:
        draw_growth(parts["scale"], arguments.folder / "growth.png")
    if "slots" in parts:
        draw_slots(parts["slots"], arguments.folder / "slots.png")


if __name__ == "__main__":
    main()
