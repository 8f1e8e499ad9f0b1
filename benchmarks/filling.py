"""Encoding for the first time: real texts with a real encoder, beside what people use instead."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import process, texts
from benchmarks.report import Bar
from benchmarks.settings import Found, Settings, installed
from benchmarks.turns import Turns, take_turns

__all__ = ["bench_fill", "bench_fill_cheap", "bench_growth"]

MINILM = ["encode", "quatcache", "dataset-order", "datasets.map", "langchain"]
STATIC = ["encode", "quatcache"]
FEWER = {"dataset-order": 3, "datasets.map": 1, "langchain": 1, "quaterion": 1}
"""Contenders that take a minute a round take part in the first rounds alone."""

TOLERANCE = 1e-5
SHARE_OF_DUPLICATES = 0.3


def check_vectors(found: Path, reference: Path) -> float:
    """Hold the vectors of one contender against those of another.

    Args:
        found: File ``.npy`` of vectors ``(N, D)``.
        reference: The same of the contender that the others are held against.

    Returns:
        The largest difference of two values.

    Raises:
        SystemExit: They differ by more than 1e-5: their times would compare different work.
    """
    one, other = np.load(found), np.load(reference)
    apart = float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")
    if not apart <= TOLERANCE:
        raise SystemExit(
            f"vectors of {found.stem} are up to {apart:g} from those of {reference.stem}; no time is taken"
        )
    return apart


def _compare(kind: str, names: list[str], count: int, settings: Settings, console: Console) -> tuple[Turns, float]:
    """Let contenders encode the same texts, in turns; none counts before its vectors were compared."""
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="fill-", dir=settings.folder) as folder:

        def once(name: str, turn: int) -> float:
            nonlocal worst
            target = Path(folder) / f"{name}.{turn}.npy"
            given = {"contender": name, "count": count, "target": str(target)}
            if name == "quaterion":
                found = process.work("quaterion_contender", "encode", python=str(settings.quaterion), **given)
            else:
                found = process.work("fill_contenders", "encode", kind=kind, **given)
            worst = max(worst, check_vectors(target, Path(folder) / f"encode.{turn}.npy"))
            return float(found["seconds"])

        runs = {name: lambda turn, name=name: once(name, turn) for name in names}
        title = f"fill {kind}, seconds"
        turns = take_turns(runs, settings.rounds, console, title, fewer=FEWER)
    columns = {
        "s": "{:.1f}".format,
        "ms/text": lambda took: f"{1e3 * took / count:.2f}",
        "texts/s": lambda took: f"{count / took:,.0f}",
    }
    turns.print(console, f"fill {kind}: {count:,} texts, vectors within {worst:.1e} of each other", "encode", columns)
    return turns, worst


def _figures(turns: Turns, count: int, worst: float) -> dict[str, Any]:
    return {
        "texts": count,
        "largest_difference": worst,
        "seconds": turns.values,
        "ms_per_text": {name: 1e3 * turns.median(name) / count for name in turns.values},
    }


def bench_fill(settings: Settings, console: Console) -> Found:
    """Encode full descriptions of packages with MiniLM."""
    if not texts.have_descriptions():
        console.print(f"fill is left out: {texts.HOW_TO_GET_DESCRIPTIONS}")
        return {}, []
    names = installed(MINILM, console) + ["quaterion"] * settings.with_quaterion(console)
    turns, worst = _compare("minilm", names, settings.texts, settings, console)
    bars = [
        Bar("fill, MiniLM on descriptions: encode, 32 a batch / fill", turns.ratio("encode", "quatcache"), 1.3, False),
        Bar(
            "fill, MiniLM on descriptions: fixed batches in dataset order / fill",
            turns.ratio("dataset-order", "quatcache"),
            2.5,
            False,
        ),
    ]
    return _figures(turns, settings.texts, worst), bars


def bench_fill_cheap(settings: Settings, console: Console) -> Found:
    """Encode glosses with static embeddings, where all that is not the encoder shows; and texts that occur twice."""
    if not texts.have_glosses():
        console.print(f"fill-cheap is left out: {texts.HOW_TO_GET_GLOSSES}")
        return {}, []
    turns, worst = _compare("static", STATIC, settings.glosses, settings, console)
    with tempfile.TemporaryDirectory(prefix="fill-", dir=settings.folder) as folder:
        twice = process.work(
            "fill_contenders", "duplicates", count=settings.glosses, share=SHARE_OF_DUPLICATES, target=f"{folder}/cache"
        )
    ratio = twice["encoded"] / twice["distinct"]
    console.print(f"{twice['texts']:,} texts, {twice['distinct']:,} distinct: {twice['encoded']:,} encoded")
    bars = [
        Bar("fill, static embeddings on glosses: encode / fill", turns.ratio("encode", "quatcache"), 1.0, False),
        Bar("fill with 30% duplicates: texts encoded / distinct texts", ratio, 1.0),
    ]
    return _figures(turns, settings.glosses, worst) | {"duplicates": twice}, bars


def bench_growth(settings: Settings, console: Console) -> Found:
    """Fill, add 1% to the dataset, and fill again."""
    sizes = {"static": settings.glosses, "minilm": settings.texts}
    ready = {"static": texts.have_glosses(), "minilm": texts.have_descriptions()}
    how = {"static": texts.HOW_TO_GET_GLOSSES, "minilm": texts.HOW_TO_GET_DESCRIPTIONS}
    figures, bars = {}, []
    for kind, count in sizes.items():
        if not ready[kind]:
            console.print(f"growth, {kind}, is left out: {how[kind]}")
            continue
        more = max(1, count // 101)  # 1% of what there was
        rounds = [_grown(kind, count - more, more, settings) for _ in range(settings.rounds)]
        found = rounds[0] | {
            "seconds": {name: [one[name] for one in rounds] for name in ("first_seconds", "again_seconds")},
            "first_seconds": median(one["first_seconds"] for one in rounds),
            "again_seconds": median(one["again_seconds"] for one in rounds),
        }
        figures[kind] = found
        console.print(
            f"growth, {kind}: {found['first_encoded']:,} texts encoded in {found['first_seconds']:.2f} s, then "
            f"{found['again_encoded']:,} of {found['texts'] + found['more']:,} in {found['again_seconds']:.2f} s"
        )
        bars += [
            Bar(f"grown by 1%, {kind}: texts encoded / texts that are new", found["again_encoded"] / more, 1.0),
            Bar(
                f"grown by 1%, {kind}: seconds to the first step, second fill / first fill",
                median(one["again_seconds"] / one["first_seconds"] for one in rounds),
                0.05,
            ),
        ]
    return figures, bars


def _grown(kind: str, count: int, more: int, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="growth-", dir=settings.folder) as folder:
        found: dict[str, Any] = process.work(
            "fill_contenders", "grown", kind=kind, count=count, more=more, target=f"{folder}/cache"
        )
    return found
