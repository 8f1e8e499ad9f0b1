"""Memory that processes of one host share: made by one of them, found by name, gone when nobody needs it.

A segment is a file that all of them map, in /dev/shm where there is one. ``multiprocessing.shared_memory`` would do the
same, but before Python 3.13 every process that attaches has a resource tracker take the segment for its own, which then
unlinks it under the others or prints of leaks. Here the kernel keeps the books: whoever maps a segment holds a shared
``flock`` on its file, together with the processes forked from it, and that ends when they end, however they end. So a
segment that nobody holds was left behind, and whoever makes the next one removes it. Process ids would not tell: they
are given out again, and differ between containers that share /dev/shm.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from weakref import WeakValueDictionary

from quatcache.errors import StoreError
from quatcache.store import segment_files
from quatcache.store.segment_files import is_at, locks_path, opened, own_files, remove, reserve, segment_path
from quatcache.units import readable_size

if sys.platform != "win32":
    import fcntl

__all__ = ["MAGIC", "Segment", "attach_segment", "open_segment", "remove_leftovers"]

logger = logging.getLogger(__name__)

MAGIC = b"quatslot"
"""The first bytes of a segment, written when it is whole."""


class Segment(mmap.mmap):
    """Shared memory that is mapped into this process.

    Each view of it keeps it. When the last view is gone, or the process ends, the process that made it removes its
    name: others keep what they have mapped, but nobody can attach any more.

    Attributes:
        path: Its file.
        descriptor: The open file.
        locks: The open file whose bytes stand for those of the segment in locks: mostly the same.
    """

    path: Path
    descriptor: int
    locks: int
    _threads: threading.Lock
    _order: threading.Lock

    def renew(self) -> None:
        """Begin in this process: another thread may have held the locks when it was forked."""
        self._threads, self._order = threading.Lock(), threading.Lock()

    @contextmanager
    def locked(self, start: int, count: int = 1) -> Iterator[None]:
        """Hold some bytes against all other threads and processes; the lock of a process that is killed is given up.

        Args:
            start: The first of them; they need not exist.
            count: How many, > 0.
        """
        with self._threads:  # a process does not lock itself out
            try:
                while True:
                    try:
                        fcntl.lockf(self.locks, fcntl.LOCK_EX, count, start)
                        break
                    except OSError as error:
                        # Of processes that wait for each other in several threads the kernel suspects a deadlock.
                        if error.errno != errno.EDEADLK:
                            raise
                yield
            finally:
                fcntl.lockf(self.locks, fcntl.LOCK_UN, count, start)

    def claim(self, place: int) -> bool:
        """Take a byte for as long as this process lives, unless another process has it."""
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            return False
        return True

    def order(self) -> None:
        """Have other processes see what was written so far no later than what is written next.

        A lock that is given up orders what came before it, one that is taken what comes after. On x86 stores are seen
        in their order anyway; processors of ARM need to be told.
        """
        with self._order:
            pass
        with self._order:
            pass


_OPENING = threading.Lock()
_ATTACHED: WeakValueDictionary[str, Segment] = WeakValueDictionary()
"""The segments of this process, one a file: closing another descriptor of it would give up the locks of the first."""


def _renew_all() -> None:
    for segment in list(_ATTACHED.values()):
        segment.renew()
    _OPENING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_renew_all)


def open_segment(name: str, size: int, initialise: Callable[[Segment], None]) -> tuple[Segment, bool]:
    """Make the segment of a name, or attach to the one that somebody uses.

    Args:
        name: Its name on this host.
        size: Its bytes, which are taken at once.
        initialise: Writes what belongs into a new one, all zeros, before anybody else sees it.

    Returns:
        The segment, and whether it is a new one.

    Raises:
        ConfigError: It is no name.
        StoreError: There is no room for it, or the file cannot be opened.
    """
    path = segment_path(name)
    with _OPENING:
        remove_leftovers()
        while True:
            known = _known(path)
            if known is not None:
                return known, False
            descriptor = opened(path, make=True)
            try:
                new = _alone(descriptor)
                segment = _made(path, descriptor, size, initialise) if new else _mapped(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if segment is not None:
                return _adopted(segment, path, descriptor, owner=new), new
            os.close(descriptor)  # it was removed meanwhile, or whoever made it died: once more


def attach_segment(path: Path) -> Segment:
    """Attach to a segment that another process has made.

    Raises:
        StoreError: It is not there any more, or cannot be opened.
    """
    with _OPENING:
        known = _known(path)
        if known is not None:
            return known
        try:
            descriptor = opened(path)
        except FileNotFoundError:
            raise _gone(path) from None
        try:
            segment = _mapped(path, descriptor)
            if segment is None:
                raise _gone(path)
        except BaseException:
            os.close(descriptor)
            raise
        return _adopted(segment, path, descriptor, owner=False)


def remove_leftovers() -> list[str]:
    """Remove the segments of this user that no process holds, and give the names of their files."""
    removed = []
    for path in own_files():
        if str(path) in _ATTACHED:
            continue
        with suppress(OSError):
            descriptor = opened(path)
            try:
                if _alone(descriptor) and is_at(path, descriptor):
                    size = readable_size(os.fstat(descriptor).st_size)
                    remove(path)
                    removed.append(path.name)
                    logger.info("removed %s of shared memory that a process left when it was killed: %s", size, path)
            finally:
                os.close(descriptor)
    return removed


def _known(path: Path) -> Segment | None:
    segment = _ATTACHED.get(str(path))
    return segment if segment is not None and is_at(path, segment.descriptor) else None


def _alone(descriptor: int) -> bool:
    """Take the file for this process alone, if nobody holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _made(path: Path, descriptor: int, size: int, initialise: Callable[[Segment], None]) -> Segment | None:
    """Make a segment of a file that is held alone: a new one, or what the dead have left."""
    if not is_at(path, descriptor):
        return None
    try:
        os.ftruncate(descriptor, 0)
        reserve(descriptor, size)
        segment = Segment(descriptor, size)
        segment.renew()
        initialise(segment)
    except BaseException:
        path.unlink()
        raise
    segment[: len(MAGIC)] = MAGIC
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # for an instant nobody holds it, and it may be taken for a leftover
    return segment if is_at(path, descriptor) else None


def _mapped(path: Path, descriptor: int) -> Segment | None:
    """Map a segment that others hold, if it is whole."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for who makes it
    size = os.fstat(descriptor).st_size
    if size < len(MAGIC) or not is_at(path, descriptor):
        return None
    segment = Segment(descriptor, size)
    segment.renew()
    return segment if segment[: len(MAGIC)] == MAGIC else None


def _adopted(segment: Segment, path: Path, descriptor: int, *, owner: bool) -> Segment:
    segment.path, segment.descriptor = path, descriptor
    segment.locks = opened(locks_path(path), make=True) if segment_files.LOCKS_APART else descriptor
    # Of multiprocessing, because its children end without running atexit, where weakref.finalize would be called.
    Finalize(segment, _leave, args=(path, descriptor, segment.locks, owner), exitpriority=-1)
    _ATTACHED[str(path)] = segment
    return segment


def _leave(path: Path, descriptor: int, locks: int, owner: bool) -> None:
    """Remove the name: with the process that made it, or with the last one that has it."""
    with suppress(OSError):
        if (owner or _alone(descriptor)) and is_at(path, descriptor):
            remove(path)
    for file in {descriptor, locks}:
        os.close(file)


def _gone(path: Path) -> StoreError:
    return StoreError(
        f"shared memory {path} is not there any more: who made it has ended or dropped it; keep the SharedCache that "
        "made it for as long as others may attach."
    )
