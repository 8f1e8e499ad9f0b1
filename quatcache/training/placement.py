"""Where rows are kept while a model trains: GPU, main memory, or the memory map of their files."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quatcache.errors import ConfigError
from quatcache.store import DiskStore, RowStore, TensorStore
from quatcache.training.config import CacheType
from quatcache.training.memory import RESERVE, free_memory
from quatcache.units import readable_size

__all__ = ["Placement", "pick_tier", "place_rows", "where_rows_come"]

SHARE_OF_FREE_MEMORY = 0.5
"""AUTO takes a tier only if the rows fit into this share of what is free there: training needs the rest."""


class Placement(NamedTuple):
    """Rows where training wants them.

    Attributes:
        store: The store to train from, with the row numbers of the filled one.
        tier: Where it is.
        reason: Why AUTO took that tier; empty where the user named it.
    """

    store: RowStore
    tier: CacheType
    reason: str


def place_rows(
    name: str, store: RowStore, asked: CacheType, device: torch.device, *, memory_map: bool = True, ranks: int = 1
) -> Placement:
    """Bring the rows of one encoder to the tier that was asked for.

    Args:
        name: The encoder, for messages.
        store: The filled store.
        asked: A tier; AUTO picks the fastest that has room.
        device: The device that trains.
        memory_map: Whether files may be mapped: without, AUTO has no tier DISK.
        ranks: Processes on this machine that place the same rows, each for a device of its own.

    Raises:
        ConfigError: Tier DISK for rows that are only in memory, or a tier without room for the rows.
    """
    tier, reason = asked, ""
    if asked is CacheType.AUTO:
        tier, reason = pick_tier(store.nbytes, device, disk=isinstance(store, DiskStore) and memory_map, ranks=ranks)
    if tier is CacheType.GPU:
        target = device if device.type == "cuda" else torch.device("cuda")
        if asked is CacheType.GPU:
            _require(name, store, tier, torch.cuda.mem_get_info(target)[0])
        return Placement(_in_memory(store, target), tier, reason)
    if tier is CacheType.DISK:
        if not isinstance(store, DiskStore):
            raise ConfigError(
                f"tier DISK was asked for encoder {name!r}, whose items have no content key and so no rows on disk; "
                "give key_extractors a function for it, or use tier CPU."
            )
        return Placement(store, tier, reason)
    if asked is CacheType.CPU and isinstance(store, DiskStore) and memory_map:  # else they are in memory already
        _require(name, store, tier, free_memory() // ranks - RESERVE)
    return Placement(_in_memory(store, torch.device("cpu")), tier, reason)


def where_rows_come(store: RowStore) -> Placement:
    """Leave rows where they are put, as long as more of them come while a model trains."""
    return Placement(store, CacheType.DISK if isinstance(store, DiskStore) else CacheType.CPU, "")


def pick_tier(nbytes: int, device: torch.device, *, disk: bool, ranks: int = 1) -> tuple[CacheType, str]:
    """Pick the fastest tier with room.

    Args:
        nbytes: Size of the rows.
        device: The device that trains.
        disk: Whether the rows can be trained from their files.
        ranks: Processes that share the main memory of this machine, each with a copy of the rows.

    Returns:
        The tier, and why, for people.

    Example:
        >>> tier, reason = pick_tier(1000, torch.device("cpu"), disk=True)
        >>> tier.name, reason.partition(" of ")[0]
        ('CPU', '1.0 kB')
    """
    size, why = readable_size(nbytes), ""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if nbytes <= SHARE_OF_FREE_MEMORY * free:
            return CacheType.GPU, f"{size} of {readable_size(free)} free on the GPU"
        why = f"{size} is too much of the {readable_size(free)} free on the GPU, "
    free = free_memory() // ranks
    if nbytes <= SHARE_OF_FREE_MEMORY * free:
        return CacheType.CPU, f"{why}{size} of {readable_size(free)} free in main memory"
    too_much = f"{why}{size} is too much of the {readable_size(free)} free in main memory"
    if not disk:
        return CacheType.CPU, f"{too_much}, but the rows are nowhere else"
    return CacheType.DISK, too_much


def _require(name: str, store: RowStore, tier: CacheType, free: int) -> None:
    if store.nbytes > free:
        raise ConfigError(
            f"tier {tier.name} was asked for encoder {name!r}, whose rows take {readable_size(store.nbytes)} of the "
            f"{readable_size(max(free, 0))} that may be taken there; use DISK or AUTO, or dtype='float16'."
        )


def _in_memory(store: RowStore, device: torch.device) -> RowStore:
    if isinstance(store, DiskStore):
        return store.load(device)
    assert isinstance(store, TensorStore)
    return store if store.device == device else store.to(device)
