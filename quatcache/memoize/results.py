"""What a batch function returns: a list of values, or one array or tensor of rows.

Values are kept one by one. Rows are copied when they are kept, and so are views in a list: a view would keep all rows
of its batch in memory, and change with them. The answer is of the kind that the function gives, so that nobody notices
who answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from quatcache.errors import BatchFunctionError, BatchLengthError, shorten

__all__ = ["Kind", "answer_of", "values_of"]

Kind: TypeAlias = type[Any]
"""``list``, ``numpy.ndarray`` or ``torch.Tensor``."""


def values_of(name: str, returned: Any, count: int, known: Kind | None) -> tuple[list[Any], Kind]:
    """Take what a function returned apart.

    Args:
        name: Of the function, for messages.
        returned: What it returned.
        count: How many items it was given.
        known: What it returned before for the same other arguments; None: nothing yet.

    Returns:
        One value for each item, and of which kind they were.

    Raises:
        BatchLengthError: They are more or fewer.
        BatchFunctionError: They are neither a list, nor rows; or of another kind than before.

    Example:
        >>> values_of("lengths", [3, 4], 2, None)
        ([3, 4], <class 'list'>)
    """
    kind: Kind
    if isinstance(returned, list | tuple):
        kind = list
    elif isinstance(returned, torch.Tensor):
        kind = torch.Tensor
    elif type(returned) in (np.ndarray, np.memmap):  # a mask, for instance, would be lost
        kind = np.ndarray
    else:
        raise BatchFunctionError(
            f"{name} returned {shorten(returned)}, a {type(returned).__name__}; return a list with one value per item, "
            "or an array or tensor with one row per item."
        )
    if kind is not list and not returned.ndim:
        raise BatchFunctionError(
            f"{name} returned {shorten(returned)}, a {kind.__name__} without dimensions; return one row per item."
        )
    if len(returned) != count:
        raise BatchLengthError(
            f"{name} returned {len(returned)} values for {count} items; return one per item, in order."
        )
    if known not in (None, kind):
        raise BatchFunctionError(
            f"{name} returned a {kind.__name__}, and a {known.__name__} before; return the same for every batch."
        )
    if any(isinstance(one, torch.Tensor) and one.requires_grad for one in (returned if kind is list else [returned])):
        raise BatchFunctionError(
            f"{name} returned a tensor that requires grad, and what a cache keeps has no graph; compute it under "
            "torch.no_grad()."
        )
    if kind is list:
        return list(map(_apart, returned)), kind
    if kind is np.ndarray:
        return [
            returned[place, ...].copy() for place in range(count)
        ], kind  # ...: a number is an array, with its dtype
    return [row.clone() for row in returned], kind


def _apart(value: Any) -> Any:
    """Copy an array or a tensor that is a part of a larger one."""
    if type(value) in (np.ndarray, np.memmap):
        return value if value.base is None else np.array(value)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value if value.untyped_storage().nbytes() <= value.nbytes else value.clone()
    return value


def answer_of(name: str, values: list[Any], kind: Kind | None) -> Any:
    """Give the values as the function would have.

    Args:
        name: Of the function, for messages.
        values: N values.
        kind: What the function returns; None: it was never called.

    Returns:
        A new list, array ``(N, ...)`` or tensor ``(N, ...)``. Without any value it is a list.

    Raises:
        BatchFunctionError: Rows of several calls have different shapes.
    """
    if kind in (None, list) or not values:
        return values
    try:
        return _stacked(values, kind)
    except (ValueError, RuntimeError) as error:
        shapes = sorted({tuple(row.shape) for row in values})
        raise BatchFunctionError(
            f"{name} returned rows of shapes {shorten(shapes)}, which make no {kind.__name__} together; return rows of "
            "one shape, or a list."
        ) from error


def _stacked(values: Sequence[Any], kind: Kind | None) -> Any:
    return np.stack(values) if kind is np.ndarray else torch.stack(list(values))
