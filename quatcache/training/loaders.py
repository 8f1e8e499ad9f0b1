"""From one of the user's loaders to the one that takes its place for a run.

The new loader shares the sampler, the batch sampler and the generator with the old one, so it draws the same random
numbers at the same moments and gives the same samples in the same batches. Only what happens with the indices of a
batch is different. The user's loader itself is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_collate

from quatcache.data.batches import BatchReader, CachedColumns, as_it_is
from quatcache.errors import LoaderError
from quatcache.training.gathering import DRAWN, Drawn, RowGatherer, batches_in
from quatcache.training.gathering_loaders import Aside, GatheringLoader, MemoryLoader
from quatcache.training.keying import ChunkReader
from quatcache.training.lightning import Trainer
from quatcache.training.meeting import MeetingReader, StreamCollate
from quatcache.training.meeting_loaders import CollateSamples, MeetingLoader, StreamAside, StreamLoader
from quatcache.training.views import ViewChoice, ViewReader, Views

__all__ = ["Meeting", "checked_loader", "convert_loader", "replace_rows"]

Collates = Mapping[str, Callable[[Sequence[Any]], Any]]
SampleReader = Callable[[Any], Any]


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
            f"the {name} loader is a {type(loader).__name__}; pass a torch.utils.data.DataLoader over a dataset of "
            "samples."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise LoaderError(
            f"the {name} loader is a {type(loader).__name__} with an __iter__ of its own, whose batches cannot be "
            "reproduced from a cache; pass a plain DataLoader with a sampler or batch sampler instead."
        )
    if loader.batch_sampler is None:
        raise LoaderError(
            f"the {name} loader has batch_size=None, so its dataset returns batches; let the dataset return samples, "
            "and give the loader a batch_size or a batch_sampler."
        )
    if loader.collate_fn is not default_collate:
        collate = getattr(loader.collate_fn, "__qualname__", loader.collate_fn)
        raise LoaderError(
            f"the {name} loader has a collate_fn of its own ({collate}), but the model collates samples through its "
            "encoders; leave collate_fn unset, and override read_sample on the model if the samples need it."
        )
    return loader


@dataclass(frozen=True)
class Meeting:
    """What a loader needs for samples that lack rows.

    Attributes:
        chunks: Keys samples.
        columns: Called at the start of an epoch; gives what is known of the dataset then. None for a stream.
    """

    chunks: ChunkReader
    columns: Callable[[], CachedColumns] | None = None


def convert_loader(
    loader: DataLoader[Any],
    collates: Collates,
    reader: SampleReader,
    columns: CachedColumns | None,
    gather: RowGatherer | None,
    plain: Callable[[], Collates] | None = None,
    meeting: Meeting | None = None,
    views: tuple[Views, ViewChoice] | None = None,
) -> DataLoader[Any]:
    """Build the loader that takes the place of the user's.

    Args:
        loader: A loader that passed :func:`checked_loader`.
        collates: For each encoder that is not cached, its collate function.
        reader: Takes a sample apart.
        columns: What is cached of the loader's dataset; None where nothing is.
        gather: Replaces row numbers by rows, in this process; None where nothing is cached.
        plain: Gives the collate functions of all encoders, for when the cache steps aside.
        meeting: Given if samples may lack rows.
        views: The dataset in views, and which of them an epoch has; None: it gives the same items each time.

    Returns:
        A loader of :class:`~quatcache.data.Batch`. Where encoders and labels are all cached it has no workers.
    """
    settings: dict[str, Any] = {"generator": loader.generator}
    from_memory = columns is not None and meeting is None and columns.targets is not None and not collates
    workers = _worker_settings(loader)
    if not from_memory:
        settings.update(workers)
    if isinstance(loader.dataset, IterableDataset):
        settings.update(batch_size=loader.batch_size, drop_last=loader.drop_last)
        if gather is None or meeting is None or plain is None:
            return DataLoader(loader.dataset, collate_fn=CollateSamples(collates, reader), **settings)
        stream_aside = StreamAside(plain, reader, dict(settings))
        collate = StreamCollate(collates, meeting.chunks)
        return StreamLoader(loader.dataset, gather=gather, aside=stream_aside, collate_fn=collate, **settings)
    batches = loader.batch_sampler
    if type(batches) is BatchSampler:
        # in parts: Lightning puts a distributed sampler in place of the sampler, and would forget the size of batches
        settings.update(sampler=batches.sampler, batch_size=batches.batch_size, drop_last=batches.drop_last)
    else:
        settings["batch_sampler"] = batches
    view = BatchReader(loader.dataset if views is None else views[0], collates, reader, columns)
    if gather is None or plain is None:
        return DataLoader(view, collate_fn=as_it_is, **settings)
    aside = Aside(lambda: BatchReader(loader.dataset, plain(), reader), workers)
    source: Any = view if meeting is None else MeetingReader(view, meeting.chunks)
    if views is not None:
        source = ViewReader(source, views[1])
    if from_memory:
        return MemoryLoader(source, gather=gather, aside=aside, **_draws(loader), **settings)
    if meeting is None:
        return GatheringLoader(source, gather=gather, aside=aside, collate_fn=as_it_is, **settings)
    own: Any = {"columns": meeting.columns, "draws": _draws(loader)}
    return MeetingLoader(source, gather=gather, aside=aside, **own, collate_fn=as_it_is, **settings)


def _draws(loader: DataLoader[Any]) -> dict[str, Any]:
    """Say when the workers of a loader draw and pull, for a loader without workers that does it at the same moments."""
    ahead = (loader.prefetch_factor or 0) * loader.num_workers
    return {"ahead": ahead, "seeds_once": loader.persistent_workers}


def _worker_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    names = [
        "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
        "persistent_workers", "pin_memory_device", "in_order",
    ]  # fmt: skip
    return {name: getattr(loader, name) for name in names if hasattr(loader, name)}


def replace_rows(batch: Any, trainer: Trainer) -> None:
    """Put what encoders take in the place of the rows of a batch.

    Args:
        batch: What the combined loader gave, on the device of the trainer.
        trainer: Brings inputs where its model takes them.
    """
    for given in batches_in(batch):
        drawn: Drawn | None = given.inputs.pop(DRAWN, None)
        if drawn is not None:
            read = trainer.precision_plugin.convert_input(drawn.batch())
            given.inputs.update(trainer.strategy.batch_to_device(read).inputs)
