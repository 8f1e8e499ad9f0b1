"""Where rows are kept while a model trains: GPU, main memory, or the memory map of their files."""

from __future__ import annotations

import psutil
import torch

from quatcache.errors import ConfigError
from quatcache.store import DiskStore, RowStore, TensorStore
from quatcache.training.config import CacheType

__all__ = ["place_rows"]

SHARE_OF_FREE_MEMORY = 0.5
"""AUTO takes a tier only if the rows fit into this share of what is free there: training needs the rest."""


def place_rows(
    name: str, store: RowStore, asked: CacheType, device: torch.device, nbytes: int | None = None
) -> tuple[RowStore, CacheType]:
    """Bring the rows of one encoder to the tier that was asked for.

    Args:
        name: The encoder, for messages.
        store: The filled store.
        asked: A tier; AUTO picks the fastest that has room.
        device: The device that trains.
        nbytes: Size of the rows once placed; None: as stored.

    Returns:
        The store to train from, with the row numbers of the filled one, and the tier it is on.

    Raises:
        ConfigError: Tier DISK for rows that are only in memory.
    """
    size = store.nbytes if nbytes is None else nbytes
    tier = _pick(store, size, device) if asked is CacheType.AUTO else asked
    if tier is CacheType.GPU:
        target = device if device.type == "cuda" else torch.device("cuda")
        return _in_memory(store, target), tier
    if tier is CacheType.DISK:
        if not isinstance(store, DiskStore):
            raise ConfigError(
                f"tier DISK was asked for encoder {name!r}, whose items have no content key and so no rows on disk; "
                "give key_extractors a function for it, or use tier CPU."
            )
        return store, tier
    return _in_memory(store, torch.device("cpu")), tier


def _in_memory(store: RowStore, device: torch.device) -> RowStore:
    if isinstance(store, DiskStore):
        return store.load(device)
    assert isinstance(store, TensorStore)
    return store if store.device == device else store.to(device)


def _pick(store: RowStore, size: int, device: torch.device) -> CacheType:
    if device.type == "cuda" and size <= SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return CacheType.GPU
    fits = size <= SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available
    return CacheType.CPU if fits or not isinstance(store, DiskStore) else CacheType.DISK
