"""The rows of one encoder without a trainer: found, encoded and stored by any number of threads and processes.

Three locks, always taken in this order, keep threads apart: one thread encodes (``_computing``), one uses the store
(its own lock, held for a look-up or a put), one looks whether the encoder is what it was. So a thread that finds all of
its rows never waits for an encoder. Processes are kept apart by the lock that fills hold as well: who has it takes in
what others have committed, encodes what is still missing, commits, and lets go. So no item is encoded twice, and no
lock is held while the user's own code runs between two calls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.encoders.calls import CallPlan, EncoderCalls
from quatcache.encoders.current_rows import CurrentRows, OpenedRows
from quatcache.encoders.deferred import device_of
from quatcache.encoders.extracted import ExtractedKeys
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import KeyTypeError, StoreError
from quatcache.keys import KeyArray, KeyExtractor
from quatcache.read_through import Counts, read_through
from quatcache.sequences import PaddedSequences
from quatcache.store import BudgetStore, CacheDirectory, Positions, RowStore

__all__ = ["EncoderRows"]

logger = logging.getLogger(__name__)

PACK_AFTER = 64
"""Shards that may gather before small ones are packed: a call that encodes commits one."""

NOTED_SECONDS = 1.0
"""Time in the encoder that is worth writing down with the rows."""

Advance = Callable[[int, Counts], None]
"""Told how many items were answered, and how."""

_NO_PLACES = np.empty(0, np.int64)


class EncoderRows:
    """Answers with the rows of one encoder.

    Args:
        current: Says which rows these are.
        directory: Where they persist; None: in memory.
        key_extractor: From an item to its key; None: its content is the key.
        dtype: Storage dtype; None: as the encoder gives them.
        max_size: Budget in bytes for rows; None: no limit.

    Attributes:
        counts: What was done so far.
        seconds: Time in the encoder so far, collating included.
    """

    def __init__(
        self,
        current: CurrentRows,
        directory: CacheDirectory | None,
        *,
        key_extractor: KeyExtractor | None = None,
        dtype: torch.dtype | None = None,
        max_size: int | None = None,
    ) -> None:
        """Answer nothing yet."""
        self.counts = Counts()
        self.seconds = 0.0
        self._current = current
        self._directory = directory
        self._scheme = KeyScheme.of(current.name, current.encoder, key_extractor)
        self._extracted = None if key_extractor is None else ExtractedKeys(self._scheme)
        self._dtype = dtype
        self._max_size = max_size
        self._computing = threading.RLock()
        self._keying = threading.Lock()
        self._counting = threading.Lock()
        self._filled: OpenedRows | None = None  # whose lock is held: an encoder may ask this very cache
        self._pack_at = PACK_AFTER
        self._noted = (0, 0.0)
        self._told = ""
        self._told_of_keys = False

    def contains(self, items: Sequence[Any]) -> npt.NDArray[np.bool_]:
        """Say which of N items have a row, without encoding any."""
        opened = self._current.open()
        keys, _ = self._keys(opened, items)
        missing = opened.store.missing(keys)
        if len(missing) and opened.disk is not None:
            with opened.store.lock, suppress(StoreError):
                if not opened.disk.pending:  # else another thread is encoding, and no other process commits
                    opened.disk.refresh()
            missing = opened.store.missing(keys)
        present = np.ones(len(keys), bool)
        present[missing] = False
        return present

    def answer(self, items: Sequence[Any], batch_size: int, advance: Advance) -> Any:
        """Give the rows of items.

        Args:
            items: N items.
            batch_size: Upper bound of items per encoder call.
            advance: Told of each step.

        Returns:
            ``(N, *row_shape)`` on the CPU in the encoder's dtype, or :class:`~quatcache.sequences.PaddedSequences`.
        """
        opened = self._current.open()
        if not len(items):
            return self._no_rows(opened)
        keys, own = self._keys(opened, items)
        self._compare(opened, items, own)
        if len(opened.store.missing(keys)):
            rows = self._compute(opened, items, keys, batch_size, advance)
        else:
            rows = opened.store.get_many(keys).values
            self._count(Counts(len(keys), len(keys)), advance)
        self._current.note()
        if self._extracted is not None and not self._told_of_keys:
            self._told_of_keys = self._extracted.warn()
        return rows

    def _keys(self, opened: OpenedRows, items: Sequence[Any]) -> tuple[KeyArray, KeyArray]:
        """Give the keys of the rows of items, and those of their own content: others, where items share a row."""
        keys = self._scheme.keys(items, _NO_PLACES)
        if self._extracted is None:
            return keys, keys
        content: KeyArray | None = None
        with suppress(KeyTypeError):  # nothing to compare: perhaps the extractor was given for that reason
            content = self._scheme.content_keys(items)
        with self._keying:
            rows = self._extracted.resolve(items, keys, content, opened.store)
        return rows, keys if content is None else content

    def _compare(self, opened: OpenedRows, items: Sequence[Any], own: KeyArray) -> None:
        """Hold the stored rows of items against the encoder, as long as the canary wants some.

        Raises:
            StaleRowsError: They differ.
        """
        canary = opened.canary
        if canary is None or not canary.wanted:
            return
        with self._computing, opened.store.lock:  # nobody is given rows meanwhile
            canary.check(items, own)
            if canary.compared >= opened.goal:
                canary.wanted = 0
                canary.conclude()

    def _compute(
        self, opened: OpenedRows, items: Sequence[Any], keys: KeyArray, batch_size: int, advance: Advance
    ) -> Any:
        with self._computing, ExitStack() as held:
            kept = self._alone(opened, held)
            try:
                return self._encode_missing(opened, kept, items, keys, batch_size, advance)
            finally:  # also what was encoded before an error or Ctrl-C is kept
                self._keep(opened)

    def _alone(self, opened: OpenedRows, held: ExitStack) -> RowStore:
        """Be the one process that encodes for this store, and give what takes the rows."""
        if opened.disk is not None and self._directory is not None and opened is not self._filled:
            try:
                held.enter_context(self._directory.filling([opened.disk]))
                held.callback(setattr, self, "_filled", self._filled)
                self._filled = opened
                with opened.store.lock:
                    opened.disk.refresh()
            except StoreError as error:
                if not len(opened.store):  # a directory that was named wrongly, and not one that may only be read
                    raise
                self._tell(error)
                return self._nothing(opened)
        return opened.store if self._max_size is None else BudgetStore(opened.store, self._max_size, self._dtype)

    def _nothing(self, opened: OpenedRows) -> RowStore:
        """Give what takes no more rows: those that are there can be read, and the others encoded each time."""
        return BudgetStore(opened.store, 0, self._dtype)

    def _encode_missing(
        self,
        opened: OpenedRows,
        kept: RowStore,
        items: Sequence[Any],
        keys: KeyArray,
        batch_size: int,
        advance: Advance,
    ) -> Any:
        encoder, frozen = self._current.encoder, partial(self._current.frozen, opened)
        plan = CallPlan(self._current.name, encoder, device_of(encoder))
        calls = EncoderCalls(frozen, plan, items, batch_size, dtype=self._dtype, took=self._take_time)
        encoded = 0

        def split(positions: Positions) -> Iterator[Positions]:
            start = 0
            while start < len(positions):
                size = plan.window(batch_size, self._pace(opened))
                yield from calls.split(positions[start : start + size])
                start += size

        def compute(positions: Positions) -> Any:
            nonlocal encoded
            rows = calls.encode(positions).to("cpu")
            encoded += len(positions)
            self._count(Counts(len(positions), computed=len(positions)), advance)
            return rows

        found = opened.store.get_many(keys)  # others have encoded while this thread waited
        hits = len(found.positions)
        self._count(Counts(hits, hits), advance)
        try:
            rows = read_through(keys, compute, kept, batches=split, found=found)
        except StoreError as error:  # a full disk: what was put stays in memory, and no more is
            self._tell(error)
            rows = read_through(keys, compute, self._nothing(opened), batches=split)
        duplicates = max(len(keys) - hits - encoded, 0)
        self._count(Counts(duplicates, duplicates=duplicates), advance)
        return rows

    def _keep(self, opened: OpenedRows) -> None:
        """Commit what was put, and pack it now and then; what cannot be written stays in memory, and is told."""
        disk = opened.disk
        if disk is None:
            self._current.see_unchanged(opened)
            return
        with opened.store.lock:
            try:
                disk.flush()
                if len(disk.manifest.shards) >= self._pack_at:
                    disk.compact()
                    self._pack_at = len(disk.manifest.shards) + PACK_AFTER
            except StoreError as error:
                self._tell(error)
            items, seconds = self.counts.computed - self._noted[0], self.seconds - self._noted[1]
            if items and seconds >= NOTED_SECONDS:
                disk.mark_encoded(items, seconds)
                self._noted = self.counts.computed, self.seconds

    def _no_rows(self, opened: OpenedRows) -> Any:
        size = self._current.encoder.embedding_size
        shape = opened.inner.row_shape or (size or 0,)  # a function was perhaps never called
        empty = torch.empty((0, *(length or 0 for length in shape)), dtype=opened.inner.given_dtype)
        return PaddedSequences(empty, torch.empty(0, 0, dtype=torch.bool)) if None in shape else empty

    def _pace(self, opened: OpenedRows) -> float | None:
        items, seconds = self.counts.computed, self.seconds
        if not items and opened.disk is not None:
            items, seconds = opened.disk.manifest.effort
        return seconds / items if items else None

    def _take_time(self, seconds: float) -> None:
        self.seconds += seconds

    def _count(self, counts: Counts, advance: Advance) -> None:
        with self._counting:
            self.counts += counts
        if counts.asked:
            advance(counts.asked, counts)

    def _tell(self, error: StoreError) -> None:
        if str(error) != self._told:  # a service asks again and again
            self._told = str(error)
            logger.warning(
                "%s Until then items of encoder %r are encoded each time they are met.", error, self._current.name
            )
