"""What loaders of cached data ask for rows, and what takes their place when the cache steps aside.

An encoder may be unfrozen in the middle of a fit, by a fine-tuning callback for instance. Its rows are then worth
nothing, so loaders go back to reading and collating samples, with the indices that they would have drawn anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from quatcache.data.batches import Batch
from quatcache.store import RowStore

__all__ = ["RowGatherer", "batches_in"]


class RowGatherer:
    """Replaces the row numbers of a batch by the rows, while the cache serves.

    Args:
        look: Called before each epoch of a loader, for what happened to the encoders meanwhile.

    Attributes:
        stores: Where the rows of each cached encoder are.
        served: Rows given so far, by encoder.
        aside: Whether loaders must read samples instead.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        """Serve nothing yet."""
        self.look = look
        self.stores: dict[str, RowStore] = {}
        self.served: Counter[str] = Counter()
        self.aside = False

    def __call__(self, batch: Batch) -> Batch:
        """Gather the rows of one batch."""
        inputs = dict(batch.inputs)
        for name, store in self.stores.items():
            rows = inputs[name]
            self.served[name] += rows.numel()
            inputs[name] = store.gather(rows)
        return Batch(inputs, batch.targets)


def batches_in(batch: Any) -> Iterator[Batch]:
    """Give the batches in what a combined loader gives: one, or a list or dict of them.

    Example:
        >>> len(list(batches_in({"a": Batch({}, ()), "b": [Batch({}, ()), None]})))
        2
    """
    if isinstance(batch, Batch):
        yield batch
    elif isinstance(batch, Mapping):
        yield from batches_in(list(batch.values()))
    elif isinstance(batch, Iterable) and not hasattr(batch, "shape"):
        for part in batch:
            yield from batches_in(part)
