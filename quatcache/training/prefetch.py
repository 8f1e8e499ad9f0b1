"""Reading the pages of a memory map ahead of the step that needs them.

A gather of random rows from a map that is not in memory waits for the disk once for every row, one after the other.
Threads that touch the rows of the next batches take these waits instead, several at a time, and the step finds the
pages in memory. They touch and give nothing: a row is always gathered by the step itself, so that neither a race with
rows that are being put nor an error in a thread can reach a batch, and what fails, fails in the step.

While nothing comes from the disk, as when the system keeps the whole map in memory, only every sixteenth batch is
touched, to see whether that is still so.

Left alone: ``madvise`` takes one call per row, and ``process_madvise``, which takes all rows of a batch at once, needs
a right that containers do not have. Threads that hand over what they gathered would need a lock around stores that
grow meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from types import TracebackType

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

__all__ = ["AHEAD", "CALM", "PROBE", "PageReader", "disk_reads"]

AHEAD = 4
"""Batches that are read ahead, each by a thread of its own."""
CALM = 16
"""Batches in a row without a read from the disk, after which most are left out."""
PROBE = 16
"""Of so many batches one is touched all the same."""


def disk_reads() -> int | None:
    """Count how often this thread has waited for a page from the disk; None: this system does not tell.

    Example:
        >>> disk_reads() is None or disk_reads() >= 0
        True
    """
    if resource is None or not hasattr(resource, "RUSAGE_THREAD"):
        return None
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


class PageReader(AbstractContextManager["PageReader"]):
    """Touches what comes next, in threads that start with the first batch and end with the context.

    Args:
        touch: Brings what a batch needs into memory, given its indices ``(B,)``; None: it is there.
        reads: Counts the reads from the disk of the thread that calls it.

    Example:
        >>> touched = []
        >>> with PageReader(lambda indices: touched.append(indices.tolist())) as pages:
        ...     pages.read_ahead([torch.tensor([0]), torch.tensor([1])], 1)
        >>> touched in ([], [[1]])
        True
    """

    def __init__(
        self, touch: Callable[[torch.Tensor], None] | None, reads: Callable[[], int | None] = disk_reads
    ) -> None:
        """Start no thread yet."""
        self._touch = touch or (lambda indices: None)
        self._reads = reads
        self._threads: ThreadPoolExecutor | None = None
        self._next = 0  # the first batch that no thread was given
        self._begun = 0  # the first batch that the step has not begun
        self._calm = 0  # batches in a row that were all in memory
        self._closed = touch is None

    def read_ahead(self, batches: Sequence[torch.Tensor], begun: int) -> None:
        """Have the batches touched that come next.

        Args:
            batches: Indices of all batches of the epoch, as far as they are known.
            begun: How many of them the step has begun.
        """
        if self._closed:
            return
        self._begun = begun
        stop = min(begun + AHEAD, len(batches))
        for number in range(max(self._next, begun), stop):
            if self._calm < CALM or number % PROBE == 0:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="quatcache-pages")
                self._threads.submit(self._read, batches[number], number)
        self._next = stop
        if self._threads is not None and stop == len(batches):  # whoever iterates may not come back after the last one
            self._threads.shutdown(wait=False)

    def _read(self, indices: torch.Tensor, number: int) -> None:
        if number < self._begun:  # the step was faster
            return
        before = self._reads()
        with suppress(Exception):  # the step meets it too, and raises it where it can be caught
            self._touch(indices)
        self._calm = self._calm + 1 if before is not None and self._reads() == before else 0

    def close(self) -> None:
        """End the threads; those that are reading finish their batch."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads."""
        self.close()
