"""The folder in which the ranks of one run exchange what they need to fill a cache together.

Ranks never wait for each other in a collective: a fill may take hours, and those time out. They leave files for each
other instead, and each holds a lock of the operating system as long as it is at work, so one that died is noticed.

What lies here helps; it decides nothing. Rows go into the store itself and are looked for there. A folder that is lost,
or half of a folder, costs time and never a row: what is missing is read and encoded again. Alternatives that were left:
collectives (time-outs), one list of all distinct keys that is cut into shares (every item would be read twice, first
to be keyed and then to be encoded).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout

from quatcache.errors import DamagedFileError, FormatError, StoreError
from quatcache.keys import KeyArray, KeyIndex
from quatcache.store.files import content_digest, locked, open_tensors, write_tensors
from quatcache.store.protocol import Positions
from quatcache.store.unfinished import is_temporary

__all__ = ["FILLING", "Claims", "RankFolder", "remove_leftovers"]

FILLING = "filling"
PARTS_VERSION = 1

_LOCK = ".lock"
_CLAIMS_LOCK = "claims.lock"
_RECORD_BYTES = 24
_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")
_RANK_LOCK = re.compile(r"rank-[0-9]{1,6}\.lock")
_FILE_NAME = re.compile(
    r"rank-[0-9]{1,6}\.lock|[a-z]+(-[0-9]{1,6}(-[0-9]{1,10})?)?\.safetensors|claims\.lock|claims-[0-9a-f]{32}(-[a-z0-9]{1,16})?"
)


class RankFolder:
    """What the ranks of one run leave for each other in one fill, or in all of their steps.

    Args:
        root: The cache directory.
        token: Name of the fill, the same on all ranks and on no others: 32 hex characters.
        rank: This one.
        size: How many there are.

    Example:
        >>> import tempfile
        >>> folder = RankFolder(Path(tempfile.mkdtemp()), "0" * 32, rank=0, size=2)
        >>> folder.enter()
        >>> folder.write("plan", {"datasets": 1}, {})
        >>> folder.read("plan"), folder.read("part-1"), folder.came(1)
        (({'datasets': 1}, {}), None, False)
        >>> folder.leave()
    """

    def __init__(self, root: Path, token: str, rank: int, size: int) -> None:
        """Name the folder; nothing is made."""
        if not _FOLDER_NAME.fullmatch(token):
            raise StoreError(f"{token!r} is not a token; it has 32 hexadecimal characters.")
        self.path = root / FILLING / token
        self.rank = rank
        self.size = size
        self._lock = FileLock(self._lock_of(rank))

    def _lock_of(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.lock"

    def enter(self) -> None:
        """Show the others that this rank is at work.

        Raises:
            StoreError: The directory cannot be written.
        """
        try:
            with locked(self.path.parent / _LOCK):  # nobody takes the folder for a leftover now
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
        except (OSError, Timeout) as error:
            raise StoreError(f"cannot enter {self.path}: {error}; permit writing there.") from error

    def leave(self) -> None:
        """Show the others that this rank is not at work any more; the last one removes the folder."""
        self._lock.release()
        with suppress(OSError), locked(self.path.parent / _LOCK):
            if all(self.came(rank) for rank in range(self.size)):
                _remove_if_left(self.path)

    def came(self, rank: int) -> bool:
        """Say whether a rank ever entered."""
        return self._lock_of(rank).exists()

    def is_here(self, rank: int) -> bool:
        """Say whether another rank has entered and neither left nor died."""
        return _is_held(self._lock_of(rank))

    def write(self, name: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Leave a file for the others; it is there as a whole or not at all.

        Args:
            name: Such as "plan" or "part-1".
            about: JSON values.
            tensors: CPU tensors.

        Raises:
            StoreError: It cannot be written.
        """
        described = {"version": PARTS_VERSION, **about}
        metadata = {"quatcache": json.dumps(described), "xxh3": content_digest(described, tensors)}
        # not flushed to the device: after a power cut there is no run that could read it
        write_tensors(self.path / f"{name}.safetensors", tensors, metadata, durable=False)

    def has(self, name: str) -> bool:
        """Say whether a file was left."""
        return (self.path / f"{name}.safetensors").exists()

    def remove(self, name: str) -> None:
        """Remove a file that nobody needs any more, where that is possible."""
        with suppress(OSError):
            (self.path / f"{name}.safetensors").unlink()

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Read what was left; None if there is nothing, or if it is not what was written.

        Returns:
            The description, and the tensors, mapped into memory.
        """
        try:
            tensors, metadata = open_tensors(self.path / f"{name}.safetensors")
            about = json.loads(metadata["quatcache"])
            if about.pop("version") != PARTS_VERSION:
                return None
            if content_digest({"version": PARTS_VERSION, **about}, tensors) != metadata["xxh3"]:
                raise DamagedFileError(f"{name} of {self.path} is damaged.")
        except (FormatError, StoreError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        return about, tensors

    def claims(self, store: str) -> Claims:
        """Give the claims on the rows of one store.

        Args:
            store: Name of its directory.
        """
        return Claims(self.path / f"claims-{store}")


class Claims:
    """Which keys one of the ranks encodes: who claims a key first, has it.

    A file of keys, each with a number that says where its row will be, to which all ranks append. A claim is a promise
    and no fact: whoever dies before the row is committed leaves a key that is claimed and missing, and who comes last
    encodes it.

    Args:
        path: The file; made when the first key is claimed.
    """

    def __init__(self, path: Path) -> None:
        """Know nothing yet."""
        self._path = path
        self._known = KeyIndex()
        self._read = 0

    def take(self, keys: KeyArray) -> Positions:
        """Claim keys, and say nothing of where their rows will be.

        Args:
            keys: Distinct keys ``(N, 2)``.

        Returns:
            The positions of those that nobody had claimed.

        Raises:
            StoreError: The file cannot be written.
        """
        return np.flatnonzero(self.deal(keys, 0) < 0)

    def deal(self, keys: KeyArray, number: int) -> npt.NDArray[np.int64]:
        """Claim keys, and find the numbers of those that are claimed already.

        Args:
            keys: Distinct keys ``(N, 2)``.
            number: What others find beside those that are claimed now, from 0 to ``2**63 - 1``.

        Returns:
            For each key the number that it was claimed with before, and -1 if it is claimed only now, ``(N,)``.

        Raises:
            StoreError: The file cannot be written.
        """
        if not len(keys):
            return np.empty(0, np.int64)
        try:
            with locked(self._path.with_name(_CLAIMS_LOCK)), self._path.open("a+b") as file:
                self._learn(file.seek(0, os.SEEK_END) // _RECORD_BYTES * _RECORD_BYTES, file)
                numbers = self._known.find(keys)
                free = keys[numbers < 0]
                file.truncate(self._read)  # a claim of which only a part was written: its rank died
                file.seek(0, os.SEEK_END)
                records = np.column_stack([free, np.full(len(free), number, np.int64)])
                file.write(np.ascontiguousarray(records, "<i8").tobytes())
                self._add(records)
        except OSError as error:
            raise StoreError(
                f"cannot write {self._path}: {error.strerror or error}; free space or permit writing there."
            ) from error
        return numbers

    def _learn(self, size: int, file: Any) -> None:
        file.seek(self._read)
        content = file.read(size - self._read)
        self._add(np.frombuffer(content, "<i8").astype(np.int64).reshape(-1, 3))

    def _add(self, records: npt.NDArray[np.int64]) -> None:
        self._known.add(np.ascontiguousarray(records[:, :2]), records[:, 2].copy())
        self._read += _RECORD_BYTES * len(records)


def remove_leftovers(root: Path) -> None:
    """Remove the folders of fills whose processes all died.

    Args:
        root: The cache directory. What cannot be removed is left: it is in nobody's way.
    """
    if not (root / FILLING).is_dir():
        return
    with suppress(OSError), locked(root / FILLING / _LOCK):
        for folder in (root / FILLING).iterdir():
            if _FOLDER_NAME.fullmatch(folder.name) and not folder.is_symlink():
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder in which no rank is at work, if nothing lies there but what ranks leave."""
    with suppress(OSError):
        files = list(folder.iterdir())
        if any(_RANK_LOCK.fullmatch(file.name) and _is_held(file) for file in files):
            return
        for file in files:
            known = _FILE_NAME.fullmatch(file.name) or is_temporary(file.name)
            if known and stat.S_ISREG(file.lstat().st_mode):
                file.unlink()
        folder.rmdir()


def _is_held(path: Path) -> bool:
    """Say whether a process holds a lock; the file is not made for that."""
    if path.is_symlink() or not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True
