"""How much is kept, how long, and how that is counted: cachetools does the work."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cachetools import Cache, LRUCache, TTLCache

from quatcache.errors import ConfigError
from quatcache.units import parse_size

__all__ = ["Bounds", "CacheInfo", "checked_batch_size", "size_of"]


class CacheInfo(NamedTuple):
    """What a cache was asked and what it holds.

    Attributes:
        hits: Items that were found.
        misses: Items that were computed.
        maxsize: Most values, or bytes of values, that are kept; None: no bound.
        currsize: Values that are kept, or their bytes if these are bounded.
    """

    hits: int
    misses: int
    maxsize: int | None
    currsize: int


@dataclass(frozen=True)
class Bounds:
    """How much is kept, and how long.

    Args:
        maxsize: Most values, >= 0; None: no bound.
        max_bytes: Budget for the values instead; a number of bytes or a text such as ``"1GiB"``.
        ttl: Seconds that a value is kept, > 0; None: for ever.
        getsizeof: From a value to its bytes; None: :func:`size_of`.
        time_func: Clock in seconds.

    Raises:
        ConfigError: A bound that cannot be, or two of them.
    """

    maxsize: int | None = None
    max_bytes: int | str | None = None
    ttl: float | None = None
    getsizeof: Callable[[Any], int] | None = None
    time_func: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        """Check them."""
        if self.maxsize is not None and self.max_bytes is not None:
            raise ConfigError(
                f"maxsize={self.maxsize} and max_bytes={self.max_bytes!r} both bound the cache; give one of them."
            )
        if self.getsizeof is not None and self.max_bytes is None:
            raise ConfigError("getsizeof says what values take of max_bytes, which is not given; give both or neither.")
        if self.maxsize is not None and (
            isinstance(self.maxsize, bool) or not isinstance(self.maxsize, int) or self.maxsize < 0
        ):
            raise ConfigError(
                f"maxsize is {self.maxsize!r}; give a number of values, at least 0, or None for no bound."
            )
        if self.ttl is not None and not (isinstance(self.ttl, int | float) and self.ttl > 0):
            raise ConfigError(f"ttl is {self.ttl!r}; give seconds, more than 0, or None to keep values for ever.")
        if self.max_bytes is not None:
            object.__setattr__(self, "max_bytes", _checked_bytes(self.max_bytes))

    @property
    def most(self) -> int | None:
        """Values, or bytes of values, that are kept at most."""
        return self.maxsize if self.max_bytes is None else int(self.max_bytes)

    def mapping(self) -> MutableMapping[Hashable, Any]:
        """Make a mapping within these bounds."""
        sizes = None if self.max_bytes is None else (self.getsizeof or size_of)
        if self.ttl is not None:
            return TTLCache(math.inf if self.most is None else self.most, self.ttl, self.time_func, sizes)
        return {} if self.most is None else LRUCache(self.most, sizes)

    @property
    def are_none(self) -> bool:
        """Whether everything is kept for ever."""
        return self.most is None and self.ttl is None

    @staticmethod
    def size(mapping: MutableMapping[Hashable, Any]) -> int:
        """Count what a mapping holds: values, or their bytes if these are bounded."""
        return int(mapping.currsize) if isinstance(mapping, Cache) else len(mapping)

    @staticmethod
    def peek(mapping: MutableMapping[Hashable, Any], keys: Sequence[Hashable]) -> dict[int, Any]:
        """Give the values that are there, by position, without making them more recently used."""
        look: Any = Cache.__getitem__ if isinstance(mapping, Cache) else type(mapping).__getitem__
        return {place: look(mapping, key) for place, key in enumerate(keys) if key in mapping}


def _checked_bytes(given: int | str) -> int:
    if isinstance(given, str):
        try:
            return parse_size(given)
        except ValueError as error:
            raise ConfigError(f"max_bytes: {error}.") from None
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ConfigError(f"max_bytes is {given!r}; give a number of bytes, at least 1, or a text such as '1GiB'.")
    return given


def checked_batch_size(given: int | None) -> int | None:
    """Check how many items a function is to be given at once.

    Raises:
        ConfigError: It is less than 1, or no whole number.
    """
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ConfigError(
            f"batch_size is {given!r}; give items per call, at least 1, or None for all that are missing."
        )
    return given


def size_of(value: Any) -> int:
    """Estimate the bytes of a value.

    Example:
        >>> import torch
        >>> size_of(torch.zeros(3)), size_of(b"abcd"), size_of([b"abcd", b"ef"]) > 6
        (12, 4, True)
    """
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, bytes | bytearray):
        return len(value)
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(size_of(key) + size_of(one) for key, one in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return sys.getsizeof(value) + sum(map(size_of, value))
    return sys.getsizeof(value)
