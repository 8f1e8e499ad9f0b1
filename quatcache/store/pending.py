"""The rows of one shard to be: put, and not yet committed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quatcache.keys import KeyArray
from quatcache.store.buffer import RowBuffer
from quatcache.store.draft import ShardDraft
from quatcache.store.protocol import Values
from quatcache.store.rows import Buffer, Rows, new_buffer, row_shape_of

__all__ = ["PendingShard"]

STEPS = 16
"""The file of a shard is written in so many steps while its rows are put, so that little is left to be written then."""


class PendingShard:
    """Rows in memory, in the order in which they were put, with their keys and the file that they go to.

    Args:
        path: Where the shard will be.
        shard_bytes: Size at which it is full.
        dtype: Storage dtype of floating rows; None keeps the encoder's.
        buffer: Memory of an earlier shard, cleared; None: memory is taken when the first rows tell their shape.
        time_func: Clock in seconds, for tests.

    Attributes:
        buffer: The rows, and perhaps one more batch if Ctrl-C came before its keys were noted.
        keys: Their keys, batch by batch.
        draft: The file, as far as it is written.

    Example:
        >>> import numpy as np
        >>> shard = PendingShard(Path("nowhere/shard.safetensors"), shard_bytes=16, dtype=None)
        >>> shard.append(np.zeros((1, 2), np.int64), shard.checked(torch.ones(1, 4)))
        >>> len(shard), shard.is_full
        (1, True)
    """

    def __init__(
        self,
        path: Path,
        shard_bytes: int,
        dtype: torch.dtype | None,
        buffer: Buffer | None = None,
        time_func: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold no row."""
        self.buffer: Buffer = RowBuffer(dtype=dtype) if buffer is None else buffer
        self.keys: list[KeyArray] = []
        self.draft = ShardDraft(path, max(1, shard_bytes // STEPS))
        self._shard_bytes = shard_bytes
        self._dtype = dtype
        self._time = time_func
        self._began = math.inf

    def __len__(self) -> int:
        """Count the rows whose keys were noted."""
        return sum(map(len, self.keys))

    @property
    def rows(self) -> Rows | None:
        """The rows in the storage dtype: a view; None if there are none."""
        return self.buffer.rows if self.keys else None

    @property
    def is_full(self) -> bool:
        """Whether the rows are enough for a shard."""
        return self.buffer.nbytes >= self._shard_bytes

    @property
    def seconds(self) -> float:
        """Time since the first rows were put; negative infinity if none were."""
        return self._time() - self._began

    def checked(self, values: Values) -> Any:
        """Check a batch of rows against those that are there, and cast it for storage on the CPU.

        Raises:
            EncoderOutputError: See :meth:`RowBuffer.checked`.
        """
        if self.buffer.row_shape is None:
            sizes = [size or 1 for size in row_shape_of(values)]
            row_bytes = math.prod(sizes) * (self._dtype or values.dtype).itemsize
            full = self._shard_bytes // max(row_bytes, 1)
            # room for the batch that makes it full, as well: memory that is never written is never taken
            self.buffer = new_buffer(values, "cpu", self._dtype, full + full // 4 + len(values))
        return self.buffer.checked(values.cpu())

    def append(self, keys: KeyArray, rows: Any) -> None:
        """Put checked rows behind the others, and have them written when there are enough of them."""
        if not self.keys:
            self._began = self._time()
        self.buffer.append(rows)
        self.keys.append(keys)
        held = self.buffer.rows
        self.draft.advance(held if isinstance(held, torch.Tensor) else held.values)

    def append_all(self, later: PendingShard) -> None:
        """Put the rows of a later shard behind these; as a whole they are written only once they are complete."""
        self.draft.discard()
        later.draft.discard()
        if later.keys:
            rows: Any = later.buffer.rows
            self.buffer.append(rows)
        self.keys = self.keys + later.keys
