"""Samples taken apart into what is cached and what belongs to it, and put together as the dataset gave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quatcache.errors import SampleError, SlotValueError, shorten
from quatcache.store.slot_values import as_tensor

__all__ = ["Part", "SampleParts"]


@dataclass(frozen=True)
class Part:
    """One part of a sample.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        is_tensor: Whether the dataset gives a tensor.
        is_array: Whether it gives an array, or a number of numpy; what is neither is a number of Python.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_tensor: bool
    is_array: bool

    @classmethod
    def of(cls, value: Any) -> Part:
        """Look at a part.

        Raises:
            SlotValueError: It is neither a tensor nor an array nor a number.
        """
        tensor = as_tensor(value)
        is_array = isinstance(value, (np.ndarray, np.generic))
        return cls(tuple(tensor.shape), tensor.dtype, isinstance(value, torch.Tensor), is_array)

    def given(self, values: torch.Tensor) -> Sequence[Any]:
        """Take values ``(n, *shape)`` apart into what the dataset would give."""
        if self.is_tensor:
            return values.unbind()
        return list(values.numpy()) if self.is_array else values.tolist()


@dataclass(frozen=True)
class SampleParts:
    """How the samples of a dataset are made of parts.

    Attributes:
        container: The type of a tuple or list, the keys of a mapping, or None where the sample is the item itself.
        item: Which part is the item.
        parts: All of them.

    Example:
        >>> parts = SampleParts.of((torch.zeros(3), 7), (3,), torch.float32)
        >>> parts.item, parts.together([[torch.ones(3)], [8]])
        (0, [(tensor([1., 1., 1.]), 8)])
    """

    container: Any
    item: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, sample: Any, shape: tuple[int, ...], dtype: torch.dtype) -> SampleParts:
        """Find the item, which is the first part of some shape and dtype.

        Raises:
            SampleError: No part is, or another part cannot be cached.
        """
        container: Any = None
        if isinstance(sample, Mapping):
            container = tuple(sample)
        elif isinstance(sample, (tuple, list)):
            container = type(sample)
        try:
            parts = tuple(map(Part.of, _values(sample, container)))
        except SlotValueError as error:
            raise SampleError(
                f"a part of a sample has no place in a slot: {error} Leave it out, or have the dataset itself call "
                "get_slot and set_slot of the cache."
            ) from error
        item = next((i for i, part in enumerate(parts) if (part.shape, part.dtype) == (shape, dtype)), None)
        if item is None:
            found = ", ".join(f"{part.shape} {part.dtype}" for part in parts)
            raise SampleError(f"a sample has {found or 'no part'}, the cache takes {shape} {dtype}; make it for one.")
        return cls(container, item, parts)

    def apart(self, sample: Any) -> Sequence[Any]:
        """Take a sample apart.

        Raises:
            SampleError: It is not made like the first one.
        """
        container = self.container
        keyed = isinstance(container, tuple)
        same = isinstance(sample, Mapping) and set(sample) == set(container) if keyed else type(sample) is container
        values = _values(sample, container) if same or container is None else ()
        if len(values) != len(self.parts):
            raise SampleError(f"{shorten(sample)} is not made like the first sample, of {len(self.parts)} parts.")
        return values

    def together(self, columns: Sequence[Sequence[Any]]) -> list[Any]:
        """Make samples of the values of all parts."""
        container = self.container
        if container is None:
            return list(columns[0])
        rows = zip(*columns, strict=True)
        if isinstance(container, tuple):
            return [dict(zip(container, row, strict=True)) for row in rows]
        if hasattr(container, "_fields"):
            return [container(*row) for row in rows]
        return [container(row) for row in rows]

    def with_item(self, samples: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
        """Change the items of samples."""
        columns: list[Sequence[Any]] = list(zip(*map(self.apart, samples), strict=True))
        columns[self.item] = [change(item) for item in columns[self.item]]
        return self.together(columns)


def _values(sample: Any, container: Any) -> Sequence[Any]:
    if container is None:
        return (sample,)
    return tuple(sample[key] for key in container) if isinstance(container, tuple) else tuple(sample)
