"""From one of the user's loaders to the one that takes its place for a run.

The new loader shares the sampler, the batch sampler and the generator with the old one, so it draws the same random
numbers at the same moments and gives the same samples in the same batches. Only what happens with the indices of a
batch is different. The user's loader itself is never touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from quatcache.data.batches import Batch, BatchReader, CachedColumns, collate_samples
from quatcache.errors import LoaderError

__all__ = ["checked_loader", "convert_loader"]

Collates = Mapping[str, Callable[[Sequence[Any]], Any]]
SampleReader = Callable[[Any], Any]
Gather = Callable[[Batch], Batch]

_DRAWN_AT_ONCE = (SequentialSampler, RandomSampler, WeightedRandomSampler, SubsetRandomSampler, DistributedSampler)


def checked_loader(loader: Any, name: str) -> DataLoader[Any]:
    """Refuse a loader whose batches could not be reproduced.

    Args:
        loader: What the user passed or a hook returned.
        name: What it is for, for the message.

    Raises:
        LoaderError: It is no ``DataLoader``, iterates in a way of its own, collates itself, or does not batch.
    """
    if not isinstance(loader, DataLoader):
        raise LoaderError(
            f"the {name} loader is a {type(loader).__name__}; pass a torch.utils.data.DataLoader over a dataset of samples."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise LoaderError(
            f"the {name} loader is a {type(loader).__name__} with an __iter__ of its own, whose batches cannot be "
            "reproduced from a cache; pass a plain DataLoader with a sampler or batch sampler instead."
        )
    if loader.collate_fn is not default_collate and loader.batch_size is not None:
        raise LoaderError(
            f"the {name} loader has a collate_fn of its own ({getattr(loader.collate_fn, '__qualname__', loader.collate_fn)}), "
            "but the model collates samples through its encoders; leave collate_fn unset and override read_sample on "
            "the model if the samples need it."
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise LoaderError(
            f"the {name} loader has batch_size=None, so its dataset returns batches; let the dataset return samples and "
            "give the loader a batch_size or a batch_sampler."
        )
    return loader


def convert_loader(
    loader: DataLoader[Any],
    collates: Collates,
    reader: SampleReader,
    columns: CachedColumns | None,
    gather: Gather | None,
) -> DataLoader[Any]:
    """Build the loader that takes the place of the user's.

    Args:
        loader: A loader that passed :func:`checked_loader`.
        collates: For each encoder that is not cached, its collate function.
        reader: Takes a sample apart.
        columns: What is cached of the loader's dataset; None where nothing is.
        gather: Replaces row numbers by rows, in this process; None where nothing is cached.

    Returns:
        A loader of :class:`~quatcache.data.Batch`. Where encoders and labels are all cached it has no workers.
    """
    settings: dict[str, Any] = {"generator": loader.generator}
    from_memory = columns is not None and columns.targets is not None and not collates
    if not from_memory:
        settings.update(_worker_settings(loader))
    if isinstance(loader.dataset, IterableDataset):
        settings.update(batch_size=loader.batch_size, drop_last=loader.drop_last)
        return DataLoader(loader.dataset, collate_fn=_CollateSamples(collates, reader), **settings)
    batch_sampler: Any = loader.batch_sampler
    ahead = (loader.prefetch_factor or 0) * loader.num_workers if from_memory else 0
    if ahead and not isinstance(loader.sampler, _DRAWN_AT_ONCE):
        settings["batch_sampler"] = _ReadAhead(batch_sampler, ahead)
    elif type(batch_sampler) is BatchSampler:  # in parts: Lightning puts a distributed sampler in place of the sampler
        settings.update(sampler=loader.sampler, batch_size=loader.batch_size, drop_last=loader.drop_last)
    else:
        settings["batch_sampler"] = batch_sampler
    view = BatchReader(loader.dataset, collates, reader, columns)
    if gather is None:
        return DataLoader(view, collate_fn=_as_it_is, **settings)
    return GatheringLoader(view, gather=gather, collate_fn=_as_it_is, **settings)


def _worker_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    names = [
        "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
        "persistent_workers", "pin_memory_device", "in_order",
    ]  # fmt: skip
    return {name: getattr(loader, name) for name in names if hasattr(loader, name)}


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass
class _CollateSamples:
    """Collates samples of an iterable dataset, which has no indices to read by."""

    collates: Collates
    reader: SampleReader

    def __call__(self, samples: Sequence[Any]) -> Batch:
        return collate_samples([self.reader(sample) for sample in samples], self.collates)


class GatheringLoader(DataLoader[Any]):
    """A loader that replaces the row numbers of each batch by the rows, in the process that trains.

    Lightning builds it anew from its attributes when it puts in a sampler, so ``gather`` is one.
    """

    def __init__(self, dataset: Any, *, gather: Gather, **settings: Any) -> None:
        """Take the arguments of a ``DataLoader``, and the gathering function."""
        super().__init__(dataset, **settings)
        self.gather = gather

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Start an epoch now, not at its first batch: the base seed is drawn when a loader is asked for an iterator."""
        return map(self.gather, super().__iter__())


class _ReadAhead:
    """A batch sampler as far ahead of its batches as the workers of the user's loader would have pulled it.

    A sampler that draws from the global generator for each batch would otherwise meet it in another state.
    """

    def __init__(self, batches: Iterable[Sequence[int]], depth: int) -> None:
        self._batches = batches
        self._depth = depth

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sequence[int]]:
        source = iter(self._batches)
        waiting: deque[Sequence[int]] = deque()
        for batch in source:
            waiting.append(batch)
            if len(waiting) > self._depth:
                yield waiting.popleft()
        yield from waiting
