"""What slots can be made for, and what may be put into one: exactly the shape and dtype that it has."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from quatcache.errors import ConfigError, SlotIndexError, SlotValueError, shorten
from quatcache.store.slot_layout import SLOT_DTYPES, Indices, SlotSpec

__all__ = ["as_index", "as_indices", "as_item", "as_items", "as_tensor", "planned_slots", "slot_dtype"]

_GIB = 1 << 30
_BITS = {"8-bit": torch.uint8, "16-bit": torch.uint16, "32-bit": torch.uint32, "64-bit": torch.uint64}
"""The names of stocaching 0.1, for what it took them for."""


def slot_dtype(dtype: Any) -> torch.dtype:
    """Find a dtype that slots can have.

    Args:
        dtype: A torch dtype, its name, or a number of bits such as "8-bit".

    Raises:
        ConfigError: It is none.

    Example:
        >>> slot_dtype("8-bit"), slot_dtype("float16"), slot_dtype(torch.bool)
        (torch.uint8, torch.float16, torch.bool)
    """
    name = str(dtype).removeprefix("torch.")
    found = _BITS.get(name) or SLOT_DTYPES.get(name)
    if found is None:
        raise ConfigError(f"dtype {shorten(dtype)} cannot be cached; give one of {', '.join([*SLOT_DTYPES, *_BITS])}.")
    return found


def planned_slots(
    size_limit_gib: float, dataset_len: Any, data_dims: Any, dtype: torch.dtype | str, seed: Any
) -> SlotSpec:
    """Find how many slots a budget has room for; arguments are those of ``SharedCache``.

    Raises:
        ConfigError: Not for one, or an argument is none.
    """
    kind = slot_dtype(dtype)
    if not _is_integer(dataset_len, 1):
        raise ConfigError(f"dataset_len is {dataset_len!r}; give the number of samples, at least 1.")
    dims = tuple(data_dims) if isinstance(data_dims, Sequence) else (0,)
    if not all(_is_integer(size, 1) for size in dims):
        raise ConfigError(f"data_dims is {data_dims!r}; give the shape of one item, such as (3, 224, 224).")
    if not isinstance(size_limit_gib, (int, float, np.number)) or not 0 < size_limit_gib * _GIB < math.inf:
        raise ConfigError(f"size_limit_gib is {size_limit_gib!r}; give a number of GiB above 0.")
    if seed is not None and not _is_integer(seed, 0):
        raise ConfigError(f"seed is {seed!r}; give an integer from 0 on, or None for the first samples.")
    dims, samples = tuple(map(int, dims)), int(dataset_len)
    item = math.prod(dims) * kind.itemsize
    slots = min(samples, (int(size_limit_gib * _GIB) - samples) // item)
    if slots < 1:
        raise ConfigError(
            f"size_limit_gib={size_limit_gib} has no room for one item of {item} bytes beside {samples} bytes of "
            f"states; give at least {(item + samples) / _GIB:.2g}."
        )
    return SlotSpec(samples, slots, dims, kind, int(seed) if seed is not None and slots < samples else None)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and int(value) >= least


def as_index(idx: Any, samples: int) -> int:
    """Give the index of one of so many samples as a number of Python: torch takes True, and uint8, for a mask.

    Raises:
        SlotIndexError: It is no integer, or outside the dataset.
    """
    try:
        index = operator.index(idx)
    except TypeError:
        raise SlotIndexError(f"{shorten(idx)} is no index; give an integer, or many of them to get_slots.") from None
    if 0 <= index < samples:
        return index
    raise _outside(index, samples)


def as_indices(indices: Any, samples: int) -> Indices:
    """Give the indices of some of so many samples.

    Raises:
        SlotIndexError: They are no list of integers, or one is outside the dataset.
    """
    try:
        given = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
    except ValueError:  # lists of different lengths
        given = np.empty(())
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        raise SlotIndexError(f"{shorten(indices)} is no list of indices; give integers, or a tensor or array (N,).")
    outside = (given < 0) | (given >= samples)
    if outside.any():
        raise _outside(int(given[outside][0]), samples)
    return given.astype(np.int64, copy=False)


def _outside(index: int, samples: int) -> SlotIndexError:
    return SlotIndexError(
        f"index {index} is outside the dataset of {samples} samples; give one from 0 to {samples - 1}."
    )


def as_tensor(value: Any) -> torch.Tensor:
    """Give a tensor on the CPU for a tensor, an array or a number; memory is shared where that is possible.

    Raises:
        SlotValueError: It is something else.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_meta:
            raise SlotValueError(f"a tensor that is sparse, nested or meta has no place in a slot: {shorten(value)}.")
        return value if value.is_cpu and not value.requires_grad else value.detach().cpu()
    if isinstance(value, np.ndarray) and (not value.flags.writeable or any(step < 0 for step in value.strides)):
        value = value.copy()  # torch warns of memory that it may not write, and knows no negative strides
    if isinstance(value, float) and not isinstance(value, np.generic):
        return torch.tensor(value, dtype=torch.float64)  # as a loader collates it
    if isinstance(value, (bool, int, np.ndarray, np.generic)) and not isinstance(value, np.ma.MaskedArray):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise SlotValueError(f"{shorten(value)} cannot be a tensor ({error}).") from error
    raise SlotValueError(f"{shorten(value)} is a {type(value).__name__}; give a tensor, an array, or a number.")


def as_item(value: Any, spec: SlotSpec) -> torch.Tensor:
    """Give the tensor that a slot is to hold.

    Raises:
        SlotValueError: The value has another shape or dtype. Numbers become what the slot has, if it can hold them.
    """
    item = _number(value, spec.dtype) if isinstance(value, (bool, int, float)) else as_tensor(value)
    return _checked(item, spec.dims, spec.dtype)


def as_items(values: Any, count: int, spec: SlotSpec) -> torch.Tensor:
    """Give a tensor ``(count, *dims)`` for the items of many slots; errors as for :func:`as_item`."""
    return _checked(as_tensor(values), (count, *spec.dims), spec.dtype)


def _number(value: float, dtype: torch.dtype) -> torch.Tensor:
    try:
        number = torch.tensor(value, dtype=dtype)
    except (ValueError, RuntimeError, OverflowError):  # more than the dtype holds, or any
        number = None
    if number is not None and dtype.is_floating_point and isinstance(value, float):
        held = bool(number.isfinite()) or not math.isfinite(value)  # rounded, but to no infinity
    else:
        held = number is not None and number.item() == value
    if number is None or not held:
        raise SlotValueError(f"{value!r} is no {_name(dtype)}, which is what the cache holds; convert it.")
    return number


def _checked(item: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if item.dtype != dtype or item.shape != shape:
        raise SlotValueError(
            f"the value is {tuple(item.shape)} {_name(item.dtype)}, the cache takes {shape} {_name(dtype)}; convert "
            "it, or make the cache for it."
        )
    return item


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
