"""The files behind shared memory: where they lie, what they are called, and that there is room for them."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from pathlib import Path

from quatcache.errors import ConfigError, StoreError
from quatcache.units import readable_size

__all__ = [
    "LOCKS_APART",
    "free_bytes",
    "get_shm_size",
    "is_at",
    "locks_path",
    "opened",
    "own_files",
    "remove",
    "reserve",
    "segment_path",
    "shared_directory",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")  # a name must not become a path
_RESERVED_AT_ONCE = 1 << 30  # a signal has the kernel begin a piece anew

LOCKS_APART = not sys.platform.startswith("linux")
"""Whether locks on bytes need a file of their own: on macOS and BSD they wait for an ``flock`` of the same process."""


def shared_directory() -> Path:
    """Say where segments lie: in memory on Linux; elsewhere in files of the system's folder for temporary ones."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def free_bytes() -> int | None:
    """Give the bytes that segments may still take; None where that is not limited."""
    status = os.statvfs(shared_directory())
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def segment_path(name: str) -> Path:
    """Give the file of a segment; users of a host do not meet.

    Raises:
        ConfigError: It is no name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:80]!r} cannot name shared memory; give up to 150 letters, digits, dots, dashes and underscores, a "
            "letter or digit first."
        )
    return shared_directory() / f"{_prefix()}{name}"


def locks_path(path: Path) -> Path:
    """Give the file for the locks on the bytes of a segment, where they need one; no segment is called like it."""
    return path.with_name(path.name.replace("quatcache-", "quatcache-locks-", 1))


def remove(path: Path) -> None:
    """Remove the name of a segment."""
    if LOCKS_APART:
        locks_path(path).unlink(missing_ok=True)
    path.unlink()


def own_files() -> list[Path]:
    """Find the segments of this user, whoever holds them."""
    return sorted(shared_directory().glob(f"{_prefix()}*"))


def _prefix() -> str:
    if sys.platform == "win32":
        raise StoreError("Windows has no shared memory of this kind; use WSL, or let each process read for itself.")
    return f"quatcache-{os.getuid()}-"


def opened(path: Path, *, make: bool = False) -> int:
    """Open the file of a segment, and give its descriptor.

    Raises:
        FileNotFoundError: It is not there, and not to be made.
        StoreError: It cannot be opened, or is somebody else's.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}; remove it, or use another name.") from error
    if os.fstat(descriptor).st_uid != os.getuid():
        os.close(descriptor)
        raise StoreError(f"{path} belongs to another user; remove it, or use another name.")
    return descriptor


def is_at(path: Path, descriptor: int) -> bool:
    """Say whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def reserve(descriptor: int, size: int) -> None:
    """Give an empty file its size, and take the memory: what is missing later kills the process that touches it.

    Raises:
        StoreError: There is not so much.
    """
    free = free_bytes()
    if free is not None and size > free:
        raise _no_room(size, free)
    os.ftruncate(descriptor, size)
    if not hasattr(os, "posix_fallocate"):  # macOS has none
        return
    try:
        for start in range(0, size, _RESERVED_AT_ONCE):
            os.posix_fallocate(descriptor, start, min(_RESERVED_AT_ONCE, size - start))
    except OSError as error:
        if error.errno == errno.ENOSPC:  # somebody else took it meanwhile
            raise _no_room(size, free_bytes() or 0) from error
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
            raise StoreError(f"cannot take {readable_size(size)} of shared memory: {error.strerror}.") from error


def _no_room(size: int, free: int) -> StoreError:
    return StoreError(
        f"{readable_size(size)} of shared memory do not fit into {shared_directory()}, where {readable_size(free)} are "
        "free; give a smaller size_limit_gib, or more shared memory: docker run --shm-size=..., or mount -o "
        "remount,size=... /dev/shm."
    )


def get_shm_size() -> int:
    """Give the size of the memory that segments share, in whole GiB, rounded down; not all of it need be free.

    Example:
        >>> get_shm_size() >= 0
        True
    """
    status = os.statvfs(shared_directory())
    return status.f_frsize * status.f_blocks >> 30
