"""Values of a function that outlive the process: rows of a cache directory, beside those of encoders.

A function has no weights to look at, so what decides its answers is its qualified name, a version that its author
gives, and its other arguments by their content. For each combination of these there is one store, and one process at a
time computes for it: whoever comes later looks again at what the others have stored, before it computes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numpy as np

from quatcache.errors import BatchFunctionError, ConfigError, KeyTypeError, shorten
from quatcache.keys import KeyArray, content_keys
from quatcache.memoize.codecs import CODECS, Codec, codec_of
from quatcache.memoize.results import Kind
from quatcache.store import CacheDirectory, Found, Positions
from quatcache.store.memory import assembled

__all__ = ["StoredFunction", "StoredValues"]

StoredKey = tuple[int, int]
"""A key as an object of Python, which threads can claim."""

MANY_SHARDS = 64
"""So many commits lie in files of their own until they are packed."""


class StoredFunction:
    """Where the values of one function are stored.

    Args:
        function: A function with a name, at the top of a module.
        save_dir: The directory; made at the first write.
        version: What its author changes when the function answers otherwise.

    Attributes:
        name: By which every process knows it.
        path: The directory.

    Raises:
        ConfigError: It has no version, or no name that another process would know it by.
    """

    def __init__(self, function: Callable[..., Any], save_dir: str | os.PathLike[str], version: str | None) -> None:
        """Read nothing yet."""
        self.name = name = _name_for_all(function)
        if not isinstance(version, str) or not version:
            raise ConfigError(
                f"version is {version!r}, and save_dir keeps what {name} returns beyond this process; give a text, and "
                "change it whenever the function is to be computed anew."
            )
        self._directory = CacheDirectory(save_dir)
        self.path = self._directory.path
        self._about = {"class": name, "version": version}

    def values(self, others: Sequence[tuple[str, Any]]) -> StoredValues:
        """Open the values for a combination of other arguments, by name.

        Raises:
            BatchFunctionError: One of them has no content that another process could know it by.
        """
        try:
            digest = content_keys([[list(pair) for pair in others]]).tobytes().hex()
        except KeyTypeError as error:
            names = ", ".join(name for name, _ in others)
            raise BatchFunctionError(
                f"{self.name} is stored in {self.path}, and of its other arguments ({names}) one "
                f"has no content that another process could know it by: {error}"
            ) from error
        facts = {
            **self._about,
            "arguments": {name: shorten(value) for name, value in others},
            "arguments_digest": digest,
        }
        return StoredValues(self._directory, facts)


class StoredValues:
    """The values of one function for one combination of other arguments: a store of Python's values.

    Args:
        directory: Where they are.
        facts: What decides them.

    Attributes:
        kind: What the function returns; None: nothing is stored yet, and it was not called.

    Example:
        >>> import tempfile
        >>> values = StoredValues(CacheDirectory(tempfile.mkdtemp()), {"class": "module.lengths", "version": "1"})
        >>> values.kind = list
        >>> with values.alone():
        ...     values.put_many([(1, 2)], [{"length": 3}])
        >>> values.get_many([(1, 2), (3, 4)]).values
        [{'length': 3}]
    """

    def __init__(self, directory: CacheDirectory, facts: dict[str, Any]) -> None:
        """Look which way values were stored here before."""
        self._directory, self._facts = directory, facts
        # how values are stored is no part of what they are of: it is known only once there are some
        self._digest = content_keys([[facts[name] for name in sorted(facts) if name != "arguments"]]).tobytes().hex()
        self._rows = directory.store(self._digest, facts)
        self._alone = _Alone()
        self.kind: Kind | None = None if self._codec is None else self._codec.kind

    @property
    def _codec(self) -> Codec | None:
        """How values are stored here; None: none are, or a manifest that was lost has taken that along."""
        return CODECS.get(str(self._rows.manifest.facts.get("values")))

    def look_again(self) -> None:
        """Take in what other processes have stored since."""
        self._rows.refresh()
        if self._codec is not None:
            self.kind = self._codec.kind

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the one process that computes these values; threads of this process share that.

        Whoever is, looks again at what others have stored before it computes.

        Raises:
            StoreError: The directory cannot be written.
        """
        with self._alone.held(lambda: self._directory.filling([self._rows])):
            yield

    def __len__(self) -> int:
        """Count the values."""
        return len(self._rows)

    def missing(self, keys: Sequence[StoredKey]) -> Positions:
        """Give the positions of absent keys."""
        return np.arange(len(keys)) if self._codec is None else self._rows.missing(_array(keys))

    def get_many(self, keys: Sequence[StoredKey]) -> Found:
        """Give the hits only."""
        if self._codec is None:
            return Found(np.empty(0, np.int64), [])
        positions, values = [np.empty(0, np.int64)], list[Any]()
        for part in self._codec.parts(len(keys)):
            found, rows = self._rows.get_many(_array(keys[part]))
            if len(found):
                positions.append(found + part.start)
                values += self._codec.decode(rows)
        return Found(np.concatenate(positions), values)

    def put_many(self, keys: Sequence[StoredKey], values: Sequence[Any]) -> None:
        """Store values and commit them; what is there already stays.

        Raises:
            BatchFunctionError: A value cannot be stored so that it comes back as it is.
            StoreError: The directory cannot be written; what was committed before is kept.
        """
        fresh = self.missing(keys)
        if not len(fresh):
            return
        some = [values[place] for place in fresh.tolist()]
        assert self.kind is not None
        codec, rows = self._codec or codec_of(self.kind, some), self._rows
        if self._codec is None:
            rows = self._directory.store(self._digest, {**self._facts, "values": codec.name})
        try:
            parts = [(part, codec.encode(some[part])) for part in codec.parts(len(some))]
            for part, encoded in parts:  # all can be stored
                rows.put_many(_array(keys)[fresh[part]], encoded)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, BatchFunctionError):
                raise
            raise BatchFunctionError(
                f"{self._facts['class']} returned {shorten(some[0])}, which cannot be stored as a {codec.name}: {error}"
            ) from error
        rows.flush()
        self._rows = rows
        if len(rows.manifest.shards) > MANY_SHARDS:
            rows.compact()

    def assemble(self, size: int, parts: Sequence[Found]) -> list[Any]:
        """Put values in the order of their positions."""
        return assembled(size, parts)

    def clear(self) -> None:
        """Keep everything: other processes use the same values."""


class _Alone:
    """A lock that the threads of this process hold together: the first takes it, the last gives it back."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._holders = 0
        self._stack = ExitStack()

    @contextmanager
    def held(self, lock: Callable[[], Any]) -> Iterator[None]:
        with self._mutex:  # others of this process wait here while the first waits for another process
            if not self._holders:
                self._stack.enter_context(lock())
            self._holders += 1
        try:
            yield
        finally:
            with self._mutex:
                self._holders -= 1
                if not self._holders:
                    self._stack.close()


def _array(keys: Sequence[StoredKey]) -> KeyArray:
    return np.array(keys, np.int64).reshape(-1, 2)


def _name_for_all(function: Callable[..., Any]) -> str:
    """Give the name by which every process knows a function.

    A script's module is called ``__main__`` by the process that runs it, and by its file's name by all others.
    """
    if not isinstance(function, FunctionType) or "<" in function.__qualname__:
        raise ConfigError(
            f"{getattr(function, '__qualname__', function)!r} has no name that another process would know it by, and "
            "save_dir goes by it; define it with def at the top of a module."
        )
    module = function.__module__
    if module == "__main__":
        main = cast(Any, sys.modules["__main__"])
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else module
    return f"{module}.{function.__qualname__}"
