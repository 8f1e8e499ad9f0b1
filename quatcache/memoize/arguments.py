"""Where a function takes its batch, and what else decides its answer.

The signature is read once, when a function is decorated. A call is then taken apart: the batch is cached item by item,
and all other arguments, defaults included, become one key. ``f(texts)``, ``f(texts, "small")`` and
``f(model="small", texts=texts)`` have the same key if ``"small"`` is the default.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, get_origin

import numpy as np

from quatcache.errors import BatchFunctionError, shorten
from quatcache.memoize.item_keys import key_of
from quatcache.store import Positions

__all__ = ["BatchArgument", "Call"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Call(NamedTuple):
    """One call of a batch function.

    Attributes:
        batch: The N items, as they were when it was called: the caller, or the function, may change its own list.
        others: Key of all other arguments.
        args: Positional arguments, the batch among them perhaps.
        kwargs: Arguments by name.
        place: Where the batch is: a position, or its name.
    """

    batch: Any
    others: Hashable
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str

    def with_items(self, positions: Positions) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Give the arguments of the same call for some of its items, in a batch of the same type."""
        batch = _some(self.batch, positions)
        if isinstance(self.place, str):
            return self.args, {**self.kwargs, self.place: batch}
        return (*self.args[: self.place], batch, *self.args[self.place + 1 :]), self.kwargs


class BatchArgument:
    """The argument of a function that is its batch.

    Args:
        function: A function of a batch: items in, one value for each of them out.
        name: Of the argument; one that ``**kwargs`` takes will do.

    Attributes:
        name: As given.
        is_after_self: Whether the first argument is called ``self``, as that of a method is, also below a decorator.

    Raises:
        BatchFunctionError: The function has no such argument, or its annotations say that this is no batch, or that it
            returns none.

    Example:
        >>> def lengths(texts: list[str], unit: str = "letters") -> list[int]: ...
        >>> argument = BatchArgument(lengths, "texts")
        >>> argument.take((["a"], "letters"), {}).others == argument.take((), {"texts": ["b"]}).others
        True
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        """Read the signature."""
        self.name = name
        self._called = getattr(function, "__qualname__", repr(function))
        if isinstance(function, staticmethod | classmethod):
            kind = type(function).__name__
            raise BatchFunctionError(
                f"{self._called} is a {kind} already; put @{kind} above the decorator that caches."
            )
        try:
            self._signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise BatchFunctionError(
                f"{self._called} has no signature to read; wrap it in a function with an argument {name!r}."
            ) from error
        parameters = self._signature.parameters
        self.is_after_self = next(iter(parameters), None) == "self"
        own = parameters.get(name)
        if own is None or own.kind in _VARIADIC:
            self._rest = next((one.name for one in parameters.values() if one.kind is one.VAR_KEYWORD), None)
            if own is not None or self._rest is None:
                raise BatchFunctionError(
                    f"{self._called}{self._signature} has no argument {name!r} to take the batch; name one that it has."
                )
            self._place: int | None = None
        else:
            self._rest = None
            self._place = None if own.kind is own.KEYWORD_ONLY else list(parameters).index(name)
        self._check_annotations(function)
        self._usual = self._key_of_defaults()

    def _check_annotations(self, function: Callable[..., Any]) -> None:
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # a name that is not known yet, or imported for type checkers alone
            hints = {}
        for name, what in ((self.name, "takes"), ("return", "returns")):
            if name in hints and not _may_be_batch(hints[name]):
                argument = f" as {name!r}" if name == self.name else ""
                raise BatchFunctionError(
                    f"{self._called} {what} {shorten(hints[name])}{argument} by its annotation; a batch function takes "
                    "a list of items and returns a list with one value for each, so annotate both as lists."
                )

    def _key_of_defaults(self) -> Hashable | None:
        """Give the key of a call with nothing but the batch; None where it may change, or such a call cannot be."""
        others = [one for one in self._signature.parameters.values() if one.name != self.name]
        if any(one.default is one.empty and one.kind not in _VARIADIC for one in others):
            return None
        if not all(isinstance(one.default, str | int | float | bool | None | type) for one in others):
            return None  # a list, for instance, may have other elements one day
        return self._key([(one.name, one.default) for one in others if one.kind not in _VARIADIC])

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Take a call apart.

        Raises:
            BatchFunctionError: The batch is missing, or is no sequence of items; or another argument has no key.
            TypeError: The function cannot be called so.
        """
        place: int | str = self.name
        if self.name in kwargs:
            batch = kwargs[self.name]
        elif self._place is not None and self._place < len(args):
            place = self._place
            batch = args[place]
        else:
            raise BatchFunctionError(f"{self._called} was called without {self.name!r}; give it a list of items.")
        # A string has a length and elements, too, and they are not what anybody means by a batch.
        if isinstance(batch, str | bytes | Mapping) or not _is_sequence(batch):
            raise BatchFunctionError(
                f"{self._called} was given {self.name}={shorten(batch)}, a {type(batch).__name__}; give a list of "
                "items."
            )
        batch = _as_it_is_now(batch)
        if self._usual is not None and len(args) + len(kwargs) == 1:
            return Call(batch, self._usual, args, kwargs, place)
        return Call(batch, self._key(self.others(args, kwargs)), args, kwargs, place)

    def others(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Give all arguments of a call but the batch, by name, defaults included, in one order for all calls."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        others: list[tuple[str, Any]] = []
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:  # their order is the caller's
                others += sorted((each, one) for each, one in value.items() if each != self.name)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                others += [(f"*{number}", one) for number, one in enumerate(value)]
            elif name != self.name:
                others.append((name, value))
        return others

    def _key(self, others: Sequence[tuple[str, Any]]) -> Hashable:
        keys = []
        for name, value in others:
            try:
                keys.append((name, key_of(value)))
            except BatchFunctionError as error:
                raise BatchFunctionError(
                    f"{self._called} was given {name}={shorten(value)}, which decides its answers and cannot be a key: "
                    f"{error}"
                ) from error
        return tuple(keys)


def _is_sequence(batch: Any) -> bool:
    if isinstance(batch, Sequence):
        return True
    # the elements of a data frame are its columns
    return hasattr(batch, "__getitem__") and getattr(batch, "ndim", 0) > 0 and not hasattr(batch, "columns")


def _as_it_is_now(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return batch
    return list(batch) if isinstance(batch, Sequence) else _some(batch, np.arange(len(batch)))


def _some(batch: Any, positions: Positions) -> Any:
    """Give some items of a batch, in a batch of the same type; a list for what is no tuple, array or tensor."""
    if hasattr(batch, "shape"):
        return getattr(batch, "iloc", batch)[positions]  # a series would take positions for labels
    some = [batch[place] for place in positions.tolist()]
    return tuple(some) if isinstance(batch, tuple) else some


def _may_be_batch(annotation: Any) -> bool:
    """Say whether what has an annotation may be a list, a tuple, an array or a tensor."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_may_be_batch(one) for one in typing.get_args(annotation))
    kind = annotation if origin is None else origin
    if not isinstance(kind, type):
        return True  # Any, or a type variable
    try:
        return issubclass(list, kind) or issubclass(tuple, kind) or hasattr(kind, "__array__")
    except TypeError:  # a protocol that cannot be asked
        return True
