"""What is known of a cache directory without reading its rows: stores, index tables, and what nothing refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quatcache.errors import ConfigError
from quatcache.store.manifest import Manifest
from quatcache.store.tables import DatasetTable

__all__ = ["CacheSummary", "Finding", "StoreSummary", "Stray", "TableSummary", "find_store", "find_table"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written.

    Attributes:
        path: The file.
        reason: What is wrong with it.
        remedy: What to do, or what a run will do by itself.
    """

    path: Path
    reason: str
    remedy: str


@dataclass(frozen=True)
class Stray:
    """A file of the format that nothing refers to any more.

    Attributes:
        path: The file; for an "empty store" its directory.
        kind: "orphan shard", "orphan note", "temporary file" or "empty store".
        bytes: Its size.
        modified: When it was written, in seconds since 1970.
    """

    path: Path
    kind: str
    bytes: int
    modified: float


@dataclass(frozen=True)
class StoreSummary:
    """The rows of one encoder identity in one storage dtype.

    Attributes:
        path: Its directory.
        manifest: What it says of itself; None if that cannot be read.
        problem: Why not; None if it can.
        newer: Whether a newer version of the format wrote it.
        shards: How many shards belong to it.
        bytes: Bytes of its files, strays and locks not counted.
        last_used: When a run last opened or wrote it, in seconds since 1970.
    """

    path: Path
    manifest: Manifest | None
    problem: Finding | None
    newer: bool
    shards: int
    bytes: int
    last_used: float

    @property
    def digest(self) -> str:
        """Identity of the encoder, 32 hex characters, as the directory is named."""
        return self.path.name[:32]

    @property
    def stored(self) -> str:
        """Name of the storage dtype: that of the rows, else the one in the directory's name, else ""."""
        if self.manifest is None or self.manifest.dtype is None:
            return self.path.name[33:]
        return str(self.manifest.dtype).removeprefix("torch.")

    @property
    def rows(self) -> int:
        """Rows that are committed; 0 while the manifest cannot be read."""
        return 0 if self.manifest is None else self.manifest.rows


@dataclass(frozen=True)
class TableSummary:
    """The index table of one dataset.

    Attributes:
        path: Its file.
        table: Keys and targets, mapped into memory; None if it is damaged.
        problem: Why it cannot be used; None if it can.
        bytes: Its size.
        last_used: When a run last used it, in seconds since 1970.
    """

    path: Path
    table: DatasetTable | None
    problem: Finding | None
    bytes: int
    last_used: float


@dataclass(frozen=True)
class CacheSummary:
    """Everything below one ``save_dir``.

    Attributes:
        path: The directory.
        stores: Oldest first.
        tables: Oldest use first.
        strays: What nothing refers to.
        foreign: Entries in the directories of the cache whose names are not of the format; they are left alone.
    """

    path: Path
    stores: tuple[StoreSummary, ...]
    tables: tuple[TableSummary, ...]
    strays: tuple[Stray, ...]
    foreign: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files of the format."""
        rows = sum(store.bytes for store in self.stores)
        return rows + sum(table.bytes for table in self.tables) + sum(stray.bytes for stray in self.strays)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What cannot be read, of what inspecting looks at."""
        problems = *(part.problem for part in self.stores), *(part.problem for part in self.tables)
        return tuple(problem for problem in problems if problem is not None)


_Part = TypeVar("_Part", StoreSummary, TableSummary)


def find_store(summary: CacheSummary, digest: str) -> StoreSummary:
    """Find a store by the beginning of its digest; ``-<dtype>`` behind it chooses among storage dtypes.

    Args:
        summary: The cache.
        digest: Such as "3f2a", "3f2a-float16", or a whole name.

    Raises:
        ConfigError: None or several stores are meant.
    """
    head, _, dtype = digest.partition("-")
    exact = [store for store in summary.stores if store.path.name == digest]
    found = [store for store in summary.stores if store.path.name.startswith(head) and dtype in {"", store.stored}]
    return _only(exact or found, digest, "store", [store.path.name for store in summary.stores])


def find_table(summary: CacheSummary, digest: str) -> TableSummary:
    """Find an index table by the beginning of its digest.

    Args:
        summary: The cache.
        digest: Such as "3f2a".

    Raises:
        ConfigError: None or several tables are meant.
    """
    found = [table for table in summary.tables if table.path.stem.startswith(digest)]
    return _only(found, digest, "dataset", [table.path.stem for table in summary.tables])


def _only(found: Sequence[_Part], digest: str, what: str, known: Sequence[str]) -> _Part:
    if len(found) == 1:
        return found[0]
    if not known:
        raise ConfigError(f"{digest!r} names a {what}, and there is none; see what quatcache cache inspect lists.")
    which = f"the beginning of {len(found)} names" if found else f"the beginning of no {what}'s name"
    shown = ", ".join((found and [part.path.stem for part in found]) or known[:8])
    raise ConfigError(f"{digest!r} is {which}; name one of {shown}.")
