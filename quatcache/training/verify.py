"""Does an index table still describe a dataset, and does the dataset give the same items each time?

Nothing in a dataset says whether it changed. So some of its items are read and compared: at least :data:`SAMPLED` of
them, and as many more as half a second allows, which for texts in memory means all of them. Targets are compared too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from quatcache.data.samples import SampleColumns
from quatcache.errors import KeyTypeError
from quatcache.store import DatasetTable
from quatcache.training.keying import Chunk, ChunkReader
from quatcache.units import counted

__all__ = ["READ_TWICE", "SAMPLED", "matching_table", "reread"]

logger = logging.getLogger(__name__)

SAMPLED = 64
READ_TWICE = 8
SECONDS = 0.5


def matching_table(
    name: str,
    tables: Iterable[DatasetTable],
    reader: ChunkReader,
    with_targets: bool,
    *,
    seconds: float = SECONDS,
    time_func: Callable[[], float] = time.monotonic,
) -> DatasetTable | None:
    """Find the table of a dataset, or of the part of it that was there before it grew.

    Args:
        name: What the dataset is for, for the log.
        tables: Candidates.
        reader: The dataset.
        with_targets: Whether a table without targets is of no use.
        seconds: Time after which no more items are compared, once :data:`SAMPLED` were.
        time_func: Clock in seconds.

    Returns:
        A table of at most the dataset's length, whose compared items all agree; None if there is none.
    """
    size = len(reader)
    usable = [table for table in tables if len(table) and (table.targets is not None or not with_targets)]
    for table in sorted(usable, key=lambda table: (len(table) != size, len(table) > size, -len(table))):
        cut = table.head(size)
        compared = _agreeing(cut, reader, seconds, time_func)
        if compared:
            logger.debug(
                "The %s dataset is known: %s of its %s items were compared with its index table.",
                name, f"{compared:,}", f"{size:,}",
            )  # fmt: skip
            more = size - len(cut)
            if more:
                logger.info(
                    "The %s dataset is %s longer than when it was indexed: %s read.",
                    name, counted(more, "sample"), "this one is" if more == 1 else "these are",
                )  # fmt: skip
            return cut
    if usable:
        logger.info(
            "The %s dataset is none of those indexed here (new, edited, reordered or relabelled): its %s %s read to "
            "find their rows.",
            name, counted(size, "sample"), "is" if size == 1 else "are",
        )  # fmt: skip
    return None


def _agreeing(table: DatasetTable, reader: ChunkReader, seconds: float, time_func: Callable[[], float]) -> int:
    """Count the compared items; 0 as soon as one differs."""
    deadline = time_func() + seconds
    compared = 0
    for indices in _random_batches(len(table)):
        try:
            chunk = reader.__getitems__(indices)
        except KeyTypeError:
            return 0
        if not _agrees(table, chunk):
            return 0
        compared += len(indices)
        if time_func() >= deadline:
            break
    return compared


def _random_batches(size: int) -> Iterator[list[int]]:
    """Give distinct indices in random order, the first batch with both ends.

    Another order at each call: what one sample misses, the next one may find.
    """
    generator = np.random.default_rng()  # of its own: training draws from the global one
    if size <= 1 << 16:
        order = generator.permutation(size)
    else:
        order = np.sort(generator.integers(0, size, 1 << 16))
        order = order[np.diff(order, prepend=-1) > 0]  # np.unique takes several times as long
    ends = np.array(sorted({0, size - 1}))
    generator.shuffle(order)
    order = np.concatenate([ends, order[(order != 0) & (order != size - 1)]])
    start, step = 0, SAMPLED
    while start < len(order):
        yield order[start : start + step].tolist()
        start, step = start + step, 1024


def _agrees(table: DatasetTable, chunk: Chunk) -> bool:
    if chunk.layout != table.layout:
        return False
    places = np.asarray(chunk.indices)
    for name, keys in chunk.keys.items():
        if name not in table.keys or not np.array_equal(table.keys[name][places], keys):
            return False
    if table.targets is None:
        return True
    if len(table.targets) != len(chunk.targets):
        return False
    where = torch.from_numpy(places)
    for known, column in zip(table.targets, chunk.targets, strict=True):
        if not isinstance(column, torch.Tensor) or column.dtype != known.dtype:
            return False
        if not torch.equal(known[where], column):
            return False
    return True


def reread(
    reader: ChunkReader,
    among: npt.NDArray[np.int64] | None = None,
    *,
    seconds: float = SECONDS,
    time_func: Callable[[], float] = time.monotonic,
) -> tuple[int | None, int | None]:
    """Read some items twice: at least :data:`SAMPLED`, and as many more as the time allows.

    Args:
        reader: The dataset.
        among: Indices of the samples that are asked for, at least one: what was compared with an index table has been
            read twice. None: all.
        seconds: Time after which no more items are read.
        time_func: Clock in seconds.

    Returns:
        The index of an item whose keys differ between the two reads, and of one whose targets do; None: they agree.
    """
    deadline = time_func() + seconds
    target: int | None = None
    hashes_alone = all(scheme.content is None and scheme.extractor is None for scheme in reader.schemes)
    for places in _random_batches(len(reader) if among is None else len(among)):
        indices = places if among is None else among[places].tolist()
        once, again = reader.read(indices), reader.read(indices)
        if not (hashes_alone and _plainly_equal(once, again)):
            item, other = _differing(reader.keyed(once, indices), reader.keyed(again, indices))
            target = other if target is None else target
            if item is not None:
                return item, target
        if time_func() >= deadline:
            break
    return None, target


def _differing(first: Chunk, second: Chunk) -> tuple[int | None, int | None]:
    """Give the index of a sample whose keys differ between two reads of it, and of one whose targets do."""
    for name, keys in first.keys.items():
        differs = (keys != second.keys[name]).reshape(len(first.indices), -1).any(axis=1)
        if differs.any():
            return first.indices[int(np.flatnonzero(differs)[0])], None
    for column, again in zip(first.targets, second.targets, strict=True):
        if isinstance(column, torch.Tensor) and isinstance(again, torch.Tensor) and torch.equal(column, again):
            continue
        for index, one, other in zip(first.indices, column, again, strict=True):
            if not _same_target(one, other):
                return None, index
    return None, None


def _plainly_equal(once: SampleColumns, again: SampleColumns) -> bool:
    """Say whether two reads are equal at a glance: texts with plain targets, of which no key need be made to see it."""
    for samples in (once, again):
        if set(map(type, samples.items)) != {str}:
            return False
        if not {type(target) for column in samples.targets for target in column} <= {int, float, bool, str}:
            return False
    return once == again


def _same_target(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    try:
        return bool(np.array_equal(one, other))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return one == other
