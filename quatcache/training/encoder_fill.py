"""One encoder of a fill: which of its rows are there, and encoding those that are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quatcache.encoders.frozen import FrozenEncoder
from quatcache.read_through import Counts, fill_through
from quatcache.store import DiskStore, Positions, RowStore, TensorStore
from quatcache.training.canary import Canary
from quatcache.training.extracted import ExtractedKeys
from quatcache.training.keying import Chunk, KeyScheme
from quatcache.training.memory import refuse_to_swap
from quatcache.training.placement import Placement
from quatcache.training.report import EncoderReport

__all__ = ["WINDOW", "EncoderFill"]

WINDOW = 16
"""Encoder batches of one chunk: items are sorted by length within a chunk, so that a batch has little padding."""


@dataclass
class EncoderFill:
    """One encoder that is being cached.

    Attributes:
        name: Its name in the model.
        scheme: How it keys items.
        store: Where its rows go.
        frozen: Makes the real encoder ready, once, when the first item must be encoded.
        length: Estimates the cost of an item.
        counts: What was done so far.
        extracted: Compares items of one extracted key; None with default keys.
        canary: Compares stored rows with what the encoder gives now; None for rows of this run only.
        seconds: Time in the encoder so far, collating included.
        noted: How many items, and seconds, were written down with the rows.
    """

    name: str
    scheme: KeyScheme
    store: RowStore
    frozen: Callable[[], FrozenEncoder]
    length: Callable[[Any], int]
    counts: Counts = field(default_factory=Counts)
    extracted: ExtractedKeys | None = None
    canary: Canary | None = None
    seconds: float = 0.0
    noted: tuple[int, float] = (0, 0.0)

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
            str(self.store.directory) if isinstance(self.store, DiskStore) else None,
            placement.reason,
            0 if self.canary is None else self.canary.compared,
            self.pace,
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

    def resolve(self, chunk: Chunk) -> Chunk:
        """Add the keys that rows are stored under, if they are others than those of the items."""
        return chunk if self.extracted is None else self.extracted.resolve(chunk, self.store)

    def fill(self, chunk: Chunk, batch_size: int) -> Counts:
        """Encode what the store lacks of a chunk."""
        items = chunk.items

        def compute(positions: Positions) -> torch.Tensor:
            encoder, started = self.frozen(), time.monotonic()
            rows = encoder.encode([items[position] for position in positions.tolist()])
            self.seconds += time.monotonic() - started
            return rows

        def batches(positions: Positions) -> Iterable[Positions]:
            lengths = np.array([self.length(items[position]) for position in positions.tolist()])
            ordered = positions[np.argsort(-lengths, kind="stable")]  # longest first: memory runs out at once or never
            return (ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size))

        self.verify(chunk)
        if isinstance(self.store, TensorStore):
            refuse_to_swap(self.name, self.store)
        keys = chunk.keys[self.scheme.row_column].reshape(-1, 2)
        counts = fill_through(keys, compute, self.store, batches=batches)
        self.counts += counts
        return counts
