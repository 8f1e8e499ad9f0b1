"""Reading the pages of a memory map ahead of the step that needs them.

A gather of random rows from a map that is not in memory waits for the disk once for every row, one after the other.
Threads that touch the rows of the next batches take these waits instead, several at a time, and the step finds the
pages in memory. They touch and give nothing: a row is always gathered by the step itself, so that neither a race with
rows that are being put nor an error in a thread can reach a batch, and what fails, fails in the step.

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

__all__ = ["AHEAD", "PageReader"]

AHEAD = 4
"""Batches that are read ahead, each by a thread of its own."""


class PageReader(AbstractContextManager["PageReader"]):
    """Touches what comes next, in threads that start with the first batch and end with the context.

    Args:
        touch: Brings what a batch needs into memory, given its indices ``(B,)``; None: it is there.

    Example:
        >>> touched = []
        >>> with PageReader(lambda indices: touched.append(indices.tolist())) as pages:
        ...     pages.read_ahead([torch.tensor([0]), torch.tensor([1])], 1)
        >>> touched in ([], [[1]])
        True
    """

    def __init__(self, touch: Callable[[torch.Tensor], None] | None) -> None:
        """Start no thread yet."""
        self._touch = touch or (lambda indices: None)
        self._threads: ThreadPoolExecutor | None = None
        self._next = 0  # the first batch that no thread was given
        self._begun = 0  # the first batch that the step has not begun
        self._closed = touch is None

    def read_ahead(self, batches: Sequence[torch.Tensor], begun: int) -> None:
        """Have the batches touched that come next.

        Args:
            batches: Indices of all batches of the epoch, as far as they are known.
            begun: How many of them the step has begun.
        """
        self._begun = begun
        stop = min(begun + AHEAD, len(batches))
        if self._closed or stop <= max(self._next, begun):
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="quatcache-pages")
        for number in range(max(self._next, begun), stop):
            self._threads.submit(self._read, batches[number], number)
        self._next = stop

    def _read(self, indices: torch.Tensor, number: int) -> None:
        if number >= self._begun:  # else the step was faster
            with suppress(Exception):  # the step meets it too, and raises it where it can be caught
                self._touch(indices)

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
