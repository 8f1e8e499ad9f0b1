"""Making room in a cache directory: choose first, show it, then remove.

Runs may fill and read the directory meanwhile. So a store is emptied only under its two locks, and what was chosen is
looked at again under them: a store that was used since, or a shard that was committed since, stays. The manifest goes
first: whoever comes then finds no store rather than half of one, and whoever has shards open keeps them.

Only regular files whose names are of the format are ever deleted, and none behind a symbolic link. The directory of an
emptied store stays for an hour with its lock files, because another process may be waiting for them; the next pruning
takes it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from quatcache.errors import ConfigError, StoreError
from quatcache.store.disk import LAST_USED
from quatcache.store.files import FILL_LOCK, MANIFEST_LOCK, locked
from quatcache.store.inspection import inspect_store
from quatcache.store.manifest import MANIFEST_NAME
from quatcache.store.shards import is_shard_name
from quatcache.store.summaries import CacheSummary, StoreSummary, Stray, TableSummary
from quatcache.store.unfinished import is_temporary

__all__ = ["Outcome", "PrunePlan", "Removal", "choose", "is_young", "remove"]

LEFTOVER_SECONDS = 3600.0
"""Younger leftovers stay: they may be a file that is being written."""

_DAY = 86400.0
_BUSY = "another process fills it"
_CHANGED = "it changed since it was chosen"
_GONE = "it is gone already"
_WHY = {
    "orphan shard": "no manifest names it",
    "orphan note": "the rows of its encoder are gone",
    "temporary file": "left by a process that died",
    "empty store": "left of a store that was removed",
}


@dataclass(frozen=True)
class Removal:
    """One thing to remove.

    Attributes:
        path: A file, or the directory of a store.
        kind: "store", "index table", "orphan shard", "orphan note", "temporary file" or "empty store".
        reason: Why, for people.
        bytes: What it takes; of a store together with the leftovers in its directory.
        last_used: When it was last used or written, in seconds since 1970; if that changed, it stays.
    """

    path: Path
    kind: str
    reason: str
    bytes: int
    last_used: float


@dataclass(frozen=True)
class PrunePlan:
    """What would go, and what would be left.

    Attributes:
        path: The cache directory.
        removals: In the order in which they go.
        kept_bytes: What stays.
        notes: What cannot go though it is due, each in a sentence.
    """

    path: Path
    removals: tuple[Removal, ...]
    kept_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """What would be free again."""
        return sum(removal.bytes for removal in self.removals)


@dataclass(frozen=True)
class Outcome:
    """What became of one removal.

    Attributes:
        removal: What was to be removed.
        freed_bytes: What is free again.
        note: Why it, or a part of it, stayed; "" if nothing did.
        failed: Whether that is an error, and not the use that another process makes of it.
    """

    removal: Removal
    freed_bytes: int
    note: str = ""
    failed: bool = False


def is_young(stray: Stray, now: float) -> bool:
    """Say whether a leftover may be a file that is being written, and so stays.

    Args:
        stray: The leftover.
        now: Seconds since 1970.

    Example:
        >>> is_young(Stray(Path("cache/datasets/.tmp-0"), "temporary file", 10, 100.0), now=200.0)
        True
    """
    return now - stray.modified <= LEFTOVER_SECONDS


def choose(
    summary: CacheSummary, *, unused_days: float | None = None, max_bytes: int | None = None, now: float
) -> PrunePlan:
    """Choose what to remove; nothing is removed yet.

    Args:
        summary: What is there.
        unused_days: Stores and index tables go that no run used for so many days; None: none for that reason.
        max_bytes: Then the least recently used stores go, and after them index tables, until so many bytes are left;
            None: no budget.
        now: Seconds since 1970.

    Returns:
        What would go: orphans and temporary files older than an hour always do, and first.

    Raises:
        ConfigError: A limit is negative.

    Example:
        >>> choose(CacheSummary(Path("cache"), (), (), (), ()), unused_days=30, now=0.0)
        PrunePlan(path=..., removals=(), kept_bytes=0, notes=())
    """
    for name, limit in (("unused_days", unused_days), ("max_bytes", max_bytes)):
        if limit is not None and not limit >= 0:
            raise ConfigError(f"{name} is {limit}; give a number of at least 0.")
    notes: list[str] = []
    parts: list[StoreSummary | TableSummary] = [*summary.stores, *summary.tables]
    newer = {store.path for store in summary.stores if store.newer}
    old = [
        stray
        for stray in summary.strays
        if not is_young(stray, now) and stray.path.parent not in newer and not _is_linked(stray.path, summary.path)
    ]
    removals = [Removal(stray.path, stray.kind, _WHY[stray.kind], stray.bytes, stray.modified) for stray in old]
    beside: dict[Path, int] = {}  # bytes that go with a store and are not its own, by its directory
    for stray in summary.strays:
        if stray not in old:
            beside[stray.path.parent] = beside.get(stray.path.parent, 0) + stray.bytes
    kept: list[Removal] = []
    for part in parts:
        days = (now - part.last_used) / _DAY
        due = unused_days is not None and days > unused_days
        obstacle = _obstacle(part, summary.path)
        if obstacle is None:
            kind = "store" if isinstance(part, StoreSummary) else "index table"
            reason = f"unused for {days:.0f} days" if due else "over the budget"
            (removals if due else kept).append(Removal(part.path, kind, reason, part.bytes, part.last_used))
        elif due or max_bytes is not None:
            notes.append(f"{part.path.relative_to(summary.path)} {obstacle}, and is left alone.")
    left = summary.bytes - sum(removal.bytes + beside.get(removal.path, 0) for removal in removals)
    if max_bytes is not None:
        for removal in sorted(kept, key=lambda removal: (removal.kind != "store", removal.last_used)):
            if left > max_bytes:
                left -= removal.bytes + beside.get(removal.path, 0)
                removals.append(removal)
        if left > max_bytes:
            notes.append(f"{left:,} bytes would be left, more than the budget of {max_bytes:,}.")
    gone = {removal.path for removal in removals}
    for removal in [removal for removal in removals if removal.path.parent in gone]:  # of a store that goes: with it
        removals.remove(removal)
        beside[removal.path.parent] = beside.get(removal.path.parent, 0) + removal.bytes
    removals = [replace(removal, bytes=removal.bytes + beside.get(removal.path, 0)) for removal in removals]
    young = sum(is_young(stray, now) and stray.path.parent not in gone for stray in summary.strays)
    if young:
        notes.append(
            f"{young} {'leftover is' if young == 1 else 'leftovers are'} younger than an hour, so a process may still "
            f"use {'it' if young == 1 else 'them'}: left alone until then."
        )
    return PrunePlan(summary.path, tuple(removals), left, tuple(notes))


def _obstacle(part: StoreSummary | TableSummary, root: Path) -> str | None:
    if _is_linked(part.path, root):
        return "lies behind a symbolic link"
    if isinstance(part, StoreSummary) and part.newer:
        return "was written by a newer version"
    return None


def _is_linked(path: Path, root: Path) -> bool:
    """Whether the way from the cache directory to a path leads over a symbolic link; the former may be one itself."""
    below = path.relative_to(root)
    return any((root / part).is_symlink() for part in (below, *below.parents[:-1]))


def remove(plan: PrunePlan, advance: Callable[[Removal], object] = lambda removal: None) -> tuple[Outcome, ...]:
    """Remove what was chosen, where it is still as it was and no other process fills it.

    Args:
        plan: What :func:`choose` gave.
        advance: Told of each removal after it was tried.

    Returns:
        What became of each. What fails is told there, and the others go on.
    """
    outcomes = []
    for removal in plan.removals:
        try:
            if _is_linked(removal.path, plan.path):
                outcome = Outcome(removal, 0, _CHANGED)
            elif removal.kind == "store":
                outcome = _remove_store(removal)
            elif removal.kind == "empty store":
                outcome = _remove_shell(removal)
            elif plan.path / "encoders" in removal.path.parents:
                outcome = _remove_stray(removal)
            else:
                outcome = _remove_file(removal)
        except Timeout:
            outcome = Outcome(removal, 0, _BUSY)
        except FileNotFoundError:
            outcome = Outcome(removal, 0, _GONE)
        except OSError as error:  # a StoreError, if a lock cannot be had, is one too
            outcome = Outcome(removal, 0, f"cannot be removed: {error.strerror or error}", failed=True)
        outcomes.append(outcome)
        advance(removal)
    return tuple(outcomes)


def _remove_store(removal: Removal) -> Outcome:
    home = removal.path
    with _alone(home) as (store, _):
        if store is None or store.newer or store.last_used > removal.last_used:
            return Outcome(removal, 0, _GONE if store is None else _CHANGED)
        manifest = home / MANIFEST_NAME
        freed = _delete(manifest) if os.path.lexists(manifest) else 0
        stayed: list[str] = []
        for path in sorted(home.iterdir()):  # nobody writes here now, so a temporary file was left behind
            if is_shard_name(path.name) or is_temporary(path.name) or path.name == LAST_USED:
                try:
                    freed += _delete(path)
                except OSError:  # Windows keeps what is mapped; and a link is not deleted
                    stayed.append(path.name)
    note = f"{len(stayed)} of its files cannot be deleted, {stayed[0]} for one" if stayed else ""
    return Outcome(removal, freed, note, failed=bool(stayed))


def _remove_shell(removal: Removal) -> Outcome:
    """Take away what a store leaves: its directory and lock files."""
    home = removal.path
    with _alone(home) as (_, strays):
        if strays != [home]:
            return Outcome(removal, 0, _CHANGED)
    for name in (LAST_USED, MANIFEST_LOCK, FILL_LOCK):  # Windows does not delete what is locked
        with suppress(FileNotFoundError):
            _delete(home / name)
    home.rmdir()  # fails if another process wrote something since
    return Outcome(removal, 0)


def _remove_stray(removal: Removal) -> Outcome:
    """Delete one file of a store, if it still is a stray."""
    with _alone(removal.path.parent) as (_, strays):
        if removal.path not in strays:
            return Outcome(removal, 0, _GONE if not os.path.lexists(removal.path) else _CHANGED)
        return _remove_file(removal)


def _remove_file(removal: Removal) -> Outcome:
    if removal.path.lstat().st_mtime > removal.last_used:
        return Outcome(removal, 0, _CHANGED)
    return Outcome(removal, _delete(removal.path))


@contextmanager
def _alone(home: Path) -> Iterator[tuple[StoreSummary | None, list[Path]]]:
    """Hold both locks of a store; give the store and its leftovers as they are then.

    Raises:
        Timeout: Another process fills it.
    """
    for name in (FILL_LOCK, MANIFEST_LOCK):
        if (home / name).is_symlink():  # opening it might make or empty a file somewhere else
            raise StoreError(f"{name} is a symbolic link")
    with FileLock(home / FILL_LOCK).acquire(timeout=0), locked(home / MANIFEST_LOCK):
        store, strays, _ = inspect_store(home)
        yield store, [stray.path for stray in strays]


def _delete(path: Path) -> int:
    """Delete a regular file, and give its size."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path.name} is no regular file")
    path.unlink()
    return status.st_size
