"""What is kept of one function, or of one instance of a class: values by item, and by all other arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from quatcache.errors import BatchFunctionError, ConfigError, KeyTypeError, shorten
from quatcache.keys import content_keys
from quatcache.memoize.arguments import BatchArgument, Call
from quatcache.memoize.bounds import Bounds
from quatcache.memoize.flights import SharedStore
from quatcache.memoize.item_keys import item_keys
from quatcache.memoize.results import Kind
from quatcache.memoize.stored import StoredFunction, StoredValues
from quatcache.store import MemoryStore

__all__ = ["Context", "StoredContext", "StoredContexts", "Values"]

_MANY = 1000
"""So many combinations of other arguments are noted without a look at which of them still have values."""


class Context:
    """One combination of other arguments, of values in memory.

    Args:
        store: Keeps the values, of other combinations as well.
        number: Stands for this one in keys: it is hashed faster than the arguments. 0: keys are those of the items.

    Attributes:
        store: As given.
        number: As given.
        kind: What the function returns; None: it was not called yet.
    """

    def __init__(self, store: SharedStore, number: int) -> None:
        """Know nothing yet."""
        self.store, self.number = store, number
        self.kind: Kind | None = None

    def keys(self, batch: Sequence[Any], key: Callable[[Any], Any] | None) -> Sequence[Hashable]:
        """Give the keys of items."""
        items, number = item_keys(batch, key), self.number
        return [(number, item) for item in items] if number else items


class StoredContext:
    """One combination of other arguments, of values that outlive the process.

    Args:
        values: The values.

    Attributes:
        store: The same for several threads.
    """

    def __init__(self, values: StoredValues) -> None:
        """Know what the values know."""
        self.store = SharedStore(values, self._alone)
        self._values = values

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._values.alone():
            with self.store.lock:  # other threads of this process read on
                self._values.look_again()
            yield

    @property
    def kind(self) -> Kind | None:
        """What the function returns; None: it was never called."""
        return self._values.kind

    @kind.setter
    def kind(self, kind: Kind | None) -> None:
        self._values.kind = kind

    def keys(self, batch: Sequence[Any], key: Callable[[Any], Any] | None) -> Sequence[Hashable]:
        """Give the keys of items, by their content."""
        named = batch if key is None else [key(item) for item in batch]
        try:
            return [tuple(one) for one in content_keys(list(named)).tolist()]
        except KeyTypeError as error:
            raise BatchFunctionError(
                f"an item of {shorten(named)} has no content that another process could know it by; pass key=: {error}"
            ) from error


class Values:
    """The values of one function or instance, in memory.

    Args:
        bounds: How many, and how long.

    Attributes:
        mapping: Where they are kept.
        store: The same as a store, for several threads.

    Example:
        >>> values, calls = Values(Bounds()), [Call(["a"], (size,), (), {}, 0) for size in ("small", "large")]
        >>> [values.context(call).keys(call.batch, None) for call in calls]
        [['a'], [(1, 'a')]]
    """

    def __init__(self, bounds: Bounds) -> None:
        """Hold nothing."""
        self._bounds = bounds
        self.mapping = bounds.mapping()
        self.store = SharedStore(MemoryStore(self.mapping))
        self._contexts: dict[Hashable, Context] = {}
        self._numbers = count()

    def context(self, call: Call) -> Context:
        """Give what is noted of the other arguments of a call."""
        known = self._contexts.get(call.others)
        if known is not None:
            return known
        with self.store.lock:
            if len(self._contexts) > _MANY + 2 * len(self.mapping):
                self._forget_unused()
            return self._contexts.setdefault(call.others, Context(self.store, next(self._numbers)))

    def _forget_unused(self) -> None:
        """Forget combinations of which no value is left; their numbers are never given again."""
        used: set[Any] = {key[0] for key in self.mapping if isinstance(key, tuple)}
        self._contexts = {others: one for others, one in self._contexts.items() if one.number in used or not one.number}

    def peek(self, keys: Sequence[Hashable], call: Call) -> dict[int, Any]:
        """Give the values that are there, by position, without making them more recently used."""
        with self.store.lock:
            return self._bounds.peek(self.mapping, keys)

    @property
    def size(self) -> int:
        """Count the values, or their bytes if these are bounded."""
        with self.store.lock:
            return self._bounds.size(self.mapping)

    @property
    def stores(self) -> list[SharedStore]:
        """All stores: one."""
        return [self.store]

    def clear(self) -> None:
        """Forget everything; a call that is under way stores what it computes all the same."""
        with self.store.lock:
            self.store.clear()
            if self.store.is_computing:  # its values will be of the kind that is known
                return
            self._contexts = {others: Context(self.store, one.number) for others, one in self._contexts.items()}


class StoredContexts:
    """The values of one function beyond this process: a store for each combination of other arguments.

    Args:
        function: Where they are stored.
        argument: What takes calls apart.
    """

    def __init__(self, function: StoredFunction, argument: BatchArgument) -> None:
        """Open nothing yet."""
        self._function, self._argument = function, argument
        self._contexts: dict[Hashable, StoredContext] = {}
        self._lock = threading.Lock()

    def context(self, call: Call) -> StoredContext:
        """Give the values for the other arguments of a call."""
        known = self._contexts.get(call.others)
        if known is not None:
            return known
        with self._lock:
            if call.others not in self._contexts:
                others = self._argument.others(call.args, call.kwargs)
                self._contexts[call.others] = StoredContext(self._function.values(others))
            return self._contexts[call.others]

    def peek(self, keys: Sequence[Hashable], call: Call) -> dict[int, Any]:
        """Give the values that are there, by position."""
        positions, values = self.context(call).store.peek(keys)
        return dict(zip(positions.tolist(), values, strict=True))

    @property
    def size(self) -> int:
        """Count the values of all combinations that were asked for."""
        return sum(map(len, self.stores))

    @property
    def stores(self) -> list[SharedStore]:
        """One for each combination that was asked for."""
        with self._lock:
            return [context.store for context in self._contexts.values()]

    def clear(self) -> None:
        """Refuse to forget: other processes use the same values.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"values of {self._function.name} are stored in {self._function.path} for every process; give another "
            "version, or delete that directory."
        )
