"""The batches of an epoch as index tensors, with the numbers that the user's sampler would have drawn.

A sampler gives one Python number per index, which costs more than the step of a small head. So the samplers that
Lightning and a ``DataLoader`` put in (in order, shuffled, distributed) are asked for their whole epoch at once: the
same permutation from the same generator at the same moments. It is drawn on the CPU, as the samplers do, because a
GPU draws other numbers from the same seed; if batches are looked up on a GPU, the epoch is sent there once. Samplers
of other kinds are iterated, and their batches are sent one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from quatcache.data.batches import positions_of
from quatcache.store.transfer import send

__all__ = ["IndexBatch", "IndexBatches"]


class IndexBatch(NamedTuple):
    """The indices of one batch.

    Attributes:
        drawn: As they were drawn, in main memory: numbers or a tensor ``(B,)``.
        where: What the batch is looked up with: int64 ``(B,)``, none negative, on the device of the columns.
    """

    drawn: Sequence[int] | torch.Tensor
    where: torch.Tensor


class IndexBatches(Iterator[IndexBatch]):
    """One epoch of a batch sampler, which is asked for its iterator now and for indices with each batch.

    Args:
        batches: The batch sampler.
        size: Samples of the dataset.
        device: Where batches are looked up; None: in main memory.

    Attributes:
        known: The batches of the epoch as far as they are known without drawing: all of them, once the permutation of
            a sampler of a known kind was drawn; else none.

    Example:
        >>> batches = IndexBatches(BatchSampler(SequentialSampler(range(5)), 2, drop_last=False), 5)
        >>> [batch.where.tolist() for batch in batches], len(batches.known)
        ([[0, 1], [2, 3], [4]], 3)
    """

    def __init__(self, batches: Any, size: int, device: torch.device | None = None) -> None:
        """Keep what is needed for an epoch."""
        self.known: Sequence[torch.Tensor] = ()
        self._device = device
        order = _order_of(batches.sampler) if type(batches) is BatchSampler else None
        self._given = self._each(iter(batches), size) if order is None else self._at_once(batches, order)

    def __next__(self) -> IndexBatch:
        """Give the next batch."""
        return next(self._given)

    def _each(self, batches: Iterator[Any], size: int) -> Iterator[IndexBatch]:
        for drawn in batches:
            yield IndexBatch(drawn, send(positions_of(drawn, size), self._device))

    def _at_once(self, batches: BatchSampler, order: _Order) -> Iterator[IndexBatch]:
        positions = order.draw()
        if batches.drop_last:
            positions = positions[: len(positions) - len(positions) % batches.batch_size]
        if len(positions):  # an empty tensor splits into one empty part
            self.known = torch.split(positions, batches.batch_size)
        there = self.known
        if self._device is not None and self.known:
            there = torch.split(send(positions, self._device), batches.batch_size)
        given = map(IndexBatch, self.known, there)
        yield from islice(given, len(positions) // batches.batch_size)
        order.run_out()  # to see that there is no more for the last batch
        yield from given


class _Order(NamedTuple):
    """How a sampler orders an epoch.

    Attributes:
        draw: Gives the positions of the epoch, int64 on the CPU.
        run_out: Draws what the sampler draws when it is asked for a position past its last.
    """

    draw: Callable[[], torch.Tensor]
    run_out: Callable[[], object] = tuple


def _order_of(sampler: Any) -> _Order | None:
    """Find out how a sampler orders an epoch; None: not in one of the ways that are known here."""
    if type(sampler) is SequentialSampler:
        return _Order(lambda: torch.arange(len(sampler)))
    if type(sampler) is RandomSampler and not sampler.replacement:
        size = len(sampler.data_source)
        return _shuffled(sampler, size) if sampler.num_samples == size else None
    if type(sampler) is DistributedSampler and _is_consistent(sampler):
        return _Order(lambda: _share(sampler))
    return None


def _shuffled(sampler: RandomSampler, size: int) -> _Order:
    """Do what ``RandomSampler.__iter__`` does, which begins another permutation of which it gives nothing."""
    generators = []

    def draw() -> torch.Tensor:
        generator = sampler.generator
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        generators.append(generator)
        return torch.randperm(size, generator=generator)

    return _Order(draw, lambda: torch.randperm(size, generator=generators[-1]))


def _is_consistent(sampler: DistributedSampler[Any]) -> bool:
    """Say whether a dataset still has the size that its sampler saw; if not, the sampler itself complains."""
    size = len(sampler.dataset)  # type: ignore[arg-type]
    left = size - sampler.total_size
    return size > 0 and (left >= 0 if sampler.drop_last else left <= 0)


def _share(sampler: DistributedSampler[Any]) -> torch.Tensor:
    """Do what ``DistributedSampler.__iter__`` does: the positions of one rank."""
    size: int = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.shuffle:
        generator = torch.Generator()
        generator.manual_seed(sampler.seed + sampler.epoch)
        positions = torch.randperm(size, generator=generator)
    else:
        positions = torch.arange(size)
    if sampler.total_size > size:  # the first ones again, as often as it takes
        positions = positions.repeat(math.ceil(sampler.total_size / size))
    return positions[sampler.rank : sampler.total_size : sampler.num_replicas].contiguous()
