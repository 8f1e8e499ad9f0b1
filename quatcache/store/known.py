"""What earlier runs found out about models, so that the next one need not load them to know whose rows it needs.

    save_dir/models/<fingerprint>.json

The identity of an encoder is made from the model in memory. Beside the rows it is noted under a fingerprint of all that
the model was made from: the content of its files, settings, versions of libraries. A note is a memory and no part of
the cache: what is damaged or gone is found out again. It also keeps the checksums of large files, by what the file
system says of them (never by a path), so that a file of many gigabytes is not read at each start.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from quatcache.errors import FormatError, StoreError
from quatcache.store.files import checksum, read_json, write_json

__all__ = ["MODELS", "KnownModels", "is_note_name", "read_note"]

MODELS = "models"
"""Directory of the notes below a ``save_dir``."""

_FORMAT, _VERSION = "quatcache-model", 1
_NAME = re.compile(r"[0-9a-f]{32}\.json")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_LARGE = 1 << 20
"""Checksums of files of so many bytes are kept; smaller ones are read each time."""

_SETTLED_NS = 2 * 10**9
"""A file that was written less than so long ago may be written again within the resolution of its times."""


def is_note_name(name: str) -> bool:
    """Say whether a file name is that of a note.

    Example:
        >>> is_note_name("0" * 32 + ".json"), is_note_name("../0.json")
        (True, False)
    """
    return _NAME.fullmatch(name) is not None


def read_note(path: Path) -> dict[str, Any] | None:
    """Read a note: ``digest`` and ``facts`` of an identity, and ``files``; None if it is damaged, or none."""
    try:
        content = read_json(path)
    except (FileNotFoundError, FormatError, StoreError):
        return None
    sealed = content.pop("xxh3", None)
    identity, files = content.get("identity"), content.get("files")
    try:
        whole = sealed == _seal(content)
    except (ValueError, RecursionError):  # not a number, or nested without end
        whole = False
    if not whole or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        return None
    if not isinstance(identity, dict) or not isinstance(files, dict):
        return None
    digest, facts = identity.get("digest"), identity.get("facts")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(facts, dict):
        return None
    checksums = {state: value for state, value in files.items() if isinstance(value, str)}
    return {"digest": digest, "facts": facts, "files": checksums}


class KnownModels:
    """The notes of one cache directory.

    Args:
        path: The ``save_dir``.

    Example:
        >>> import tempfile
        >>> known = KnownModels(Path(tempfile.mkdtemp()))
        >>> known.remember("0" * 32, "1" * 32, {"class": "Table"})
        >>> known.recall("0" * 32)
        {'class': 'Table'}
    """

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path = path / MODELS
        self._kept: dict[str, str] | None = None
        self._seen: dict[str, str] = {}  # large files of this run

    def recall(self, fingerprint: str) -> dict[str, Any] | None:
        """Give the facts of the identity that was found under a fingerprint; None: there was none."""
        note = read_note(self._path / f"{fingerprint}.json")
        if note is not None and not self._seen.keys() <= note["files"].keys():  # files that were moved, or touched
            self.remember(fingerprint, note["digest"], note["facts"])
        return None if note is None else note["facts"]

    def remember(self, fingerprint: str, digest: str, facts: Mapping[str, Any]) -> None:
        """Note an identity, where that is permitted."""
        files = dict(sorted(self._seen.items()))
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": {"digest": digest, "facts": dict(facts)},
            "files": files,
        }
        with suppress(OSError, StoreError):
            self._path.mkdir(parents=True, exist_ok=True)
            write_json(self._path / f"{fingerprint}.json", {**content, "xxh3": _seal(content)})

    def forget(self, fingerprint: str) -> None:
        """Remove a note that was found wrong."""
        with suppress(OSError):
            (self._path / f"{fingerprint}.json").unlink()

    def digest(self, folders: Sequence[Path]) -> str | None:
        """Digest the content of all files in some folders, with their names in there.

        Hidden files are left out, and the cache directory if it lies in there.

        Returns:
            32 hex characters; None: not all can be read, or a link leads into another folder.
        """
        try:
            files = [list(_files(folder, self._path.parent)) for folder in folders]
            listed = [[[name, self._checksum(file)] for name, file in some] for some in files]
        except (OSError, FormatError, StoreError):
            return None
        return xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())

    def _checksum(self, file: Path) -> str:
        before, now = file.stat(), time.time_ns()
        if not stat.S_ISREG(before.st_mode):  # reading a pipe would wait for ever
            raise OSError(f"{file} is no regular file")
        if before.st_size < _LARGE:
            return checksum(file)
        state = _state(before)
        if state in self._checksums():
            self._seen[state] = self._checksums()[state]
            return self._seen[state]
        found = checksum(file)
        if _state(file.stat()) == state and now - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS:
            self._seen[state] = self._checksums()[state] = found
        return found

    def _checksums(self) -> dict[str, str]:
        """Give the checksums that all notes keep, by the state of the file."""
        if self._kept is None:
            self._kept = {}
            with suppress(OSError):
                for path in self._path.iterdir():
                    note = read_note(path) if is_note_name(path.name) else None
                    self._kept.update({} if note is None else note["files"])
        return self._kept


def _state(status: os.stat_result) -> str:
    """Put what tells a file apart from others, and from itself before a change, into one text."""
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _files(folder: Path, besides: Path) -> Iterator[tuple[str, Path]]:
    """Give the files in a folder, but not in another one inside it, in the order of their names.

    Raises:
        OSError: It cannot be listed, or a link leads into another folder.
    """

    def refuse(error: OSError) -> None:
        raise error

    left_out = besides.resolve()
    for home, folders, names in os.walk(folder, onerror=refuse):
        seen = (name for name in folders if not name.startswith("."))
        folders[:] = sorted(name for name in seen if (Path(home) / name).resolve() != left_out)
        if any((Path(home) / name).is_symlink() for name in folders):
            raise OSError(f"{home} has a link to a folder")
        for name in sorted(names):
            if not name.startswith("."):
                file = Path(home) / name
                yield file.relative_to(folder).as_posix(), file


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(text.encode())
