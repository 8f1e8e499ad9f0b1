"""A file under a temporary name, until it is whole.

Written in the directory where it will be, flushed to the device, renamed, and the directory flushed after it: a power
cut leaves the old state or the new one.
"""

from __future__ import annotations

import os
import secrets
import weakref
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TypeAlias

__all__ = ["TEMPORARY", "UnfinishedFile", "is_temporary"]

TEMPORARY = ".tmp-"

Content: TypeAlias = bytes | memoryview


def is_temporary(name: str) -> bool:
    """Say whether a file name is that of a file being written, or left behind by a process that died."""
    return name.startswith(TEMPORARY)


class UnfinishedFile:
    """A file that is being written, and gone if it is forgotten before it is published.

    Args:
        path: Where it will be; the directory is there.

    Raises:
        OSError: It cannot be made.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> unfinished = UnfinishedFile(path)
        >>> unfinished.write(b"whole")
        5
        >>> path.exists(), unfinished.publish(), path.read_text()
        (False, None, 'whole')
    """

    def __init__(self, path: Path) -> None:
        """Make it under a name that nobody else has."""
        self.path = path
        self._temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
        # unbuffered: what a forked process has a copy of, it would write once more when it closes the file
        self._file = self._temporary.open("xb", buffering=0)
        self._forget = weakref.finalize(self, _remove, self._file, self._temporary, os.getpid())

    def write(self, content: Content) -> int:
        """Write all of some bytes, behind those before; gives their number.

        Raises:
            OSError: There is no room, or the device fails.
        """
        rest = memoryview(content)
        while len(rest):
            rest = rest[self._file.write(rest) :]
        return len(content)

    def fileno(self) -> int:
        """Give the file descriptor."""
        return self._file.fileno()

    def rewind(self) -> None:
        """Have what is written next take the place of what was written first."""
        self._file.seek(0)

    def publish(self, *, durable: bool = True) -> None:
        """Close the file and give it its name.

        Args:
            durable: Flush it to the device; false: for what nobody reads after a power cut.

        Raises:
            OSError: That is not possible; it is to be discarded.
        """
        if durable:
            os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        self._forget.detach()
        if durable:
            _flush_directory(self.path.parent)

    def discard(self) -> None:
        """Close the file and remove it, if it was not published."""
        self._forget()


def _remove(file: FileIO, temporary: Path, owner: int) -> None:
    file.close()
    if os.getpid() == owner:  # a forked process has only a copy of who writes the file
        with suppress(OSError):  # a read-only file system refuses even to unlink what does not exist
            temporary.unlink()


def _flush_directory(path: Path) -> None:
    if os.name == "nt":  # Windows has no handle for a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
