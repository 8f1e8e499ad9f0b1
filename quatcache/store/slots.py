"""What lies in the shared memory of a slot cache, and how processes write and read it at the same time.

A slot is written under a lock of the operating system on one byte of the file, which a process that is killed gives up.
Its state says that it is set only once the data are there. So whoever dies in the middle leaves an empty slot, whatever
its bytes are.

A slot that is set is not written again, and a view of it stays as it is, unless somebody asks for that or clears the
cache. Then first its state goes back to empty, then its version goes up, and only then its data may change. Whoever
copied meanwhile looks at the version before and after, sees that it is another one, and has found nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from quatcache.store.protocol import Found
from quatcache.store.safetensors_writer import tensor_bytes
from quatcache.store.segment import MAGIC, Segment
from quatcache.store.slot_copies import copied_rows

__all__ = ["EMPTY", "NO_SLOT", "SET", "SLOT_DTYPES", "Indices", "SlotSpec", "SlotStats", "Slots"]

EMPTY, SET, NO_SLOT = 0, 1, 2
"""States of a sample, as stocaching numbers them."""

SLOT_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
        torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip
"""Dtypes by name. A name from a segment or a file is looked up here and never evaluated."""

Indices = npt.NDArray[np.int64]
"""Indices of samples: shape ``(n,)``, int64."""

_PAGE, _LINE = 4096, 64
_TALLIES, _TALLY_BYTES, _TALLY_LOCKS = 256, 16, 1 << 60


@dataclass(frozen=True)
class SlotSpec:
    """What is cached.

    Attributes:
        samples: Samples of the dataset.
        slots: How many of them have a slot, > 0.
        dims: Shape of one item.
        dtype: Its dtype.
        seed: Chooses which samples have a slot; None: the first ones, or all.
    """

    samples: int
    slots: int
    dims: tuple[int, ...]
    dtype: torch.dtype
    seed: int | None = None

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return math.prod(self.dims) * self.dtype.itemsize

    @property
    def spread(self) -> bool:
        """Whether the row of a sample has to be looked up."""
        return self.seed is not None

    def as_json(self) -> bytes:
        """Write it."""
        fields = {"samples": self.samples, "slots": self.slots, "dims": self.dims, "seed": self.seed}
        return json.dumps({**fields, "dtype": str(self.dtype).removeprefix("torch.")}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> SlotSpec:
        """Read what ``as_json`` wrote."""
        fields = json.loads(content)
        fields["dims"], fields["dtype"] = tuple(fields["dims"]), SLOT_DTYPES[fields["dtype"]]
        return cls(**fields)

    def __str__(self) -> str:
        """Describe it in a message."""
        spread = f" chosen by seed {self.seed}" if self.spread else ""
        return f"{self.slots} of {self.samples} samples{spread}, {self.dims} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class SlotStats:
    """What a shared cache holds, and how it was used.

    Attributes:
        samples: Samples of the dataset.
        slots: Those of them that have a slot.
        present: Slots that are set.
        hits: Reads that found their slot set, in all processes so far.
        misses: Reads that did not, of samples without a slot too.
        bytes: Shared memory that is taken.
    """

    samples: int
    slots: int
    present: int
    hits: int
    misses: int
    bytes: int


class _Layout(NamedTuple):
    """Where in a segment everything begins; a page for the description and one for the tallies come first."""

    states: int
    versions: int
    rows: int
    data: int
    size: int

    @classmethod
    def of(cls, spec: SlotSpec) -> _Layout:
        states = _PAGE + _TALLIES * _TALLY_BYTES
        versions = _aligned(states + spec.samples, _LINE)
        rows = _aligned(versions + 4 * spec.samples, _LINE)
        data = _aligned(rows + (8 * spec.samples if spec.spread else 0), _PAGE)
        return cls(states, versions, rows, data, data + spec.slots * spec.item_bytes)


def _aligned(place: int, size: int) -> int:
    return -(-place // size) * size


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
        row_of: For each sample the row of ``array``, if it is not its index.
        tally: The hits and misses that this process counts, once it does.
    """

    def __init__(self, segment: Segment) -> None:
        """View a segment that was initialised."""
        self.segment = segment
        length = int.from_bytes(segment[len(MAGIC) : len(MAGIC) + 4], "little")
        self.spec = spec = SlotSpec.from_json(segment[len(MAGIC) + 4 : len(MAGIC) + 4 + length])
        layout = _Layout.of(spec)
        self.states = np.frombuffer(segment, np.uint8, spec.samples, layout.states)
        self.state_of = memoryview(self.states)  # type: ignore[arg-type]
        self._versions = np.frombuffer(segment, np.uint32, spec.samples, layout.versions)
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
        return _Layout.of(spec).size

    @staticmethod
    def initialise(spec: SlotSpec, segment: Segment) -> None:
        """Write the description, and which samples have a slot."""
        description, layout = spec.as_json(), _Layout.of(spec)
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
        before = self._versions[indices]
        self.segment.order()
        positions = np.flatnonzero(self.states[indices] == SET)
        found = indices[positions]
        words = copied_rows(self._words, self.rows_of(found), shared=shared)
        values = words.view(-1).view(self.spec.dtype).view(len(found), *self.spec.dims)
        self.segment.order()
        same = self._versions[found] == before[positions]
        if not same.all():  # they were cleared, or written over, while they were copied
            positions, values = positions[same], values[torch.from_numpy(same)]
        tally = self.tally or self.claim_tally()
        tally[0] += len(positions)
        tally[1] += len(indices) - len(positions)
        return Found(positions, values)

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
        self._versions[indices] += 1
        self.segment.order()

    # counting

    def claim_tally(self) -> memoryview:
        """Find where this process may count: only one process adds to a number, so none is lost.

        The place of a process that has ended is taken, with what it had counted.
        """
        tallies = self._tallies()
        for place in range(_TALLIES):
            if self.segment.claim(_TALLY_LOCKS + place):
                break
        else:
            tallies, place = memoryview(bytearray(_TALLY_BYTES)).cast("Q"), 0  # nobody will hear of it
        self.tally = tally = tallies[2 * place : 2 * place + 2]
        return tally

    def stats(self) -> SlotStats:
        """Count slots, and the hits and misses of all processes."""
        tallies, spec = self._tallies(), self.spec
        present = int((self.states == SET).sum())
        return SlotStats(spec.samples, spec.slots, present, sum(tallies[::2]), sum(tallies[1::2]), len(self.segment))

    def _tallies(self) -> memoryview[int]:
        return memoryview(self.segment)[_PAGE : _PAGE + _TALLIES * _TALLY_BYTES].cast("Q")
