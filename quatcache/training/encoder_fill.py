"""One encoder of a fill: which of its rows are there, and encoding those that are not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.encoders.calls import CallPlan, EncoderCalls
from quatcache.encoders.canary import Canary
from quatcache.encoders.extracted import ExpectedRows, ExtractedKeys
from quatcache.encoders.frozen import FrozenEncoder
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import CacheMissError, ConfigError, StoreError, shorten
from quatcache.keys import KeyArray
from quatcache.read_through import Counts, fill_through, read_through
from quatcache.store import BudgetStore, DiskStore, Positions, RowStore, TensorStore
from quatcache.training.keying import Chunk
from quatcache.training.lightning import isolate_rng
from quatcache.training.memory import refuse_to_swap
from quatcache.training.placement import Placement
from quatcache.training.report import EncoderReport
from quatcache.training.shared_steps import SharedSteps
from quatcache.units import readable_size

logger = logging.getLogger(__name__)

__all__ = ["EncoderFill"]

SHARED_SECONDS = 0.01
"""What encoding the misses of a step must take for ranks to share it: sharing takes one or two milliseconds itself."""


@dataclass
class EncoderFill:
    """One encoder that is being cached.

    Attributes:
        name: Its name in the model.
        scheme: How it keys items.
        store: Where its rows go.
        frozen: Makes the real encoder ready, once, when the first item must be encoded.
        calls: Splits items into calls.
        counts: What was done so far.
        extracted: Compares items of one extracted key; None with default keys.
        canary: Compares stored rows with what the encoder gives now; None for rows of this run only.
        dtype: Storage dtype of the store.
        max_size: Budget in bytes for its rows; None: no limit.
        on_miss: What to do with an item whose row is not there while a model trains: ``"encode"`` or ``"error"``.
        persists: Whether its rows outlive the run, if they are on disk.
        shared: Shares what is encoded in steps with other ranks; None: this process encodes whatever it lacks.
        declines: Whether no more rows are kept, though there may be room in the budget.
        fill_seconds: Time in the encoder for rows that were kept while a model trained.
        in_steps: Items that were encoded while a model trained.
        kept_in_steps: Those of them whose rows were kept.
        seconds: Time in the encoder so far, collating included.
        noted: How many items, and seconds, were written down with the rows.
    """

    name: str
    scheme: KeyScheme
    store: RowStore
    frozen: Callable[[], FrozenEncoder]
    calls: CallPlan
    counts: Counts = field(default_factory=Counts)
    extracted: ExtractedKeys | None = None
    canary: Canary | None = None
    dtype: torch.dtype | None = None
    max_size: int | None = None
    on_miss: str = "encode"
    in_steps: int = 0
    kept_in_steps: int = 0
    declines: bool = False
    fill_seconds: float = 0.0
    persists: bool = True
    shared: SharedSteps | None = None
    seconds: float = 0.0
    noted: tuple[int, float] = (0, 0.0)
    _next_look: float = 0.0
    _budget: BudgetStore | None = field(default=None, init=False, repr=False)  # of this store: no copy takes it along

    @property
    def pace(self) -> float | None:
        """Seconds that the encoder takes for an item: in this run, else when the rows were made; None: not known."""
        items, seconds = self.counts.computed, self.seconds
        if not items and isinstance(self.store, DiskStore):
            items, seconds = self.store.manifest.effort
        return seconds / items if items else None

    def report(self, placement: Placement) -> EncoderReport:
        """Say what was done, and where the rows are now."""
        return EncoderReport(
            self.name,
            placement.tier.name,
            len(self.store),
            self.store.nbytes,
            self.counts.asked,
            self.counts.computed,
            self.counts.hits,
            self.counts.duplicates,
            str(self.store.directory) if isinstance(self.store, DiskStore) and self.persists else None,
            placement.reason,
            0 if self.canary is None else self.canary.compared,
            self.pace,
            in_steps=self.in_steps,
        )

    def note_effort(self) -> None:
        """Write down with the rows how long encoding them took."""
        items, seconds = self.counts.computed - self.noted[0], self.seconds - self.noted[1]
        if items and isinstance(self.store, DiskStore):
            self.store.mark_encoded(items, seconds)
            self.noted = self.counts.computed, self.seconds

    def verify(self, chunk: Chunk) -> None:
        """Hold stored rows against the encoder, as long as the canary wants some.

        Raises:
            StaleRowsError: They differ.
        """
        if self.canary is None or not self.canary.wanted:
            return
        own = chunk.keys.get(self.scheme.content_column, chunk.keys[self.name])  # rows go by content where it has a key
        self.canary.check(chunk.items, own.reshape(-1, 2))

    def conclude(self) -> None:
        """Take note of what the canary found, once it has looked at every dataset."""
        if self.canary is not None:
            self.canary.conclude()

    def take_time(self, seconds: float) -> None:
        """Count time that was spent in the encoder."""
        self.seconds += seconds

    def resolve(self, chunk: Chunk, rows: ExpectedRows | None = None) -> Chunk:
        """Add the keys that rows are stored under, if they are others than those of the items.

        Args:
            chunk: As it was read.
            rows: What counts as a row that is there; None: what is in the store.
        """
        if self.extracted is None:
            return chunk
        keys, content = chunk.keys[self.name], chunk.keys.get(self.scheme.content_column)
        flat = None if content is None else content.reshape(-1, 2)
        found = self.extracted.resolve(chunk.items, keys.reshape(-1, 2), flat, self.store if rows is None else rows)
        return chunk._replace(keys={**chunk.keys, self.scheme.row_column: found.reshape(keys.shape)})

    @property
    def _kept(self) -> RowStore:
        limit = 0 if self.declines else self.max_size
        if limit is None:
            return self.store
        if self._budget is None or self._budget.max_size != limit:  # kept: it knows the size of a row
            self._budget = BudgetStore(self.store, limit, self.dtype)
        return self._budget

    def decline(self, error: Exception) -> None:
        """Keep no more rows: training can go on without.

        Args:
            error: Why.
        """
        if not self.declines:
            self.declines = True
            self._stop_sharing()
            logger.warning("%s Until then items of encoder %r are encoded each time they are met.", error, self.name)

    def _decline_if_short(self) -> None:
        """Look at most once a second how much memory is left."""
        now = time.monotonic()
        if isinstance(self.store, TensorStore) and not self.declines and now >= self._next_look:
            self._next_look = now + 1.0
            try:
                refuse_to_swap(self.name, self.store)
            except ConfigError as error:
                self.decline(error)

    def lacking(self, keys: KeyArray, rows: npt.NDArray[np.int64] | None = None) -> Positions:
        """Give the positions of the keys that a fill encodes: absent ones whose rows fit into the budget.

        Args:
            keys: Shape ``(N, 2)``.
            rows: Their row numbers as the store gives them now, N in all; None: they are looked up.
        """
        missing = self.store.missing(keys) if rows is None else np.flatnonzero(rows < 0)
        return missing[self.affordable(keys[missing])]

    def affordable(self, keys: KeyArray) -> Positions:
        """Give the positions of the keys ``(N, 2)`` that are present, or whose rows fit into the budget."""
        kept = self._kept
        return kept.affordable(keys) if isinstance(kept, BudgetStore) else np.arange(len(keys))

    def refuse_misses(self, name: str, numbers: npt.NDArray[np.int64]) -> None:
        """Refuse a budget that is too small, if a step must not encode what is beyond it.

        Args:
            name: What the dataset is for, for the message.
            numbers: Row numbers of its items, -1 where there is no row.

        Raises:
            ConfigError: Some items have none, and ``on_miss`` is ``"error"``.
        """
        missing = int((numbers < 0).sum())
        if missing and self.on_miss == "error":
            raise ConfigError(
                f"max_size leaves {missing:,} of {len(numbers):,} items of the {name} dataset without a row of encoder "
                f"{self.name!r}, and on_miss is 'error'; raise max_size ({readable_size(self.store.nbytes)} hold "
                f"{len(self.store):,} rows), or use on_miss='encode'."
            )

    def fill(self, chunk: Chunk, batch_size: int) -> Counts:
        """Encode what the store lacks of a chunk, as far as the budget allows."""
        self.verify(chunk)
        if isinstance(self.store, TensorStore):
            refuse_to_swap(self.name, self.store)
        keys, items, kept = chunk.keys[self.scheme.row_column].reshape(-1, 2), chunk.items, self._kept
        if isinstance(kept, BudgetStore):
            positions = self.affordable(keys)
            keys, items = keys[positions], [items[position] for position in positions.tolist()]
        calls = EncoderCalls(self.frozen, self.calls, items, batch_size, dtype=self.dtype, took=self.take_time)
        counts = fill_through(keys, calls.encode, kept, batches=calls.split)
        self.counts += counts
        return counts

    def answer(self, chunk: Chunk, batch_size: int) -> Any:
        """Give the rows of a chunk, in the order of a batch: the first items of all samples before the second ones.

        What the store lacks is encoded, unless another rank encodes it, and stored as far as the budget allows.

        Returns:
            ``(k * n, *row_shape)`` on the device of the store.

        Raises:
            CacheMissError: A row is not there, and ``on_miss`` is ``"error"``.
        """
        self.verify(chunk)
        order = chunk.batch_order
        keys = chunk.keys[self.scheme.row_column].reshape(-1, 2)[order]
        items = [chunk.items[position] for position in order.tolist()]
        found, held = self.store.get_many(keys), len(self.store)
        missing = np.delete(np.arange(len(keys)), found.positions)
        if len(missing) and self.on_miss == "error":
            raise CacheMissError(
                f"item {shorten(items[missing[0]])} has no row of encoder {self.name!r}, and on_miss is 'error'; fill "
                "the cache with the data of this run, or use on_miss='encode'."
            )
        if len(missing):
            self._decline_if_short()
        before = self.seconds
        calls = _StepCalls(self, items, batch_size, keys)
        with isolate_rng() if len(missing) else nullcontext():  # the step must draw what it draws without a cache
            try:
                rows = read_through(keys, calls.encode, self._kept, batches=calls.split, found=found)
            except StoreError as error:  # a full disk: what was committed is kept, and the rest stays in memory
                self.decline(error)
                rows = read_through(keys, calls.encode, self._kept, batches=calls.split)
            except BaseException:
                self._stop_sharing()  # nobody may wait for what was claimed and not encoded
                raise
        encoded = calls.encoded
        self.counts += Counts(len(keys), len(keys) - len(missing), len(missing) - encoded, encoded)
        self.in_steps += encoded
        if encoded:
            kept = min(len(self.store) - held, encoded)  # rows of other ranks may have come as well
            self.kept_in_steps += kept
            self.fill_seconds += (self.seconds - before) * kept / encoded
        return rows

    def shares(self, items: int) -> bool:
        """Say whether so many items take long enough that other ranks should not encode them as well."""
        return self.shared is not None and (self.pace is None or self.pace * items >= SHARED_SECONDS)

    def _stop_sharing(self) -> None:
        if self.shared is not None:
            self.shared.leave()


class _StepCalls(EncoderCalls):
    """The calls of a step, in which other ranks may encode some of the items (keys ``(N, 2)``), and hand on their rows.

    Attributes:
        encoded: Items that were encoded here so far.
    """

    def __init__(self, fill: EncoderFill, items: Sequence[Any], batch_size: int, keys: KeyArray) -> None:
        # a step has few calls: no thread in training
        super().__init__(fill.frozen, fill.calls, items, batch_size, dtype=fill.dtype, took=fill.take_time, ahead=False)
        self._fill = fill
        self.encoded = 0
        self._keys = keys
        self._given: Any = None

    def split(self, positions: Positions) -> Iterator[Positions]:
        fill, keys = self._fill, self._keys[positions]
        shared, self._given = fill.shared, None
        turn = shared.claim(fill.store, keys, fill.affordable(keys)) if shared and fill.shares(len(keys)) else None
        if shared is None or turn is None:
            yield from super().split(positions)
            return
        if len(turn.own):
            yield from super().split(positions[turn.own])
        shared.hand_on(turn)  # before this rank waits for any other
        for which, self._given in shared.rows_of_others(turn):
            yield positions[which]
        self._given = None
        if len(turn.lost):
            yield from super().split(positions[turn.lost])

    def encode(self, positions: Positions) -> Any:
        """Encode the call that was split off last, or give the rows that another rank has handed on."""
        if self._given is not None:
            return self._given
        self.encoded += len(positions)
        return super().encode(positions)
