"""How much main memory may still be taken: what the machine has free, or what the limits of a container leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from quatcache.errors import ConfigError
from quatcache.store import TensorStore

__all__ = ["RESERVE", "free_memory", "refuse_to_swap"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")

RESERVE = 256 << 20
"""Bytes that a fill leaves free in main memory: below them a machine begins to swap."""


def free_memory(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Count the bytes that may be taken without swapping.

    A container or a batch system limits its processes by control groups, which what the machine reports as free does
    not know of; the page cache that a group can give back counts as free.

    Args:
        cgroups: Where control groups are mounted; a place without any has no limits.
        own: Names the groups of this process.

    Example:
        >>> free_memory() > 0
        True
    """
    return min([int(psutil.virtual_memory().available), *_left_in_groups(cgroups, own)])


def _left_in_groups(cgroups: Path, own: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            unified = not controllers
            if not unified and "memory" not in controllers.split(","):
                continue
            root = cgroups if unified else cgroups / "memory"
            group = root / path.lstrip("/")
            for place in (group, *group.parents):
                yield from _left_in(place, unified)
                if place == root:
                    break


def _left_in(group: Path, unified: bool) -> Iterator[int]:
    limit, used, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if unified
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    with suppress(OSError, ValueError):  # no such group, or "max": no limit
        most, taken = int((group / limit).read_text()), int((group / used).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(0, most - taken + int(statistics.get(cached, 0)))


def refuse_to_swap(name: str, store: TensorStore) -> None:
    """Stop a fill in memory before the machine swaps.

    Args:
        name: The encoder, for the message.
        store: Where its rows go.

    Raises:
        ConfigError: Less than :data:`RESERVE` bytes are free.
    """
    free = free_memory()
    if store.device.type == "cpu" and free < RESERVE:
        raise ConfigError(
            f"encoder {name!r} has {len(store):,} rows ({store.nbytes >> 20:,} MiB) in memory and {free >> 20:,} MiB "
            "are left free; set save_dir, so that its rows go to disk, or dtype='float16'."
        )
