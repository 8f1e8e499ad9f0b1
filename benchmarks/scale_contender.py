"""One size of cache in a process of its own: filled for the first time, or there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.fills import cheap_fit
from benchmarks.rows import extend_cache

__all__ = ["cold", "prepare", "warm"]

FEW = 64


def prepare(folder: str, rows: int, batch: int, dtype: str | None = None) -> dict[str, Any]:
    """Make a cache without encoding it: a real fit of a few items, and rows for the others."""
    cheap_fit(Path(folder), FEW, batch, epochs=1, dtype=dtype)
    extend_cache(Path(folder), rows)
    return {}


def cold(folder: str, rows: int, batch: int) -> dict[str, Any]:
    """Fill, and train a few steps; see ``benchmarks.fills``."""
    found = cheap_fit(Path(folder), rows, batch)
    if found["encoded"] != rows:
        raise SystemExit("a fill did not encode every item once; no figure is given")
    return found


def warm(folder: str, rows: int, batch: int, epochs: int, dtype: str | None = None) -> dict[str, Any]:
    """Start warm and train whole epochs."""
    found = cheap_fit(Path(folder), rows, batch, epochs=epochs, dtype=dtype)
    if found["encoded"] or found["read"]:
        raise SystemExit("a second fit was not a warm start; no figure is given")
    return found
