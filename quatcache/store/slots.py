"""Slots in shared memory: how processes write and read them at the same time.

A slot is written under a lock of the operating system on one byte of the file, which a process that is killed gives up.
Its state says that it is set only once the data are there. So whoever dies in the middle leaves an empty slot, whatever
its bytes are.

A slot that is set is not written again, and a view of it stays as it is, unless somebody asks for that or clears the
cache. Then first its state goes back to empty, and it is set again only when its data are there and its version has
gone up. Whoever copied meanwhile looks at the state once more and at the version behind it, sees that the slot is empty
or the version another one, and has found nothing. That holds wherever a writer is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from quatcache.store.protocol import Found
from quatcache.store.safetensors_writer import tensor_bytes
from quatcache.store.segment import MAGIC, Segment
from quatcache.store.slot_copies import copied_rows
from quatcache.store.slot_layout import (
    EMPTY,
    NO_SLOT,
    PAGE,
    SET,
    TALLIES,
    TALLY_BYTES,
    Indices,
    SlotLayout,
    SlotSpec,
    SlotStats,
)

__all__ = ["Slots"]

_TALLY_LOCKS = 1 << 60

_LIVE: WeakSet[Slots] = WeakSet()


def _forked() -> None:
    """A new process counts for itself."""
    for slots in list(_LIVE):
        slots.tally = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Slots:
    """The slots of a segment.

    Attributes:
        segment: The shared memory.
        spec: What is cached.
        array: The data ``(slots, *dims)``.
        states: For each sample ``EMPTY``, ``SET`` or ``NO_SLOT``, uint8.
        state_of: The same; a single one is read faster.
        versions: For each sample how often its slot was written, uint32.
        version_of: The same; a single one is read faster.
        row_of: For each sample the row of ``array``, if it is not its index.
        tally: The hits and misses that this process counts, once it does.
    """

    def __init__(self, segment: Segment) -> None:
        """View a segment that was initialised."""
        self.segment = segment
        length = int.from_bytes(segment[len(MAGIC) : len(MAGIC) + 4], "little")
        self.spec = spec = SlotSpec.from_json(segment[len(MAGIC) + 4 : len(MAGIC) + 4 + length])
        layout = SlotLayout.of(spec)
        self.states = np.frombuffer(segment, np.uint8, spec.samples, layout.states)
        self.state_of = memoryview(self.states)  # type: ignore[arg-type]
        self.versions = np.frombuffer(segment, np.uint32, spec.samples, layout.versions)
        self.version_of = memoryview(self.versions)  # type: ignore[arg-type]
        self._rows = np.frombuffer(segment, np.int64, spec.samples, layout.rows) if spec.spread else None
        self.row_of = None if self._rows is None else memoryview(self._rows)  # type: ignore[arg-type]
        raw = np.frombuffer(segment, np.uint8, spec.slots * spec.item_bytes, layout.data)
        self._raw = raw.reshape(spec.slots, spec.item_bytes)
        # rows are copied as long words: not every dtype has kernels of its own, and those of bytes are slow
        self._words = torch.from_numpy(self._raw).view(torch.uint8 if spec.item_bytes % 8 else torch.int64)
        self.tally: memoryview | None = None
        _LIVE.add(self)
        self.array = self._words.view(-1).view(spec.dtype).view(spec.slots, *spec.dims)

    @staticmethod
    def size(spec: SlotSpec) -> int:
        """Give the bytes of the segment."""
        return SlotLayout.of(spec).size

    @staticmethod
    def initialise(spec: SlotSpec, segment: Segment) -> None:
        """Write the description, and which samples have a slot."""
        description, layout = spec.as_json(), SlotLayout.of(spec)
        head = len(description).to_bytes(4, "little") + description
        segment[len(MAGIC) : len(MAGIC) + len(head)] = head
        states = np.frombuffer(segment, np.uint8, spec.samples, layout.states)
        if not spec.spread:
            states[spec.slots :] = NO_SLOT
            return
        chosen = np.sort(np.random.default_rng(spec.seed).choice(spec.samples, spec.slots, replace=False))
        states[:] = NO_SLOT
        states[chosen] = EMPTY
        np.frombuffer(segment, np.int64, spec.samples, layout.rows)[chosen] = np.arange(spec.slots)

    def rows_of(self, indices: Indices) -> Indices:
        """Give the rows of samples that have a slot."""
        return indices if self._rows is None else self._rows[indices]

    def row_bytes(self, indices: Indices) -> npt.NDArray[np.uint8]:
        """Copy the bytes of samples that have a slot, ``(n, item_bytes)``, whatever they are."""
        return self._raw[self.rows_of(indices)]

    # reading

    def read(self, indices: Indices, *, shared: bool = False) -> Found:
        """Copy the items of those samples whose slots are set.

        Args:
            indices: Of samples.
            shared: Put the copy into shared memory.
        """
        before = self.versions[indices]
        self.segment.order()
        positions = np.flatnonzero(self.states[indices] == SET)
        found = indices[positions]
        words = copied_rows(self._words, self.rows_of(found), shared=shared)
        values = words.view(-1).view(self.spec.dtype).view(len(found), *self.spec.dims)
        self.segment.order()
        same = self.states[found] == SET
        self.segment.order()
        same &= self.versions[found] == before[positions]
        if not same.all():  # they were cleared, or written over, while they were copied
            positions, values = positions[same], values[torch.from_numpy(same)]
        tally = self.tally or self.claim_tally()
        tally[0] += len(positions)
        tally[1] += len(indices) - len(positions)
        return Found(positions, values)

    def read_one(self, index: int) -> torch.Tensor | None:
        """Copy the item of a sample, if its slot is set."""
        item = None
        before = self.version_of[index]
        self.segment.order()
        if self.state_of[index] == SET:
            item = self.array[index if self.row_of is None else self.row_of[index]].clone()
            self.segment.order()
            state = self.state_of[index]
            self.segment.order()
            if state != SET or self.version_of[index] != before:
                item = None
        tally = self.tally or self.claim_tally()
        tally[item is None] += 1
        return item

    # writing

    def write_one(self, index: int, item: torch.Tensor, *, overwrite: bool) -> bool:
        """Write the slot of a sample, and say whether it holds that item now.

        Args:
            index: Of a sample that has a slot.
            item: On the CPU, of the shape and dtype of the slot.
            overwrite: Write it also if it is set.
        """
        row = index if self.row_of is None else self.row_of[index]
        slot = self.array[row]
        with self.segment.locked(row):
            if self.state_of[index] == SET:
                if not overwrite:
                    return False
                if bytes(tensor_bytes(item)) == self._raw[row].tobytes():
                    return True
                self._withdraw(np.array([index]))
            slot.copy_(item)
            self.version_of[index] = (self.version_of[index] + 1) % (1 << 32)
            self.segment.order()
            self.state_of[index] = SET
        return True

    def write(self, indices: Indices, source: npt.NDArray[np.uint8], *, overwrite: bool) -> None:
        """Write the slots of samples, each once.

        Args:
            indices: Of distinct samples that have a slot, n > 0.
            source: Bytes of their items ``(n, item_bytes)``.
            overwrite: Write also those that are set.
        """
        rows = self.rows_of(indices)
        first = int(rows.min())
        with self.segment.locked(first, int(rows.max()) - first + 1):
            fresh = self.states[indices] != SET
            if overwrite:
                taken = np.flatnonzero(~fresh)
                changed = taken[(self._raw[rows[taken]] != source[taken]).any(axis=1)]
                self._withdraw(indices[changed])
                fresh[changed] = True
            if fresh.all():
                self._raw[rows] = source
            else:
                indices = indices[fresh]
                self._raw[rows[fresh]] = source[fresh]
            self.versions[indices] += 1
            self.segment.order()
            self.states[indices] = SET

    def write_all(self, parts: Iterable[tuple[Indices, npt.NDArray[np.uint8]]]) -> int:
        """Write those slots that are empty, and set them only when the parts have come to their end without an error.

        Args:
            parts: Indices of distinct samples, and the bytes of their items.

        Returns:
            How many were written.
        """
        with self.segment.locked(0, self.spec.slots):
            written = []
            for indices, source in parts:
                empty = self.states[indices] == EMPTY
                self._raw[self.rows_of(indices[empty])] = source[empty]
                self.versions[indices[empty]] += 1
                written.append(indices[empty])
            self.segment.order()
            for indices in written:
                self.states[indices] = SET
        return sum(map(len, written))

    def clear(self) -> None:
        """Empty all slots."""
        with self.segment.locked(0, self.spec.slots):
            self._withdraw(np.flatnonzero(self.states == SET))

    def _withdraw(self, indices: Indices) -> None:
        """Empty slots whose data may change then."""
        self.states[indices] = EMPTY
        self.segment.order()

    # counting

    def claim_tally(self) -> memoryview:
        """Find where this process may count: only one process adds to a number, so none is lost.

        The place of a process that has ended is taken, with what it had counted.
        """
        tallies = self._tallies()
        for place in range(TALLIES):
            if self.segment.claim(_TALLY_LOCKS + place):
                break
        else:
            tallies, place = memoryview(bytearray(TALLY_BYTES)).cast("Q"), 0  # nobody will hear of it
        self.tally = tally = tallies[2 * place : 2 * place + 2]
        return tally

    def stats(self) -> SlotStats:
        """Count slots, and the hits and misses of all processes."""
        tallies, spec = self._tallies(), self.spec
        present = int((self.states == SET).sum())
        return SlotStats(spec.samples, spec.slots, present, sum(tallies[::2]), sum(tallies[1::2]), len(self.segment))

    def _tallies(self) -> memoryview[int]:
        return memoryview(self.segment)[PAGE : PAGE + TALLIES * TALLY_BYTES].cast("Q")
