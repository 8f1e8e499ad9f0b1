"""What a cache directory holds, and whether it is whole: for people who look after one.

Nothing here opens a store as training does. That would mend a manifest and note that the rows were of use; looking must
change nothing, and must work where nothing may be written.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quatcache.errors import DamagedFileError, FormatError, StoreError
from quatcache.store.directory import CacheDirectory
from quatcache.store.disk import LAST_USED
from quatcache.store.files import FILL_LOCK, MANIFEST_LOCK
from quatcache.store.known import MODELS, is_note_name, read_note
from quatcache.store.manifest import MANIFEST_NAME, Manifest
from quatcache.store.shards import ShardEntry, is_shard_name, judge_alone, open_shard
from quatcache.store.summaries import CacheSummary, Finding, StoreSummary, Stray, TableSummary
from quatcache.store.tables import is_table_name, read_table
from quatcache.store.unfinished import is_temporary

__all__ = ["Check", "check_cache", "inspect_cache", "inspect_store"]

_STORE_NAME = re.compile(r"[0-9a-f]{32}(-[a-z0-9]{1,16})?")
_OWN_NAMES = (MANIFEST_NAME, MANIFEST_LOCK, FILL_LOCK, LAST_USED)

_COMMIT_SECONDS = 60
"""Between the first shard of a store and its manifest another process may take so long: such a store is not lost."""

_MADE_AGAIN = "no whole shard is lost: it is made again from them when a run uses the cache"
_ENCODED_AGAIN = "the next run leaves it out and encodes its rows again"
_READ_AGAIN = "the next run reads the dataset again; rows stay"
_RENAMED = "give the directory its name back, or delete it"
_UPGRADE = "upgrade quatcache, or use another save_dir"
_PERMIT = "permit reading it"


@dataclass(frozen=True)
class Check:
    """What comparing every file with its checksum showed.

    Attributes:
        findings: What is damaged, missing or unreadable.
        files: How many files were read.
        bytes: How many bytes were read.
    """

    findings: tuple[Finding, ...]
    files: int
    bytes: int


def inspect_cache(directory: CacheDirectory | str | os.PathLike[str]) -> CacheSummary:
    """List what a cache directory holds; rows are not read, nothing is changed.

    Args:
        directory: A ``save_dir``.

    Returns:
        Its stores, index tables and leftovers. What is damaged is listed with its problem.

    Raises:
        StoreError: It is not a cache, or cannot be read.

    Example:
        >>> import tempfile, torch
        >>> from quatcache.keys import content_keys
        >>> cache = CacheDirectory(tempfile.mkdtemp())
        >>> store = cache.store("0" * 32, {"class": "Table"})
        >>> store.put_many(content_keys(["a", "b"]), torch.ones(2, 3))
        >>> store.flush()
        >>> [(found.rows, found.manifest.row_shape) for found in inspect_cache(cache).stores]
        [(2, (3,))]
    """
    path = directory.path if isinstance(directory, CacheDirectory) else Path(directory).expanduser().absolute()
    if not path.is_dir():
        raise StoreError(f"{path} is not a directory; pass the save_dir of a CacheConfig.")
    strays: list[Stray] = []
    foreign: list[Path] = []
    stores: list[StoreSummary] = []
    tables: list[TableSummary] = []
    homes, others = _split(path / "encoders", lambda entry: bool(_STORE_NAME.fullmatch(entry.name)) and entry.is_dir())
    foreign += others
    for home in homes:
        store, its_strays, its_foreign = inspect_store(home)
        stores += [] if store is None else [store]
        strays += its_strays
        foreign += its_foreign
    files, others = _split(path / "datasets", lambda entry: is_table_name(entry.name) or is_temporary(entry.name))
    foreign += others
    for file in files:
        if is_table_name(file.name):
            tables += _table(file)
        else:
            strays += _stray(file, "temporary file")
    notes, others = _split(path / MODELS, lambda entry: is_note_name(entry.name) or is_temporary(entry.name))
    foreign += others
    for file in notes:
        if is_temporary(file.name):
            strays += _stray(file, "temporary file")
        elif not _is_of_use(file, homes):
            strays += _stray(file, "orphan note")
    if not homes and not files:
        raise StoreError(
            f"{path} is not a cache: it has neither encoders/<digest> nor datasets/<digest>.safetensors; pass the "
            "save_dir of a CacheConfig."
        )
    stores.sort(key=_age_order)
    tables.sort(key=lambda table: (table.last_used, table.path.name))
    return CacheSummary(path, tuple(stores), tuple(tables), tuple(strays), tuple(foreign))


def _is_of_use(note: Path, homes: Iterable[Path]) -> bool:
    """Whether a note names an encoder that has rows here."""
    status = _status(note)
    known = read_note(note) if status is not None and stat.S_ISREG(status.st_mode) else None
    return known is not None and any(home.name[:32] == known["digest"] for home in homes)


def _age_order(store: StoreSummary) -> tuple[str, float]:
    status = _status(store.path / MANIFEST_NAME)  # tells apart what was created within a second
    return store.manifest.created if store.manifest else "", status.st_mtime if status else 0.0


def inspect_store(home: Path) -> tuple[StoreSummary | None, list[Stray], list[Path]]:
    """Look at one store directory.

    Args:
        home: ``encoders/<digest>[-<dtype>]``.

    Returns:
        The store, None if nothing is left of it or another process is about to commit its first rows; its leftovers;
        and what else lies there.

    Raises:
        StoreError: The directory cannot be listed.
    """
    names = {path.name: path for path in _entries(home)}  # before the manifest: a commit in between is no orphan
    manifest, problem, newer = _manifest(home, names)
    foreign = [path for name, path in names.items() if not _is_own(name)]
    strays = [stray for name, path in names.items() if is_temporary(name) for stray in _stray(path, "temporary file")]
    shards = {name for name in names if is_shard_name(name)}
    if manifest is not None:
        named = {entry.file for entry in manifest.shards}
        strays += [stray for name in sorted(shards - named) for stray in _stray(names[name], "orphan shard")]
        shards = named  # what is missing counts: verifying says so
    elif problem is None:
        return None, strays if shards or strays or foreign else [*_stray(home, "empty store")], foreign
    statuses = {name: _status(home / name) for name in (*shards, MANIFEST_NAME, LAST_USED)}  # locks outlive a store
    used = [status.st_mtime for name in (MANIFEST_NAME, LAST_USED) if (status := statuses[name]) is not None]
    store = StoreSummary(
        home,
        manifest,
        problem,
        newer,
        len(shards),
        sum(status.st_size for status in statuses.values() if status is not None and stat.S_ISREG(status.st_mode)),
        max(used) if used else home.stat().st_mtime,
    )
    return store, strays, foreign


def _manifest(home: Path, names: Iterable[str]) -> tuple[Manifest | None, Finding | None, bool]:
    path = home / MANIFEST_NAME
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise DamagedFileError(f"{path} is not a regular file")
        manifest = Manifest.read(home)
    except DamagedFileError as error:
        return None, _finding(path, error, _MADE_AGAIN), False
    except FormatError as error:
        return None, _finding(path, error, _UPGRADE), True
    except StoreError as error:
        return None, _finding(path, error, _PERMIT), False
    if manifest is None:
        statuses = [_status(home / name) for name in names if is_shard_name(name)]
        now = time.time()
        lost = any(status is not None and abs(now - status.st_mtime) > _COMMIT_SECONDS for status in statuses)
        return None, Finding(path, "is missing, though there are shards", _MADE_AGAIN) if lost else None, False
    if manifest.digest != home.name[:32]:
        reason = f"belongs to encoder {manifest.digest}, not to the one that its directory is named for"
        return manifest, Finding(path, reason, "delete the directory, or give it back its name"), False
    named = f"torch.{home.name[33:]}" if home.name[33:] else str(manifest.given_dtype)
    if manifest.dtype is not None and manifest.dtype.is_floating_point and str(manifest.dtype) != named:
        reason = f"counts rows stored as {manifest.dtype}, which do not belong into a directory of this name"
        return manifest, Finding(path, reason, "delete the directory, or give it back its name"), False
    return manifest, None, False


def _table(path: Path) -> Iterator[TableSummary]:
    status = _status(path)
    if status is None:  # deleted meanwhile, or a link to nowhere
        return
    table, problem = None, None
    try:
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file")
        table = read_table(path)
    except FormatError as error:
        problem = _finding(path, error, _READ_AGAIN)
    except StoreError as error:
        problem = _finding(path, error, _PERMIT)
    yield TableSummary(path, table, problem, status.st_size, status.st_mtime)


def _finding(path: Path, error: Exception, remedy: str) -> Finding:
    """Turn an error into a finding: its sentence without the path before it and the remedy behind it."""
    sentence = str(error).removeprefix(str(path)).strip().rstrip(".")
    return Finding(path, sentence.rpartition("; ")[0] or sentence, remedy)


def _stray(path: Path, kind: str) -> Iterator[Stray]:
    with suppress(FileNotFoundError):  # renamed or deleted meanwhile
        status = path.lstat()
        yield Stray(path, kind, status.st_size if stat.S_ISREG(status.st_mode) else 0, status.st_mtime)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot read {directory}: {error.strerror or error}; permit reading it.") from error


def _split(directory: Path, own: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    entries = _entries(directory)
    return [entry for entry in entries if own(entry)], [entry for entry in entries if not own(entry)]


def _is_own(name: str) -> bool:
    return name in _OWN_NAMES or is_shard_name(name) or is_temporary(name)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def check_cache(summary: CacheSummary, advance: Callable[[int], object] = lambda done: None) -> Check:
    """Read every byte of a cache, and compare it with its checksum; nothing is changed.

    Args:
        summary: What is there.
        advance: Told after each file how many bytes it has; together about ``summary.bytes``.

    Returns:
        What is not as it was written. Shards that another process commits or packs meanwhile are taken as they come.

    Raises:
        StoreError: A directory cannot be listed.

    Example:
        >>> import tempfile, torch
        >>> from quatcache.keys import content_keys
        >>> cache = CacheDirectory(tempfile.mkdtemp())
        >>> store = cache.store("0" * 32, {})
        >>> store.put_many(content_keys(["a"]), torch.ones(1, 3))
        >>> store.flush()
        >>> check_cache(inspect_cache(cache))
        Check(findings=(), files=2, bytes=...)
    """
    findings: list[Finding] = []
    sizes: list[int] = []

    def done(size: int) -> None:
        sizes.append(size)
        advance(size)

    for table in summary.tables:  # read whole already, to be listed at all
        findings += [] if table.problem is None else [table.problem]
        done(table.bytes)
    for store in summary.stores:
        findings += [] if store.problem is None else [store.problem]
        if store.manifest is not None:
            findings += _damaged_shards(store.path, done)
        elif not store.newer:
            findings += _damaged_strangers(store, done)
        status = _status(store.path / MANIFEST_NAME)
        if status is not None:
            done(status.st_size)
    return Check(tuple(findings), len(sizes), sum(sizes))


def _damaged_shards(home: Path, done: Callable[[int], None]) -> list[Finding]:
    """Compare the shards of a manifest with it, until it names none that was not compared."""
    checked: dict[ShardEntry, Finding | None] = {}
    while True:
        try:
            manifest = Manifest.read(home)
        except (FormatError, StoreError):  # not so a moment ago: the next check tells
            return []
        entries = () if manifest is None else manifest.shards
        fresh = [entry for entry in entries if entry not in checked]
        if not fresh or manifest is None:
            return [found for entry, found in checked.items() if found is not None and entry in entries]
        for entry in fresh:
            checked[entry] = _damage(home, entry, manifest)
            done(entry.bytes)


def _damage(home: Path, entry: ShardEntry, manifest: Manifest) -> Finding | None:
    kind = manifest.kind
    assert kind is not None  # a manifest with shards names it
    return _judged(home / entry.file, lambda: open_shard(home, entry, manifest.digest, kind))


def _damaged_strangers(store: StoreSummary, done: Callable[[int], None]) -> Iterator[Finding]:
    """Judge the shards of a store without a manifest, each by the digest that it carries."""
    for path in _entries(store.path):
        if is_shard_name(path.name):
            found = _judged(path, partial(judge_alone, path, store.digest))
            status = _status(path)
            done(0 if status is None else status.st_size)
            yield from () if found is None else (found,)


def _judged(path: Path, judge: Callable[[], object]) -> Finding | None:
    try:
        if path.exists() and not path.is_file():
            raise FormatError(f"{path} is not a regular file")
        judge()
    except FormatError as error:
        return _finding(path, error, _ENCODED_AGAIN)
    except StoreError as error:
        return _finding(path, error, _PERMIT)
    return None
