"""The loading of a dataset in keyed chunks, by worker processes if there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from quatcache.data.batches import as_it_is
from quatcache.errors import ConfigError
from quatcache.training.keying import Chunk, ChunkReader

__all__ = ["load_chunks"]


def load_chunks(
    reader: ChunkReader,
    batches: Iterable[Sequence[int] | npt.NDArray[np.int64]],
    num_workers: int,
    context: Any,
    name: str,
) -> Iterator[Chunk]:
    """Read samples of a dataset; the workers, if there are any, are started at once.

    Args:
        reader: Reads and keys them.
        batches: The indices of each chunk.
        num_workers: Processes that read; 0: this one.
        context: How they are started.
        name: What the dataset is for, for messages.

    Returns:
        The chunks, in the order of their indices.

    Raises:
        ConfigError: What the workers need cannot be sent to them.
    """
    loader = DataLoader(
        reader,
        batch_sampler=_Lists(batches),
        num_workers=num_workers,
        collate_fn=as_it_is,
        worker_init_fn=_share_by_name,
        multiprocessing_context=context if num_workers else None,
    )
    try:
        return iter(loader)
    except Exception as error:
        if not num_workers or "pickle" not in str(error):
            raise
        raise ConfigError(
            f"the {name} dataset, an encoder or a key extractor cannot be sent to the workers of the fill "
            f"({error}); define it at the top of a module, or leave num_workers unset."
        ) from error


class _Lists(Sampler[list[int]]):
    """Yields chunks of indices as lists of Python ints."""

    def __init__(self, batches: Iterable[Sequence[int] | npt.NDArray[np.int64]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (np.asarray(batch).tolist() for batch in self._batches)


def _share_by_name(worker: int) -> None:
    """Send tensors of a chunk by name: by descriptor, 512 items would use up the descriptors of a process."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
