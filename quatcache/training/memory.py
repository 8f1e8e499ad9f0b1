"""How much main memory may still be taken: what the machine has free, or what the limits of a container leave."""

from __future__ import annotations

import sys
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
    not know of; the page cache that a group can give back counts as free. Above ``memory.high`` a group is not ended,
    but slowed and swapped, so that it counts as a limit like ``memory.max``.

    Args:
        cgroups: Where control groups are mounted; a place without any has no limits.
        own: Names the groups of this process.

    Returns:
        Bytes; ``sys.maxsize`` where neither the machine nor a group says anything, so that nothing is refused.

    Example:
        >>> free_memory() > 0
        True
    """
    return min([*_left_on_machine(), *_left_in_groups(cgroups, own)], default=sys.maxsize)


def _left_on_machine() -> Iterator[int]:
    with suppress(OSError, RuntimeError):  # no /proc in a sandbox, or a system that psutil does not know
        yield int(psutil.virtual_memory().available)


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
    names = ("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(group / name)) is not None]
    if limits:
        used = _number(group / ("memory.current" if unified else "memory.usage_in_bytes")) or 0
        yield max(0, min(limits) - used + min(used, _page_cache(group / "memory.stat", "" if unified else "total_")))


def _number(path: Path) -> int | None:
    """Read a number of bytes; None: there is no such file, or it says "max", which is no limit."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _page_cache(statistics: Path, prefix: str) -> int:
    """Count the bytes of files that a group holds in memory and can give back; 0 where nothing can be read."""
    found = 0
    with suppress(OSError, ValueError):
        for line in statistics.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                found += int(value)
    return max(0, found)


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
