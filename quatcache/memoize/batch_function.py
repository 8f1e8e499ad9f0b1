"""Batch functions that remember each item: the decorators, and what they make of a function.

A cache of functions keyed by all arguments together knows a batch only if exactly that batch was asked for before. Here
each item is looked up, and the function is called with those that are missing. As a method it keeps a cache for each
instance, which does not keep the instance alive.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from quatcache.errors import BatchFunctionError, ConfigError, shorten
from quatcache.memoize.answers import answer, answer_async, answering
from quatcache.memoize.arguments import BatchArgument, Call
from quatcache.memoize.bounds import Bounds, CacheInfo, checked_batch_size
from quatcache.memoize.results import answer_of, values_of
from quatcache.memoize.stored import StoredFunction
from quatcache.memoize.values import Context, StoredContext, StoredContexts, Values
from quatcache.store import Positions

__all__ = ["BatchFunction", "cache_batch_variable", "memoize_batch"]

Kept: TypeAlias = Values | StoredContexts
Noted: TypeAlias = Context | StoredContext


def memoize_batch(
    batch: str,
    *,
    maxsize: int | None = None,
    max_bytes: int | str | None = None,
    ttl: float | None = None,
    key: Callable[[Any], Any] | None = None,
    batch_size: int | None = None,
    getsizeof: Callable[[Any], int] | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    version: str | None = None,
    time_func: Callable[[], float] = time.monotonic,
) -> Callable[[Callable[..., Any]], BatchFunction]:
    """Have a batch function compute each item once.

    The function takes a batch of items and returns one value for each: a list, or an array or tensor with a row for
    each. What was computed before is not computed again, in whatever batches it comes; what occurs twice in a batch is
    computed once; the answer is in the order of the items. All other arguments belong to the key: with
    ``model="large"`` nothing is found that ``model="small"`` gave. Threads and tasks that ask for the same item at the
    same time share one computation. When the function raises, nothing of that call is kept but the batches that were
    finished.

    Values of a list are given as they are kept, so who changes one in place changes what later calls find; rows of
    arrays and tensors are copies.

    Args:
        batch: Name of the argument that takes the batch.
        maxsize: Most values to keep, over all other arguments, the least recently used go first; of a method for each
            instance. None: no bound.
        max_bytes: Budget for the values instead, such as ``"1GiB"`` or a number of bytes.
        ttl: Seconds that a value is kept.
        key: From an item to what stands for it, hashable; None: the item itself, or its content if it has no hash.
        batch_size: Most items to give to the function at once; None: all that are missing.
        getsizeof: From a value to its bytes; None: what its arrays, tensors and bytes take, and what Python says of
            others.
        save_dir: Directory in which values are kept beyond this process, and which other processes share: each item is
            computed once in all of them. Values are arrays, tensors on the CPU, or what JSON gives back as it is. They
            go by the qualified name of the function, its version and the content of its other arguments.
        version: A text that is changed whenever the function is to be computed anew; needed with ``save_dir``.
        time_func: Clock in seconds for ``ttl``.

    Returns:
        A decorator for functions, methods and ``async`` functions.

    Raises:
        ConfigError: A bound that cannot be, or two of them; a key that is no function; a bound with ``save_dir``; a
            ``save_dir`` without a version, or for a function without a name that other processes know.
        BatchFunctionError: When it decorates: the function has no such argument, or its annotations name no list. When
            it is called: the batch is missing or no sequence, an argument has no key, or what was returned is neither a
            list nor rows.
        BatchLengthError: When it is called: it returned another number of values.
        StoreError: When it is called: ``save_dir`` cannot be written; what was stored before is kept.

    Example:
        >>> @memoize_batch("words", maxsize=1000)
        ... def lengths(words: list[str], unit: int = 1) -> list[int]:
        ...     print("computing", words)
        ...     return [len(word) // unit for word in words]
        >>> lengths(["one", "three", "one"])
        computing ['one', 'three']
        [3, 5, 3]
        >>> lengths(["three", "seven"])
        computing ['seven']
        [5, 5]
        >>> lengths.cache_info()
        CacheInfo(hits=1, misses=3, maxsize=1000, currsize=3)
    """
    if not isinstance(batch, str):
        raise BatchFunctionError(
            f"{shorten(batch)} is no name of an argument; write @memoize_batch('texts') if texts is the batch."
        )
    if key is not None and not callable(key):
        raise ConfigError(f"key is {shorten(key)}; give a function from an item to what stands for it, or None.")
    bounds = Bounds(maxsize, max_bytes, ttl, getsizeof, time_func)
    if save_dir is not None and not bounds.are_none:
        raise ConfigError(
            f"save_dir={os.fspath(save_dir)!r} keeps every value, so maxsize, max_bytes and ttl have no place."
        )
    if save_dir is None and version is not None:
        raise ConfigError(
            f"version={version!r} belongs to stored values, and there is no save_dir; give both or neither."
        )

    def decorate(function: Callable[..., Any]) -> BatchFunction:
        stored = None if save_dir is None else StoredFunction(function, save_dir, version)
        return BatchFunction(function, batch, bounds, key, batch_size, stored)

    return decorate


def cache_batch_variable(batch_variable_name: str, maxsize: int | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Have a batch function compute each item once: the decorator of batche, by its name and with its arguments.

    Args:
        batch_variable_name: Name of the argument that takes the batch.
        maxsize: Most values to keep, the least recently used go first; None: no bound.

    Returns:
        A decorator; see :func:`memoize_batch`, which can do more.

    Example:
        >>> @cache_batch_variable(batch_variable_name="batch_items", maxsize=100)
        ... def upper(batch_items: list[str]) -> list[str]:
        ...     return [item.upper() for item in batch_items]
        >>> upper(["hello", "world"])
        ['HELLO', 'WORLD']
    """
    return memoize_batch(batch_variable_name, maxsize=maxsize)


class _Instance(weakref.ref):  # type: ignore[type-arg]
    """A reference to an instance that is equal to one of the same instance only, whatever it says that it equals."""

    def __init__(self, instance: Any, gone: Callable[[Any], None]) -> None:
        super().__init__(instance, gone)  # type: ignore[call-arg]
        self.number = id(instance)

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        here = self()
        return here is not None and isinstance(other, _Instance) and other() is here


class BatchFunction:
    """A batch function that remembers each item; made by :func:`memoize_batch`.

    Args:
        function: As it was written.
        batch: Name of its argument that takes the batch.
        bounds: Of what is kept.
        key: From an item to what stands for it.
        batch_size: Most items to give to the function at once.
        stored: Where values are kept beyond this process.

    Attributes:
        __wrapped__: The function as it was written: what it is called by asks no cache.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        batch: str,
        bounds: Bounds,
        key: Callable[[Any], Any] | None,
        batch_size: int | None,
        stored: StoredFunction | None = None,
    ) -> None:
        """Read the signature."""
        functools.update_wrapper(self, function)
        self._function = function
        self._argument = BatchArgument(function, batch)
        self._name = getattr(function, "__qualname__", repr(function))
        self._bounds = bounds
        self._key = key
        self._batch_size = checked_batch_size(batch_size)
        self._values: Kept = Values(bounds) if stored is None else StoredContexts(stored, self._argument)
        self._instances: dict[_Instance, Values] = {}
        self._is_method = self._argument.is_after_self
        self._is_async = inspect.iscoroutinefunction(function)
        if self._is_async:
            _mark_async(self)

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn that it is a method: its first argument is an instance."""
        self._is_method = True

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind to an instance."""
        return self if instance is None else _Bound(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer for each item of the batch, and call the function with those that are missing."""
        return self._answer(args, kwargs, self._is_method)

    def _answer(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_method: bool) -> Any:
        values, call = self._ask(args, kwargs, is_method)
        context = values.context(call)
        steps = answering(context.keys(call.batch, self._key), context.store, self._batch_size)
        if self._is_async:
            return self._call_async(steps, values, context, call)

        def compute(positions: Positions) -> list[Any]:
            given, named = call.with_items(positions)
            return self._returned(values, context, call, positions, self._function(*given, **named))

        return answer_of(self._name, answer(steps, compute), context.kind)

    async def _call_async(self, steps: Any, values: Kept, context: Noted, call: Call) -> Any:
        async def compute(positions: Positions) -> list[Any]:
            given, named = call.with_items(positions)
            returned = await self._function(*given, **named)
            return self._returned(values, context, call, positions, returned)

        answers = await answer_async(steps, compute)
        return answer_of(self._name, answers, context.kind)

    def _returned(self, values: Kept, context: Noted, call: Call, positions: Positions, returned: Any) -> list[Any]:
        now = values.context(call)  # another one if the cache was cleared since the call began
        found, kind = values_of(self._name, returned, len(positions), now.kind or context.kind)
        context.kind = now.kind = kind
        context.store.count_computed(len(found))
        return found

    def _ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_method: bool) -> tuple[Kept, Call]:
        """Find the values that a call is about, and take it apart."""
        if not is_method or not args:
            return self._values, self._argument.take(args, kwargs)
        instance, *others = args
        return self._values_of(instance), self._argument.take((None, *others), kwargs)._replace(args=args)

    def _values_of(self, instance: Any) -> Values:
        if isinstance(self._values, StoredContexts):
            raise ConfigError(
                f"{self._name} is a method, and save_dir cannot tell its instances from those of another process; "
                "decorate a function."
            )
        try:
            reference = _Instance(instance, self._forget)
        except TypeError:
            raise BatchFunctionError(
                f"{self._name} is a method of {type(instance).__name__}, whose instances cannot be referred to without "
                "keeping them alive; add '__weakref__' to its __slots__, or decorate a function."
            ) from None
        # setdefault: of two threads that come first, both get the same
        return self._instances.get(reference) or self._instances.setdefault(reference, Values(self._bounds))

    def _forget(self, reference: _Instance) -> None:
        self._instances.pop(reference, None)

    def cache_info(self) -> CacheInfo:
        """Count hits, misses and what is kept; of a method over all instances that are alive."""
        return self._info([self._values, *self._instances.values()])

    def _info(self, kept: Sequence[Kept]) -> CacheInfo:
        stores = [store for values in kept for store in values.stores]
        hits, misses = sum(store.hits for store in stores), sum(store.computed for store in stores)
        return CacheInfo(hits, misses, self._bounds.most, sum(values.size for values in kept))

    def cache_clear(self) -> None:
        """Forget all values and counts; of a method those of all instances.

        Raises:
            ConfigError: The values are stored, and other processes use them.
        """
        for values in (self._values, *self._instances.values()):
            values.clear()

    def cache_peek(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Give the values that a call would find, by the position of their item; compute and touch nothing."""
        return self._peek(args, kwargs, self._is_method)

    def _peek(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_method: bool) -> dict[int, Any]:
        values, call = self._ask(args, kwargs, is_method)
        return values.peek(values.context(call).keys(call.batch, self._key), call)

    def __reduce__(self) -> str:
        """Travel to other processes by name, as functions do: the values stay here."""
        return self.__qualname__  # type: ignore[attr-defined,no-any-return]

    def __copy__(self) -> BatchFunction:
        """Be one and the same, as functions are."""
        return self

    def __deepcopy__(self, memo: Any) -> BatchFunction:
        """Be one and the same, as functions are."""
        return self

    def __repr__(self) -> str:
        """Name the function."""
        return f"<memoized {self._name}>"


class _Bound:
    """A batch function as a method of one instance."""

    def __init__(self, function: BatchFunction, instance: Any) -> None:
        self.__func__, self.__self__ = function, instance
        self.__wrapped__ = types.MethodType(function.__wrapped__, instance)  # type: ignore[attr-defined]
        self.__doc__, self.__name__ = function.__doc__, function.__name__  # type: ignore[attr-defined]
        if function._is_async:
            _mark_async(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__._answer((self.__self__, *args), kwargs, is_method=True)

    def cache_info(self) -> CacheInfo:
        """Count hits, misses and what is kept, of this instance."""
        return self.__func__._info([self.__func__._values_of(self.__self__)])

    def cache_clear(self) -> None:
        """Forget the values and counts of this instance."""
        self.__func__._values_of(self.__self__).clear()

    def cache_peek(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Give the values that a call would find, by the position of their item; compute and touch nothing."""
        return self.__func__._peek((self.__self__, *args), kwargs, is_method=True)


def _mark_async(function: Any) -> None:
    """Have ``iscoroutinefunction`` say yes."""
    if hasattr(inspect, "markcoroutinefunction"):  # from Python 3.12 on
        inspect.markcoroutinefunction(function)
    else:
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
