"""The columns of an index table, while a fill reads its dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.data.samples import LAYOUTS, SampleLayout
from quatcache.errors import SampleError, shorten
from quatcache.keys import KeyArray
from quatcache.store import DTYPES, DatasetTable
from quatcache.training.keying import Chunk

__all__ = ["ColumnsInMaking", "Part"]


@dataclass(frozen=True)
class Part:
    """What one of several processes has read of a dataset.

    Attributes:
        indices: Which samples, int64 ``(n,)``.
        table: Their keys and targets.
        targets_reason: Why it has no targets; None if it has, or if none are wanted.
    """

    indices: npt.NDArray[np.int64]
    table: DatasetTable
    targets_reason: str | None

    def describe(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Put the part among the tensors of a file.

        Args:
            name: Its name there.
            tensors: Those of the file.

        Returns:
            What :meth:`read` needs, as JSON values.
        """
        columns = sorted(self.table.keys)
        tensors[f"indices.{name}"] = torch.from_numpy(self.indices)
        for number, column in enumerate(columns):
            tensors[f"keys.{name}.{number}"] = torch.from_numpy(self.table.keys[column])
        for number, target in enumerate(self.table.targets or ()):
            tensors[f"target.{name}.{number}"] = target
        count = None if self.table.targets is None else len(self.table.targets)
        return {"layout": self.table.layout, "columns": columns, "targets": count, "reason": self.targets_reason}

    @classmethod
    def read(cls, name: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Part:
        """Take a part out of the tensors of a file; see :meth:`describe`."""
        keys = {column: tensors[f"keys.{name}.{number}"].numpy() for number, column in enumerate(about["columns"])}
        count = about["targets"]
        targets = None if count is None else tuple(tensors[f"target.{name}.{number}"] for number in range(count))
        return cls(tensors[f"indices.{name}"].numpy(), DatasetTable(keys, targets, about["layout"]), about["reason"])


class ColumnsInMaking:
    """Keys and targets of a dataset, gathered chunk by chunk into arrays of full length.

    Args:
        size: Samples of the dataset.
        known: The table of its first samples; None: nothing is known.

    Attributes:
        targets_reason: Why targets cannot be kept; None while they can.
    """

    def __init__(self, size: int, known: DatasetTable | None) -> None:
        """Start with what is known."""
        self._size = size
        self._known = known  # None again when the columns are no longer its own
        self._keys: dict[str, KeyArray] = {}
        self._targets: list[torch.Tensor] | None = None
        self._layout: SampleLayout | None = None
        self.targets_reason: str | None = None
        if known is not None:
            self._layout = LAYOUTS[known.layout]
            self._keys = dict(known.keys)
            self._targets = None if known.targets is None else list(known.targets)
            if len(known) != size:
                self.part_from_table()

    def part_from_table(self) -> None:
        """Copy the columns of the known table, if they are not copies yet: they will be written to, or shared."""
        if self._known is None:
            return
        count, self._known = min(self._size, len(self._known)), None
        for name, keys in self._keys.items():
            self._keys[name] = np.zeros((self._size, *keys.shape[1:]), np.int64)
            self._keys[name][:count] = keys[:count]
        for place, old in enumerate(self._targets or ()):
            column = torch.empty((self._size, *old.shape[1:]), dtype=old.dtype)
            column[:count] = old[:count]
            self._targets[place] = column  # type: ignore[index]

    def put(self, chunk: Chunk) -> None:
        """Take in one chunk, in any order.

        Raises:
            SampleError: Its samples are of another kind than those before.
        """
        self.part_from_table()
        layout = LAYOUTS[chunk.layout]
        if self._layout is None:
            self._layout = layout
        if layout is not self._layout:
            raise SampleError(
                f"the dataset mixes {self._layout.name} and {layout.name} samples; let it return one kind of sample."
            )
        for name, keys in chunk.keys.items():
            self.put_keys(np.asarray(chunk.indices), name, keys)
        self._put_targets(chunk)

    def put_part(self, part: Part) -> None:
        """Take in what another process has read.

        Raises:
            SampleError: Its samples are of another kind than those before.
        """
        if part.table.targets is None and self.targets_reason is None:
            self.targets_reason = part.targets_reason or "no targets were kept"
        keys, layout = dict(part.table.keys), part.table.layout
        self.put(Chunk(part.indices, [], part.table.targets or (), layout, keys))  # type: ignore[arg-type]

    @property
    def width(self) -> int | None:
        """Items of a sample; None while no sample is known."""
        return None if self._layout is None else self._layout.items_per_sample

    def chunk(self, indices: npt.NDArray[np.int64], what: str) -> Chunk:
        """Give the keys of samples that were taken in, as a chunk of items that say only where they are.

        Args:
            indices: The samples.
            what: The dataset, for messages.
        """
        assert self._layout is not None
        items = [f"{place} of {what}" for place in indices.repeat(self._layout.items_per_sample).tolist()]
        keys = {name: keys[indices] for name, keys in self._keys.items()}
        return Chunk(indices, items, (), self._layout.name, keys)  # type: ignore[arg-type]

    def put_keys(self, indices: npt.NDArray[np.int64], name: str, keys: KeyArray) -> None:
        """Take in a column of keys for samples that were taken in."""
        self.part_from_table()
        if name not in self._keys:
            self._keys[name] = np.zeros((self._size, *keys.shape[1:]), np.int64)
        self._keys[name][indices] = keys

    def keys_of(self, indices: npt.NDArray[np.int64], name: str) -> KeyArray:
        """Give one column of keys of samples that were taken in."""
        return self._keys[name][indices]

    def _put_targets(self, chunk: Chunk) -> None:
        if self.targets_reason is not None:
            return
        for column in chunk.targets:
            if not isinstance(column, torch.Tensor):
                self.targets_reason = f"targets such as {shorten(column[0])} do not make tensors of one shape"
                return
            if column.requires_grad:
                self.targets_reason = "targets have a gradient"
                return
            if column.dtype not in DTYPES.values():
                self.targets_reason = f"targets of {column.dtype} are not stored"
                return
        if self._targets is None:
            self._targets = [torch.empty((self._size, *c.shape[1:]), dtype=c.dtype) for c in chunk.targets]
        for mine, column in zip(self._targets, chunk.targets, strict=True):
            if (mine.dtype, mine.shape[1:]) != (column.dtype, column.shape[1:]):
                self.targets_reason = "targets change their type or shape within the dataset"
                return
            mine[chunk.indices] = column

    @property
    def targets(self) -> tuple[torch.Tensor, ...] | None:
        """Target columns of full length, right for the samples that were taken in; None while there are none."""
        return None if self._targets is None or self.targets_reason is not None else tuple(self._targets)

    def table(self, with_targets: bool) -> DatasetTable:
        """Give the table, once every sample was taken in."""
        assert self._layout is not None
        kept = with_targets and self.targets_reason is None and self._targets is not None
        if self._known is not None and kept == (self._known.targets is not None):
            return self._known
        return DatasetTable(self._keys, tuple(self._targets or ()) if kept else None, self._layout.name)
