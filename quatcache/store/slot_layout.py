"""What lies where in the shared memory of a slot cache: a description, tallies, states, versions, rows and the data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "EMPTY",
    "NO_SLOT",
    "PAGE",
    "SET",
    "SLOT_DTYPES",
    "TALLIES",
    "TALLY_BYTES",
    "Indices",
    "SlotLayout",
    "SlotSpec",
    "SlotStats",
]

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

PAGE, _LINE = 4096, 64
TALLIES, TALLY_BYTES = 256, 16


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


class SlotLayout(NamedTuple):
    """Where in a segment everything begins; a page for the description and one for the tallies come first."""

    states: int
    versions: int
    rows: int
    data: int
    size: int

    @classmethod
    def of(cls, spec: SlotSpec) -> SlotLayout:
        """Lay out the segment of a cache."""
        states = PAGE + TALLIES * TALLY_BYTES
        versions = _aligned(states + spec.samples, _LINE)
        rows = _aligned(versions + 4 * spec.samples, _LINE)
        data = _aligned(rows + (8 * spec.samples if spec.spread else 0), PAGE)
        return cls(states, versions, rows, data, data + spec.slots * spec.item_bytes)


def _aligned(place: int, size: int) -> int:
    return -(-place // size) * size
