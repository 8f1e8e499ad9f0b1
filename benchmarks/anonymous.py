"""Anonymous memory of this process: what it allocated itself, files that it mapped not counted.

Pages of a mapped file can be dropped and read again at any time, so a cache far larger than main memory does no harm as
long as anonymous memory stays small. The total (RSS) would count both. Linux tells them apart.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

__all__ = ["Peak", "anonymous_bytes"]

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Count the bytes of resident anonymous memory.

    Raises:
        SystemExit: The system does not tell.
    """
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("anonymous memory is told by Linux alone, in /proc/self/status; leave this benchmark out")


class Peak:
    """The growth of anonymous memory inside a ``with`` block: at its highest, and what is left at its end.

    Args:
        every: Seconds between two looks.

    Attributes:
        highest: Bytes above those at the start.
        left: Bytes above those at the start when the block had ended.
    """

    def __init__(self, every: float = 0.005) -> None:
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.highest = 0
        self.left = 0

    def __enter__(self) -> Self:
        """Start looking."""
        gc.collect()
        self._start = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look once more."""
        self._ended.set()
        self._thread.join()
        self.left = anonymous_bytes() - self._start
        self.highest = max(self.highest, self.left)

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self.highest = max(self.highest, anonymous_bytes() - self._start)
