"""What loaders of cached data ask for rows, and what takes their place when the cache steps aside.

An encoder may be unfrozen in the middle of a fit, by a fine-tuning callback for instance. Its rows are then worth
nothing, so loaders go back to reading and collating samples, with the indices that they would have drawn anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from quatcache.data.batches import Batch, CachedColumns
from quatcache.store import DiskStore, Found, RowStore, TensorStore
from quatcache.store.transfer import send
from quatcache.training.meeting import UNMET, Answer, Unmet
from quatcache.training.prefetch import PageReader

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
        device: Where rows are brought: that of the model, if it is a GPU. None: Lightning moves them, if need be.
        served: Rows given so far, by encoder, less those that were encoded for it and not kept.
        aside: Whether loaders must read samples instead.
    """

    def __init__(self, look: Callable[[], None], answer: Callable[[Unmet], dict[str, Answer]]) -> None:
        """Serve nothing yet."""
        self.look = look
        self._answer = answer
        self.stores: dict[str, RowStore] = {}
        self.device: torch.device | None = None
        self.served: Counter[str] = Counter()
        self.aside = False
        self._there: WeakKeyDictionary[CachedColumns, CachedColumns] = WeakKeyDictionary()
        self._pages: WeakSet[PageReader] = WeakSet()

    @property
    def resident(self) -> torch.device | None:
        """The GPU that trains if it has all rows, so that a step need copy nothing; else None."""
        stores = self.stores.values()
        there = all(isinstance(store, TensorStore) and store.device == self.device for store in stores)
        return self.device if stores and there else None

    def columns_on(self, device: torch.device, columns: CachedColumns) -> CachedColumns:
        """Give the columns of a dataset on a device, to which they are copied once."""
        if columns not in self._there:
            self._there[columns] = columns.to(device)
        return self._there[columns]

    def pages(self, read: Callable[[torch.Tensor], Batch]) -> PageReader:
        """Give what reads ahead in memory maps, if rows are in any; it is closed with the gatherer, too.

        Args:
            read: Gives the row numbers of the batch of some indices.
        """

        def touch(indices: torch.Tensor) -> None:
            numbers: dict[str, Any] = read(indices).inputs
            for name, store in on_disk.items():
                store.touch(numbers[name])

        on_disk = {name: store for name, store in self.stores.items() if isinstance(store, DiskStore)}
        pages = PageReader(touch if on_disk else None)
        self._pages.add(pages)
        return pages

    def let_go(self) -> None:
        """End what reads ahead, and give the memory of the rows back: nothing is gathered any more."""
        for pages in list(self._pages):
            pages.close()
        self._there.clear()
        self.stores.clear()

    def __call__(self, batch: Batch, drawn: Drawn) -> Batch:
        """Gather the rows of one batch."""
        inputs = {**batch.inputs, DRAWN: drawn}
        unmet: Unmet | None = inputs.pop(UNMET, None)
        answers = {} if unmet is None else self._answer(unmet)
        for name, store in self.stores.items():
            numbers: Any = inputs.get(name)
            if unmet is None:
                inputs[name] = store.gather(numbers, self.device)
                self.served[name] += len(numbers)
                continue
            rows, lost = answers[name]
            if numbers is not None:  # else of a stream: all of its samples were asked for
                rows = _merged(store, numbers, unmet.positions, rows)
            inputs[name] = send(rows, self.device)
            self.served[name] += len(rows) - lost
        return Batch(inputs, tuple(self._sent(target) for target in batch.targets))

    def _sent(self, target: Any) -> Any:
        return send(target, self.device) if isinstance(target, torch.Tensor) else target


def _merged(store: RowStore, numbers: torch.Tensor, unmet: torch.Tensor, answer: Any) -> Any:
    """Put the rows of a batch together.

    Args:
        store: Has the rows with numbers.
        numbers: ``(k * B,)``.
        unmet: Positions ``(n,)`` in the batch of samples whose rows are not taken from there.
        answer: Their rows ``(k * n, *row_shape)``.
    """
    if len(answer) == len(numbers):  # all of the batch, in its order
        return answer
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
