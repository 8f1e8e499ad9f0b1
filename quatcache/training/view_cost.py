"""What caching views will cost, said before it is paid: N views are N times the reading and the encoding."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.views import Views
from quatcache.units import readable_size, readable_time

__all__ = ["tell_cost"]

logger = logging.getLogger(__name__)

TRIED = 16
"""Views that are read and encoded to go by."""


def tell_cost(fills: Iterable[DatasetFill], time_func: Callable[[], float] = time.monotonic) -> None:
    """Log what the views that must be read will take, measured on a few of them.

    Args:
        fills: Datasets that were planned; those without views are passed over.
        time_func: Clock in seconds.
    """
    for fill in fills:
        if not isinstance(fill.dataset, Views) or not fill.to_read:
            continue
        tried = min(TRIED, len(fill.dataset))
        for one in fill.encoders:
            one.frozen().encode(fill.chunk_reader[0].items)  # the first batch is encoded twice, and sets libraries up
        started = time_func()
        chunk = fill.chunk_reader.__getitems__(range(tried))
        rows = [one.frozen().encode(chunk.items) for one in fill.encoders]
        seconds = (time_func() - started) / tried * fill.to_read
        size = sum(row.nbytes for row in rows) // tried * len(fill.dataset)
        logger.info(
            "The %s dataset augments: its %s samples are cached in %s views each, up to %s of rows; reading and "
            "encoding %s of them takes about %s.",
            fill.name,
            f"{len(fill.dataset.dataset):,}",
            fill.dataset.count,
            readable_size(size),
            f"{fill.to_read:,}",
            readable_time(seconds),
        )
