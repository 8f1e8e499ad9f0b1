"""The canary: a few stored rows are encoded again and compared, where something may have changed unseen.

The identity covers all that an encoder says about itself. What the libraries under it do with that it cannot know: a
new version of a tokenizer library, of a kernel, another kind of hardware. So the environment of a fill is recorded with
its rows, and in another one some of them are encoded once more before any is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from quatcache.encoders.frozen import FrozenEncoder
from quatcache.errors import StaleRowsError
from quatcache.keys import KeyArray, distinct
from quatcache.sequences import PaddedSequences
from quatcache.store import DiskStore

__all__ = ["Canary", "relative_differences"]

logger = logging.getLogger(__name__)

ROWS = 8
"""Rows that ``verify="auto"`` compares."""

NONE = "(none)"

_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest length of the difference over the length of the row. Padding changes a float32 row by 1e-7 of it, another
kind of kernel by 1e-5, reduced precision inside matrix products by up to 1e-3; another model by about 1."""


class Canary:
    """Compares rows of one store with what the encoder gives now.

    Args:
        name: The encoder's name in its model.
        store: Its rows.
        environment: Library versions and hardware now.
        verify: ``"auto"``: :data:`ROWS` rows, if the environment is not one in which the rows were made or found right;
            a number: so many rows in any case; 0: none.
        encoder: Makes the real encoder ready.
        batch_size: Items per encoder call, at most.
        narrowest: Gives the dtype with the coarsest rounding on the way to a row, besides those of the store, once the
            encoder is loaded; None: these.

    Attributes:
        wanted: Rows still to be compared.
        compared: Rows that were compared, and agreed.
    """

    def __init__(
        self,
        name: str,
        store: DiskStore,
        environment: Mapping[str, str],
        verify: Literal["auto"] | int,
        encoder: Callable[[], FrozenEncoder],
        batch_size: int,
        narrowest: Callable[[], torch.dtype | None] = lambda: None,
    ) -> None:
        """Compare nothing yet."""
        self.name = name
        self._store = store
        self._environment = environment
        self._encoder = encoder
        self._batch_size = batch_size
        self._known: tuple[Mapping[str, str], ...] = ({},)
        self._narrowest = narrowest
        self._verify = verify
        self.wanted = 0
        self.compared = 0
        self._told = 0
        self._before = 0

    def begin(self, parts: int) -> int:
        """Start with another dataset; the store may have got rows since.

        Args:
            parts: How many datasets there are: each gets its part of the rows.

        Returns:
            How many rows are to be compared.
        """
        self._known = (self._store.manifest.environment, *self._store.manifest.verified)
        due = self._environment not in self._known
        self.wanted = (ROWS if due else 0) if self._verify == "auto" else self._verify
        self.wanted = -(-self.wanted // parts) if len(self._store) else 0
        self._before = self._store.numbered
        return self.wanted

    def conclude(self) -> None:
        """Record the environment as one in which the encoder gives the rows that are stored, if that was seen."""
        if self.compared > self._told:
            self._told = self.compared
            logger.info(
                "Encoder %r: %d stored rows agree with what it gives now%s.", self.name, self.compared, self._changes()
            )
            self._store.mark_verified(self._environment)

    def check(self, items: Sequence[Any], keys: KeyArray) -> None:
        """Compare the rows of some items, until as many as wanted were.

        Args:
            items: N items, some of which may have a row.
            keys: Their keys ``(N, 2)``.

        Raises:
            StaleRowsError: A row differs by more than the tolerance.
        """
        if not self.wanted:
            return
        firsts, _ = distinct(keys)
        rows = self._store.rows_of(keys[firsts])
        present = firsts[(rows >= 0) & (rows < self._before)]  # rows of this run agree with themselves
        if not len(present):
            return
        chosen = np.random.default_rng().permutation(present)[: self.wanted]  # its own: training draws from the global
        stored = self._store.get_many(keys[chosen]).values
        now = self._encode([items[position] for position in chosen.tolist()])
        differences = relative_differences(stored, now)
        tolerance = self._tolerance(stored.dtype)
        wrong = int((~(differences <= tolerance)).sum())
        if wrong:
            raise StaleRowsError(
                f"{wrong} of {len(chosen)} rows of encoder {self.name!r} in {self._store.directory} differ from what "
                f"it gives now, by up to {float(differences.max()):.3g} of their length (allowed: {tolerance:g})"
                f"{self._changes()}; delete that directory to encode afresh, or use the rows as they are with "
                "verify=0."
            )
        self.wanted -= len(chosen)
        self.compared += len(chosen)

    def _encode(self, items: Sequence[Any]) -> Any:
        """Encode items as a fill would, rounded as their rows were."""
        encoder, size = self._encoder(), self._batch_size
        parts = [encoder.encode(items[start : start + size]).cpu() for start in range(0, len(items), size)]
        whole = PaddedSequences.concatenate if isinstance(parts[0], PaddedSequences) else torch.cat
        rows, dtype = whole(parts), self._store.manifest.dtype
        return rows if dtype is None or not rows.dtype.is_floating_point else rows.to(dtype).to(rows.dtype)

    def _tolerance(self, given: torch.dtype) -> float:
        dtypes = (given, self._store.manifest.dtype, self._narrowest())
        return max((_TOLERANCES[dtype] for dtype in dtypes if dtype in _TOLERANCES), default=0.0)

    def _changes(self) -> str:
        if not self._known[0] or self._environment in self._known:
            return ""
        old, new = self._known[0], self._environment
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", after " + ", ".join(
            f"{name} {old.get(name, '(none)')} -> {new.get(name, '(none)')}" for name in names
        )


def relative_differences(stored: Any, now: Any) -> torch.Tensor:
    """Measure how far rows are from each other, each relative to the length of the stored one.

    Args:
        stored: ``(n, *shape)``; or sequences, as one row each.
        now: Of the same shape and dtype, else each row counts as infinitely far.

    Returns:
        ``(n,)`` float64: 0 for equal rows; for whole numbers 0 or infinity.

    Example:
        >>> relative_differences(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
        tensor([0.1000], dtype=torch.float64)
    """
    unlike = torch.full((len(stored),), float("inf"), dtype=torch.float64)
    if isinstance(stored, PaddedSequences) and isinstance(now, PaddedSequences):
        differences = relative_differences(stored.values[:, : now.shape[1]], now.values[:, : stored.shape[1]])
        return torch.where(stored.lengths == now.lengths, differences, unlike)
    if (type(stored), stored.shape, stored.dtype) != (type(now), now.shape, now.dtype):
        return unlike
    one, other = stored.reshape(len(stored), -1), now.reshape(len(now), -1)
    if not stored.is_floating_point():
        return torch.where((one == other).all(dim=1), 0.0, float("inf")).double()
    one, other = one.double(), other.double()
    length: torch.Tensor = torch.linalg.vector_norm(one, dim=1)
    distance: torch.Tensor = torch.linalg.vector_norm(one - other, dim=1)
    return distance / length.clamp_min(1e-12)
