"""What loaders of cached data ask for rows, and what takes their place when the cache steps aside.

An encoder may be unfrozen in the middle of a fit, by a fine-tuning callback for instance. Its rows are then worth
nothing, so loaders go back to reading and collating samples, with the indices that they would have drawn anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from quatcache.data.batches import Batch
from quatcache.store import Found, RowStore
from quatcache.training.meeting import UNMET, Answer, Unmet

__all__ = ["DRAWN", "Drawn", "RowGatherer", "batches_in"]


DRAWN = "#drawn"
"""No encoder has this name: names are those of attributes."""


class Drawn:
    """Knows which samples a batch of rows is of, so that they can be read after all.

    It travels with the batch: some of Lightning's fetchers are a batch ahead of the step.

    Args:
        read: Reads a batch as if nothing were cached.
        drawn: What it takes.
    """

    __slots__ = ("_drawn", "_read")

    def __init__(self, read: Callable[[Any], Batch], drawn: Any) -> None:
        """Read nothing yet."""
        self._read = read
        self._drawn = drawn

    def batch(self) -> Batch:
        """Read the batch, in this process."""
        return self._read(self._drawn)


class RowGatherer:
    """Replaces the row numbers of a batch by the rows, while the cache serves.

    Args:
        look: Called before each epoch of a loader, for what happened to the encoders meanwhile.
        answer: Gives the rows of samples that have none.

    Attributes:
        stores: Where the rows of each cached encoder are.
        served: Rows given so far, by encoder, less those that were encoded for it and not kept.
        aside: Whether loaders must read samples instead.
    """

    def __init__(self, look: Callable[[], None], answer: Callable[[Unmet], dict[str, Answer]]) -> None:
        """Serve nothing yet."""
        self.look = look
        self._answer = answer
        self.stores: dict[str, RowStore] = {}
        self.served: Counter[str] = Counter()
        self.aside = False

    def __call__(self, batch: Batch, drawn: Drawn) -> Batch:
        """Gather the rows of one batch."""
        inputs = {**batch.inputs, DRAWN: drawn}
        unmet: Unmet | None = inputs.pop(UNMET, None)
        answers = {} if unmet is None else self._answer(unmet)
        for name, store in self.stores.items():
            numbers: Any = inputs.get(name)
            if unmet is None:
                inputs[name] = store.gather(numbers)
                self.served[name] += len(numbers)
                continue
            rows, lost = answers[name]
            if numbers is None:  # of a stream: all of its samples were asked for
                inputs[name] = rows
            else:
                inputs[name] = _merged(store, numbers, unmet.positions, rows)
            self.served[name] += len(inputs[name]) - lost
        return Batch(inputs, batch.targets)


def _merged(store: RowStore, numbers: torch.Tensor, unmet: torch.Tensor, answer: Any) -> Any:
    """Put the rows of a batch together.

    Args:
        store: Has the rows with numbers.
        numbers: ``(k * B,)``.
        unmet: Positions ``(n,)`` in the batch of samples whose rows are not taken from there.
        answer: Their rows ``(k * n, *row_shape)``.
    """
    size = len(numbers) * len(unmet) // len(answer)  # B
    asked = torch.cat([unmet + start for start in range(0, len(numbers), size)])
    gathered = torch.ones(len(numbers), dtype=torch.bool)
    gathered[asked] = False
    others = gathered.nonzero().reshape(-1)
    parts = [Found(others.numpy(), store.gather(numbers[others])), Found(asked.numpy(), answer)]
    return store.assemble(len(numbers), parts)


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
