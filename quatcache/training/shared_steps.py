"""What several ranks encode while they train, once in total: who claims an item first encodes it, and hands on its row.

Rows reach other ranks through the store only when they are committed, which is too rare for a step that meets the same
item. So a rank that has encoded what it claimed in a step leaves these rows in a file beside the claims, until they are
committed. A rank that lacks a row which another one claimed waits for that file.

No two ranks wait for each other: a rank waits only when it has handed on everything that it claimed, and between a
claim and that moment it does nothing that needs another rank. For that reason it lets its device finish before it
claims: what was queued there, a sum of gradients above all, may itself be waiting for the rank that is to wait now.
Whoever meets an error leaves the folder, and whoever leaves or dies is waited for no longer: then the others encode
for themselves, as they do for all that they cannot find.

A request for single rows, which their owner would answer, was rejected: the owner may itself be waiting for the asking
rank, in the backward pass. So was a collective, for steps need not lack rows on all ranks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quatcache.errors import FormatError, StoreError
from quatcache.keys import KeyArray
from quatcache.sequences import PaddedSequences
from quatcache.store import DiskStore, Positions
from quatcache.store.parts import Claims
from quatcache.store.ragged import RaggedRows
from quatcache.store.shards import as_tensors, keys_and_rows
from quatcache.training.distributed import Together

__all__ = ["SharedSteps", "Turn"]

logger = logging.getLogger(__name__)

_NUMBERS = 1 << 32
"""A claim says where its row will be: the rank times this, and the number of its file."""


class _Left(NamedTuple):
    """A file that this rank left.

    Attributes:
        number: Its number.
        store: Where its rows are, too.
        numbered: How many row numbers were given out there when all of them were put.
    """

    number: int
    store: DiskStore
    numbered: int

    @property
    def is_committed(self) -> bool:
        return self.store.numbered - self.store.pending >= self.numbered


@dataclass
class Turn:
    """What one encoder lacks in one step, dealt out.

    Attributes:
        store: Its rows.
        keys: The distinct keys ``(n, 2)`` that it lacks.
        own: Positions of those that this rank encodes.
        claimed: Those of them that it hands on.
        others: Positions of those that other ranks encode.
        places: Where their rows will be, one for each.
        lost: Positions of those that cannot be had, after all were looked for; they are encoded here.
    """

    store: DiskStore
    keys: KeyArray
    own: Positions
    claimed: Positions
    others: Positions
    places: npt.NDArray[np.int64]
    lost: Positions = field(default_factory=lambda: np.empty(0, np.int64))


class SharedSteps:
    """Shares what is encoded in the steps of one run among its ranks.

    Args:
        together: The ranks; this one has entered their folder.
        device: Where encoders compute.
    """

    def __init__(self, together: Together, device: torch.device) -> None:
        """Claim nothing yet."""
        self._together = together
        self._folder = together.folder
        self._device = device
        self._claims: dict[str, Claims] = {}
        self._number = 0
        self._files: deque[_Left] = deque()
        self._left = False

    def claim(self, store: Any, keys: KeyArray, kept: Positions) -> Turn | None:
        """Deal out what a step lacks; afterwards :meth:`hand_on` must be called, or :meth:`leave`.

        Args:
            store: Where rows are put.
            keys: Distinct keys ``(n, 2)`` that it lacks.
            kept: Positions of those whose rows will be kept, ascending; the others are encoded wherever they are met.

        Returns:
            Who encodes what; None: this rank encodes everything, and hands on nothing.
        """
        if self._left or not len(kept) or not isinstance(store, DiskStore):
            return None
        _finish(self._device)
        name, self._number = store.directory.name, self._number + 1
        claims = self._claims.setdefault(name, self._folder.claims(name))
        try:
            places = claims.deal(keys[kept], self._folder.rank * _NUMBERS + self._number)
        except StoreError as error:
            self._give_up(error)
            return None
        # what this rank claimed and lost, it encodes again
        elsewhere = (places >= 0) & (places // _NUMBERS != self._folder.rank)
        others = kept[elsewhere]
        return Turn(store, keys, np.delete(np.arange(len(keys)), others), kept[places < 0], others, places[elsewhere])

    def hand_on(self, turn: Turn) -> None:
        """Leave the rows that were claimed for the others, once they were put into the store."""
        if not len(turn.claimed) or self._left:
            return
        keys = turn.keys[turn.claimed]
        found = turn.store.get_many(keys)  # what a budget declined after all, the others find missing
        ragged = isinstance(found.values, PaddedSequences)
        tensors = as_tensors(keys[found.positions], RaggedRows.of(found.values) if ragged else found.values)
        try:
            self._folder.write(self._file(self._folder.rank, self._number), {"ragged": ragged}, tensors)
            self._files.append(_Left(self._number, turn.store, turn.store.numbered))
            self._remove_committed()
        except StoreError as error:
            self._give_up(error)

    def rows_of_others(self, turn: Turn) -> Iterator[tuple[Positions, Any]]:
        """Wait for the rows that other ranks encode.

        Yields:
            Positions, and their rows; what cannot be had is in :attr:`Turn.lost` when there are no more.

        Raises:
            StoreError: Rows of this process cannot be committed.
        """
        lost, gone = [turn.lost], [turn.lost]
        for place in np.unique(turn.places).tolist():
            which = turn.others[turn.places == place]
            found = self._wait_for(*divmod(place, _NUMBERS))
            if found is None:
                gone.append(which)
                continue
            at = _places_of(turn.keys[which], found[0])
            if (at >= 0).any():
                rows = found[1][torch.from_numpy(at[at >= 0])]
                yield which[at >= 0], rows.padded() if isinstance(rows, RaggedRows) else rows
            lost.append(which[at < 0])
        missing = np.concatenate(gone)
        if len(missing):  # committed by now, or its rank is gone
            turn.store.refresh()
            committed = turn.store.get_many(turn.keys[missing])
            if len(committed.positions):
                yield missing[committed.positions], committed.values
            lost.append(np.delete(missing, committed.positions))
        turn.lost = np.sort(np.concatenate(lost))

    def leave(self) -> None:
        """Share nothing from now on, and have nobody wait for this rank."""
        if not self._left:
            self._left = True
            self._folder.leave()

    def _give_up(self, error: StoreError) -> None:
        logger.warning("%s Until then each rank encodes what it meets.", error)
        self.leave()

    def _wait_for(self, rank: int, number: int) -> tuple[KeyArray, Any] | None:
        """Give what a rank has handed on with one file; None: the file is gone, or will never be there."""
        name = self._file(rank, number)

        def is_there() -> bool:
            return self._folder.has(name) or self._committed(rank) >= number

        if not is_there():
            self._together.wait(rank, is_there)
        found = self._folder.read(name)
        if found is None:
            return None
        try:
            keys, rows = keys_and_rows(self._folder.path / name, found[1], ragged=found[0].get("ragged") is True)
        except FormatError:
            return None
        return keys.numpy(), rows

    def _committed(self, rank: int) -> int:
        """Give the number of the last file that a rank has removed, for its rows are in the store; 0: none."""
        found = self._folder.read(f"committed-{rank}")
        number = 0 if found is None else found[0].get("number")
        return number if isinstance(number, int) else 0

    def _remove_committed(self) -> None:
        """Remove the files whose rows others find in the store, but say so before."""
        done: list[_Left] = []
        while self._files and self._files[0].is_committed:
            done.append(self._files.popleft())
        if done:
            self._folder.write(f"committed-{self._folder.rank}", {"number": done[-1].number}, {})
        for one in done:
            self._folder.remove(self._file(self._folder.rank, one.number))

    @staticmethod
    def _file(rank: int, number: int) -> str:
        return f"step-{rank}-{number}"


def _places_of(keys: KeyArray, among: KeyArray) -> npt.NDArray[np.int64]:
    """Find some keys among those of one file, -1 for those that are not there: too few for a :class:`KeyIndex`."""
    places = {key.tobytes(): place for place, key in enumerate(among)}
    return np.array([places.get(key.tobytes(), -1) for key in keys], np.int64)


def _finish(device: torch.device) -> None:
    """Wait until a device has done everything that was queued on it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
