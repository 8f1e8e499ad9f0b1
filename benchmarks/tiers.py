"""An epoch of the heads of ``benchmarks.shapes`` from rows on disk, and from the same rows in memory."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.epochs import CachedHead, sample_loader
from benchmarks.lean import fit
from benchmarks.shapes import SHAPES, make_data
from quatcache import CacheConfig, CacheType

__all__ = ["train"]


def train(tier: str, shape: str, rows: int, epochs: int, folder: str) -> dict[str, Any]:
    """Train from a cache in a folder; the first call fills it, and later ones start warm.

    Args:
        tier: ``"CPU"`` or ``"DISK"``.
        shape: A name of ``SHAPES``.
        rows: Rows of data.
        epochs: Epochs in all, the warm-up included, which also brings the files into the page cache; > 1.
        folder: The ``save_dir``.

    Returns:
        Seconds of every epoch but the first, every loss, and how many rows were encoded.
    """
    data, losses = make_data(rows), list[torch.Tensor]()
    cache = CacheConfig(CacheType[tier], batch_size=4096, save_dir=folder)
    model = CachedHead(SHAPES[shape], data, losses=losses, cache=cache)
    seconds = fit(model, sample_loader(SHAPES[shape], data), epochs)
    report = model.cache_callback.report
    assert report.encoders["default"].tier == tier
    return {"seconds": seconds, "losses": torch.stack(losses).tolist(), "encoded": report.encoded}
