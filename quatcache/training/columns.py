"""The columns of an index table, while a fill reads its dataset."""

from __future__ import annotations

import numpy as np
import torch

from quatcache.data.samples import LAYOUTS, SampleLayout
from quatcache.errors import SampleError, shorten
from quatcache.keys import KeyArray
from quatcache.store import DTYPES, DatasetTable
from quatcache.training.keying import Chunk

__all__ = ["ColumnsInMaking"]


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
        self._known = known
        self._keys: dict[str, KeyArray] = {}
        self._targets: list[torch.Tensor] | None = None
        self._layout: SampleLayout | None = None
        self.targets_reason: str | None = None
        if known is not None:
            count = min(size, len(known))
            self._layout = LAYOUTS[known.layout]
            for name, keys in known.keys.items():
                self._keys[name] = np.empty((size, *keys.shape[1:]), np.int64)
                self._keys[name][:count] = keys[:count]
            if known.targets is not None:
                self._targets = [torch.empty((size, *column.shape[1:]), dtype=column.dtype) for column in known.targets]
                for column, old in zip(self._targets, known.targets, strict=True):
                    column[:count] = old[:count]

    def put(self, chunk: Chunk) -> None:
        """Take in one chunk, in any order.

        Raises:
            SampleError: Its samples are of another kind than those before.
        """
        layout = LAYOUTS[chunk.layout]
        if self._layout is None:
            self._layout = layout
        if layout is not self._layout:
            raise SampleError(
                f"the dataset mixes {self._layout.name} and {layout.name} samples; let it return one kind of sample."
            )
        for name, keys in chunk.keys.items():
            if name not in self._keys:
                self._keys[name] = np.empty((self._size, *keys.shape[1:]), np.int64)
            self._keys[name][chunk.indices] = keys
        self._put_targets(chunk)

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

    def table(self, with_targets: bool) -> DatasetTable:
        """Give the table, once every sample was taken in."""
        assert self._layout is not None
        kept = with_targets and self.targets_reason is None and self._targets is not None
        return DatasetTable(self._keys, tuple(self._targets or ()) if kept else None, self._layout.name)
