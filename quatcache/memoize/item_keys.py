"""Hashable keys of items and arguments: equal keys for what a function cannot tell apart, and for nothing else.

Python's own equality is too wide: ``1 == 1.0 == True``, ``0.0 == -0.0``, for which ``1 / x`` differs, and noon in
London is 1 pm in Paris. And it is too narrow for what can change: a list has no hash, and a tensor is equal to itself
alone, until another one lies where it was. So keys have the type beside the value, and what is mutable goes by its
content.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Hashable, Sequence
from decimal import Decimal
from typing import Any

from quatcache.errors import BatchFunctionError, KeyTypeError, shorten
from quatcache.keys import content_keys

__all__ = ["item_keys", "key_of"]

_AS_THEY_ARE = (str, bytes)
"""Types whose values are keys themselves: all other keys are tuples."""

_BY_VALUE = (int, bool, type(None), type)

_BY_REPR = (complex, range, Decimal)
"""Types with unlike values that are equal, or with values that are not equal to themselves."""


def item_keys(items: Sequence[Any], key: Callable[[Any], Any] | None = None) -> Sequence[Hashable]:
    """Give the key of each item.

    Args:
        items: N items.
        key: From an item to what stands for it; None: the item itself.

    Returns:
        N keys; items that are texts are their own keys.

    Raises:
        BatchFunctionError: An item has neither a hash nor bytes of its own.

    Example:
        >>> item_keys(["a", "b"]), len(set(item_keys([1, 1.0, True])))
        (['a', 'b'], 3)
    """
    named = items if key is None else [key(item) for item in items]
    if set(map(type, named)) <= {str}:
        return named if isinstance(named, list) else list(named)
    keys = []
    for place, item in enumerate(named):
        try:
            keys.append(key_of(item))
        except BatchFunctionError as error:
            raise BatchFunctionError(f"item {place} of the batch is {shorten(item)}: {error}") from error
    return keys


def key_of(value: Any) -> Hashable:
    """Give the key of one item or argument.

    Raises:
        BatchFunctionError: It has neither a hash nor bytes of its own.

    Example:
        >>> key_of("a"), key_of(0.5) == key_of(0.5), key_of([1, 2]) == key_of([1, 2])
        ('a', True, True)
    """
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value  # type: ignore[no-any-return]
    if kind in _BY_VALUE:
        return kind, value
    if kind is float:
        return kind, value.hex()  # one key for every NaN, two for the zeros
    if kind in _BY_REPR:
        return kind, repr(value)
    if isinstance(value, datetime.datetime | datetime.time):  # equal in all time zones
        return kind, value, repr(value)
    if isinstance(value, tuple) and type(value).__eq__ == tuple.__eq__:  # named tuples as well
        return kind, tuple(map(key_of, value))
    if kind is frozenset:
        return kind, frozenset(map(key_of, value))
    if not hasattr(value, "__array__"):  # a tensor has a hash, which says nothing of what is in it
        try:
            hash(value)
        except TypeError:
            pass
        else:
            return kind, value
    try:
        return "content", content_keys([value]).tobytes()
    except KeyTypeError as error:
        raise BatchFunctionError(
            f"a {kind.__name__} that has neither a hash nor bytes of its own; pass key=, a function from it to what "
            "stands for it."
        ) from error
