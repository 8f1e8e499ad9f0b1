"""Run the demo: ``python -m quatcache.demo [--json FILE] [--cache-dir cache] [--epochs 100]``.

It fits the same classifier three times: from the cache, for one epoch without it, and from the cache again, whose rows
are then on disk. Beside the accuracy of the head stands a logistic regression on the same embeddings.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from quatcache import CacheConfig
from quatcache.demo.icd10 import CHAPTERS
from quatcache.demo.measure import Fit, RowCollector, fit
from quatcache.demo.model import ICD10DataModule
from quatcache.errors import MissingDependencyError, QuatcacheError

__all__ = ["main"]

FILL_BATCH = 64
ACCURACY_EVERY = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: The command line; ``None`` reads ``sys.argv``.

    Returns:
        0; 1 after an error that the user can mend, which is printed in one sentence.
    """
    parser = argparse.ArgumentParser(prog="python -m quatcache.demo", description="Diagnosis texts into 22 chapters.")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="where rows persist (default: cache)")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of each cached fit (default: 100)")
    parser.add_argument("--train-size", type=int, default=4000, help="training texts (default: 4000)")
    parser.add_argument("--validation-size", type=int, default=1000, help="validation texts (default: 1000)")
    parser.add_argument("--encoder", default=None, help="path or name (default: the packaged all-MiniLM-L6-v2)")
    options = parser.parse_args(arguments)

    console = Console(highlight=False)
    # What Lightning advises on workers, devices and modes is about other set-ups than this one.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading the weights: a moment
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figures = run(options, console)
    except QuatcacheError as error:
        console.print(f"[red]{error}[/]")
        return 1
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        console.print(f"Figures written to {options.json}")
    return 0


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Fit, measure and print.

    Args:
        options: The parsed command line.
        console: Where tables go.

    Returns:
        The figures as JSON.
    """
    begun = time.perf_counter()
    data = ICD10DataModule(options.train_size, options.validation_size)
    data.setup("fit")
    assert data.split is not None
    sizes = len(data.split.train), len(data.split.validation)
    console.print(
        f"[bold]{sizes[0]:,} training and {sizes[1]:,} validation texts, {CHAPTERS} chapters of ICD-10-CM; "
        "no category is on both sides.[/]"
    )

    cache = CacheConfig(batch_size=FILL_BATCH, save_dir=str(options.cache_dir))
    console.print(f"\n1. Fit {options.epochs} epochs from the cache in {options.cache_dir}")
    with console.status("filling, then training"):
        first = fit(data, cache, options.epochs, encoder=options.encoder, collect=True)
    print_cache(first, console)

    console.print("\n2. One epoch without a cache: every text goes through the encoder")
    with console.status("encoding"):
        uncached = fit(data, None, 1, encoder=options.encoder)
    console.print(f"   {uncached.epochs.seconds[0]:.1f} s")

    assert first.collector is not None
    regression = logistic_regression(first.collector)

    console.print("\n3. The first fit once more, as a second run finds it")
    with console.status("training"):
        second = fit(data, cache, options.epochs, encoder=options.encoder)
    print_cache(second, console)

    figures = summarise(sizes, first, uncached, second, regression)
    figures["total_seconds"] = time.perf_counter() - begun
    print_tables(figures, console)
    return figures


def logistic_regression(collector: RowCollector) -> float:
    """Fit scikit-learn's logistic regression on the raw embeddings.

    Args:
        collector: Rows of the training and the validation texts.

    Returns:
        Its validation accuracy, in ``0 <= accuracy <= 1``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise MissingDependencyError("scikit-learn is not installed: pip install 'quatcache[demo]'") from error
    embeddings, chapters = collector.rows("train")
    model = LogisticRegression(max_iter=1000).fit(embeddings.numpy(), chapters.numpy())
    embeddings, chapters = collector.rows("validation")
    return float(model.score(embeddings.numpy(), chapters.numpy()))


def summarise(sizes: tuple[int, int], first: Fit, uncached: Fit, second: Fit, regression: float) -> dict[str, Any]:
    """Put the figures together.

    Args:
        sizes: Training and validation texts.
        first: The cached fit.
        uncached: One epoch without a cache.
        second: The cached fit from disk.
        regression: Accuracy of the logistic regression.

    Returns:
        JSON; seconds are wall time, accuracies lie in ``0 <= accuracy <= 1``.
    """
    assert first.report is not None
    assert second.report is not None
    cached_epoch = median(first.epochs.seconds)
    return {
        "training_texts": sizes[0],
        "validation_texts": sizes[1],
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "encoded": first.report.encoded,
        "fill_seconds": first.report.fill_seconds,
        "uncached_epoch_seconds": uncached.epochs.seconds[0],
        "cached_epoch_seconds": cached_epoch,
        "ratio": uncached.epochs.seconds[0] / cached_epoch,
        "accuracy": first.epochs.accuracy,
        "logistic_regression_accuracy": regression,
        "first_run_seconds": first.total_seconds,
        "second_run": {
            "encoded": second.report.encoded,
            "fill_seconds": second.report.fill_seconds,
            "run_seconds": second.total_seconds,
            "accuracy": second.epochs.accuracy,
        },
    }


def print_cache(done: Fit, console: Console) -> None:
    """Print what the cache did and how long the fit took; the fit's own line has said the rest."""
    assert done.report is not None
    console.print(
        f"   {done.report.encoded:,} items encoded, {len(done.epochs.seconds)} epochs, {done.total_seconds:.1f} s"
    )


def print_tables(figures: dict[str, Any], console: Console) -> None:
    """Print what was measured: seconds first, accuracy after."""
    speed = Table("", "", title="\nSpeed", show_header=False)
    speed.columns[1].justify = "right"
    speed.add_row("fill, first run", f"{figures['fill_seconds']:.1f} s")
    speed.add_row("items encoded, first run", f"{figures['encoded']:,}")
    speed.add_row("one uncached epoch", f"{figures['uncached_epoch_seconds']:.2f} s")
    speed.add_row("one cached epoch (median)", f"{figures['cached_epoch_seconds']:.3f} s")
    speed.add_row("uncached / cached epoch", f"{figures['ratio']:.0f} x")
    second = figures["second_run"]
    speed.add_row("second run, from disk", f"{second['run_seconds']:.1f} s", style="bold")
    speed.add_row("second run", f"{second['encoded']:,} items encoded", style="bold")
    console.print(speed)

    accuracy = Table("after epoch", "validation accuracy", title="\nAccuracy")
    accuracy.columns[0].justify = accuracy.columns[1].justify = "right"
    reached = figures["accuracy"]
    for epoch in sorted({*range(ACCURACY_EVERY, len(reached) + 1, ACCURACY_EVERY), len(reached)}):
        accuracy.add_row(str(epoch), f"{reached[epoch - 1]:.3f}")
    accuracy.add_section()
    accuracy.add_row("logistic regression", f"{figures['logistic_regression_accuracy']:.3f}")
    accuracy.add_row(f"second run, after {len(second['accuracy'])}", f"{second['accuracy'][-1]:.3f}")
    console.print(accuracy)


if __name__ == "__main__":
    raise SystemExit(main())
