"""The processes of one run: how they know each other, and how they wait without a collective.

A collective while a cache is filled would time out: one rank may be hours behind another. So a rank waits by looking,
and only for a rank that is at work: one that died has lost its lock, one that never came is given up after a minute.
Whatever is given up is done by those who are there, so waiting in vain costs time and nothing else.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from quatcache.errors import StoreError
from quatcache.store import CacheDirectory
from quatcache.store.parts import RankFolder
from quatcache.training.config import CacheConfig
from quatcache.training.lightning import Trainer

__all__ = ["Ranks", "Together"]

logger = logging.getLogger(__name__)

ARRIVAL_SECONDS = 60.0
"""How long to wait for a rank that has not come to a fill at all."""

SECONDS_BETWEEN_MESSAGES = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
PAUSES_IN_STEPS = (0.001, 0.02)
"""What is waited for in a step is one encoder call away."""

DONE = "done"


@dataclass
class Ranks:
    """The processes of one run of a trainer.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        token: Name of the run, the same on all of them and in no other run.
        temporary: Directory that takes the place of ``save_dir`` for the time of the run; None: there is none.
        time_func: Clock in seconds.
        sleep: Waits for seconds.

    Example:
        >>> ranks = Ranks()
        >>> with ranks.together(None) as together:
        ...     together is None
        True
    """

    rank: int = 0
    size: int = 1
    token: str = ""
    temporary: Path | None = None
    time_func: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _fills: int = 0
    _remove: Callable[[], object] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, trainer: Trainer, config: CacheConfig) -> Ranks:
        """Find the processes of a run; all of them must ask at the same moment, as in ``setup``.

        Without ``save_dir`` the ranks of one machine get a temporary directory, so that they encode each item once.

        Args:
            trainer: The trainer of the run.
            config: Where rows persist.
        """
        if trainer.world_size == 1:
            return cls()
        temporary = None
        if config.save_dir is None and trainer.num_nodes > 1:
            if trainer.is_global_zero:
                logger.warning(
                    "save_dir is None, and the ranks of %d machines share no directory: each of them encodes every "
                    "item; name a directory that all machines see as save_dir.",
                    trainer.num_nodes,
                )
        elif config.save_dir is None and trainer.is_global_zero:
            temporary = tempfile.mkdtemp(prefix="quatcache-")
        token, temporary = trainer.strategy.broadcast((secrets.token_hex(16), temporary))
        ranks = cls(trainer.global_rank, trainer.world_size, token, None if temporary is None else Path(temporary))
        ranks._keep_temporary()
        return ranks

    def _keep_temporary(self) -> None:
        """Hold the temporary directory as long as this process may use it."""
        if self.temporary is None:
            return
        folder = RankFolder(self.temporary, self._named("run"), self.rank, self.size)
        with suppress(StoreError):
            folder.enter()
        self._remove = weakref.finalize(self, _leave_temporary, folder, self.temporary, os.getpid())

    def close(self) -> None:
        """Leave the temporary directory; the last rank removes it."""
        if self._remove is not None:
            self._remove()

    def in_steps(self, directory: CacheDirectory | None) -> Together | None:
        """Meet the other ranks for the time of a run, to share what is encoded in its steps; nobody is waited for.

        Args:
            directory: Where rows persist.

        Returns:
            The ranks, whose folder is to be left; None: there is no other, or no directory to meet in.
        """
        if self.size == 1 or directory is None:
            return None
        folder = RankFolder(directory.path, self._named("steps"), self.rank, self.size)
        try:
            folder.enter()
        except StoreError:  # it may only be read: then no row is kept, either
            return None
        return Together(folder, self.time_func, self.sleep, PAUSES_IN_STEPS)

    def _named(self, what: str) -> str:
        return xxh3_128_hexdigest(f"{self.token} {what}".encode())

    @contextmanager
    def together(self, directory: CacheDirectory | None) -> Iterator[Together | None]:
        """Fill together with the other ranks; leave when they are done too, so that none waits for another later.

        Args:
            directory: Where rows persist.

        Yields:
            The ranks of this fill; None: this one fills alone, for there is no other, or no directory to meet in.
        """
        self._fills += 1
        if self.size == 1 or directory is None:
            yield None
            return
        folder = RankFolder(directory.path, self._named(str(self._fills)), self.rank, self.size)
        try:
            folder.enter()
        except StoreError:  # it may only be read: then every rank must find all rows there
            yield None
            return
        try:
            together = Together(folder, self.time_func, self.sleep)
            yield together
            with suppress(StoreError):
                together.wait_for_all()
        finally:
            folder.leave()


class Together:
    """One fill, or the steps of one run, as one of several ranks sees it.

    Args:
        folder: Where they leave files for each other.
        time_func: Clock in seconds.
        sleep: Waits for seconds.
        pauses: The first and the longest pause between two looks, in seconds.
    """

    def __init__(
        self,
        folder: RankFolder,
        time_func: Callable[[], float],
        sleep: Callable[[float], None],
        pauses: tuple[float, float] = (FIRST_PAUSE, LONGEST_PAUSE),
    ) -> None:
        """Begin now."""
        self._pauses = pauses
        self.folder = folder
        self._time = time_func
        self._sleep = sleep
        self._begun = time_func()

    @property
    def leads(self) -> bool:
        """Whether this rank says what is to be done, and has the last word."""
        return self.folder.rank == 0

    def wait(self, rank: int, until: Callable[[], bool]) -> bool:
        """Wait until something holds, as long as another rank is at work.

        Args:
            rank: Who will make it hold.
            until: Whether it does.

        Returns:
            Whether it holds now; False: that rank is done, left or died, or never came.
        """
        (pause, longest), told = self._pauses, self._time()
        while True:
            waits = self._may_come(rank)
            if until():  # looked at last: what a rank does, it does before it leaves
                return True
            if not waits:
                if not self.folder.came(rank):
                    logger.warning(
                        "Rank %d saw nothing of rank %d in %s, and goes on without it; see that all ranks have the "
                        "same save_dir, on a file system that they share.",
                        self.folder.rank,
                        rank,
                        self.folder.path.parent,
                    )
                return False
            if self._time() - told >= SECONDS_BETWEEN_MESSAGES:
                told = self._time()
                logger.info("Rank %d waits for rank %d, which is at work on its share.", self.folder.rank, rank)
            self._sleep(pause)
            pause = min(2 * pause, longest)

    def _may_come(self, rank: int) -> bool:
        if self.folder.came(rank):
            return self.folder.is_here(rank) and not self.folder.has(f"{DONE}-{rank}")
        return self._time() - self._begun < ARRIVAL_SECONDS

    def wait_for_all(self) -> None:
        """Say that this rank is done, and wait for those that are still at work.

        Raises:
            StoreError: The folder cannot be written.
        """
        self.folder.write(f"{DONE}-{self.folder.rank}", {}, {})
        for rank in range(self.folder.size):
            if rank != self.folder.rank and self.folder.came(rank):
                self.wait(rank, lambda: False)


def _leave_temporary(folder: RankFolder, directory: Path, process: int) -> None:
    if os.getpid() != process:  # a worker that was forked from it
        return
    folder.leave()
    if not any(folder.is_here(rank) for rank in range(folder.size) if rank != folder.rank):
        shutil.rmtree(directory, ignore_errors=True)
