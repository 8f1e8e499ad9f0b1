"""Draw imgs/demo.png from the figures that the demo measured: ``python imgs/draw.py imgs/demo.json``.

Only measured numbers are drawn solid. The uncached run is timed for one epoch; its line beyond that is dashed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CACHED, UNCACHED, REFERENCE = "#0b6e4f", "#c0392b", "#555555"
SHOWN_EPOCHS = 10


def draw(figures: dict[str, Any], target: Path) -> None:
    """Draw time beside accuracy.

    Args:
        figures: The JSON of ``python -m quatcache.demo --json``.
        target: The PNG to write.
    """
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (time_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    uncached, cached = figures["uncached_epoch_seconds"], figures["cached_epoch_seconds"]
    epochs = range(SHOWN_EPOCHS + 1)
    time_axes.plot([0, 1], [0, uncached], color=UNCACHED, lw=2.2)
    time_axes.plot(epochs[1:], [uncached * n for n in epochs[1:]], color=UNCACHED, lw=1.6, ls="--")
    time_axes.plot(epochs, [figures["fill_seconds"] + cached * n for n in epochs], color=CACHED, lw=2.2)
    time_axes.plot(epochs, [cached * n for n in epochs], color=CACHED, lw=1.6, ls=":")
    last, top = SHOWN_EPOCHS, uncached * SHOWN_EPOCHS
    time_axes.text(last * 0.28, top * 0.80, "no cache\n(one epoch measured)", color=UNCACHED)
    filled = figures["fill_seconds"] + cached * last
    time_axes.text(last, filled + top * 0.03, "first run: fill, then train", color=CACHED, ha="right")
    time_axes.text(last, top * 0.012, "second run: no encoder call", color=CACHED, ha="right", va="bottom")
    time_axes.set(
        xlabel="epoch",
        ylabel="seconds since the fit began",
        title=f"An epoch from the cache: {figures['ratio']:.0f} x faster",
    )
    time_axes.set_xlim(0, last)
    time_axes.set_ylim(0, top)

    reached = figures["accuracy"]
    regression = figures["logistic_regression_accuracy"]
    accuracy_axes.plot(range(1, len(reached) + 1), reached, color=CACHED, lw=2.0)
    accuracy_axes.axhline(regression, color=REFERENCE, lw=1.4, ls="--")
    below = {"textcoords": "offset points", "ha": "right", "va": "top"}
    above = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
    end = len(reached)
    accuracy_axes.annotate("logistic regression", (end, regression), (0, -5), color=REFERENCE, **below)
    accuracy_axes.annotate("head on the frozen encoder", (end, max(reached)), (0, 3), color=CACHED, **above)
    accuracy_axes.set(
        xlabel="epoch",
        ylabel="validation accuracy",
        title=f"{figures['training_texts']:,} diagnosis texts, 22 chapters",
    )
    accuracy_axes.set_xlim(0, len(reached))

    target.parent.mkdir(parents=True, exist_ok=True)
    # Without the software's version in the file, the same figures give the same bytes.
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Read the JSON that the command line names and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="JSON written by python -m quatcache.demo --json")
    parser.add_argument("--target", type=Path, default=Path(__file__).with_name("demo.png"))
    arguments = parser.parse_args()
    draw(json.loads(arguments.figures.read_text(encoding="utf-8")), arguments.target)
    print(f"drawn: {arguments.target}")


if __name__ == "__main__":
    main()
