"""Objects that are neither tensors nor modules: whose they are, and what they hold beside their attributes.

A pattern, a date or a getter has no attributes, and decides an output all the same. What such an object holds is what
a copy of it would be made from; nothing is copied or executed, only that description is read.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import nn

from quatcache.encoders.serialised import JSON, is_ignored
from quatcache.encoders.weights import FOREIGN_STATE, LIBRARIES, attributes, package_of

__all__ = ["code_name", "hooks_of", "is_foreign", "is_library", "key_order", "own_attributes", "readable", "state_of"]

_SILENT = LIBRARIES | FOREIGN_STATE | {"lightning", "lightning_fabric", "pytorch_lightning", "quatcache"}
_EXTENDED = frozenset({"peft", "sentence_transformers", "transformers", "transformers_modules"})
# Private names in these packages tell of threads, files and what was done so far.
_RUNNING = frozenset(
    {
        *("_io", "_queue", "_thread", "_weakref", "asyncio", "concurrent", "contextvars", "io", "itertools", "logging"),
        *("loguru", "multiprocessing", "preshed", "queue", "socket", "spacy", "sqlite3", "structlog", "subprocess"),
        *("tempfile", "thinc", "threading", "tqdm", "weakref"),
    }
)
_BY_REPR = frozenset({complex, date, timedelta, Decimal, Fraction, range})


def code_name(code: Any) -> str:
    """Name a class or function so that a script and an import of it agree.

    ``__main__`` (``__mp_main__`` in a spawned process) becomes the name that an import of the file would have.

    Args:
        code: A class or a function.

    Returns:
        "module.qualified_name"; "relu" for a builtin without a module.

    Example:
        >>> code_name(nn.Linear)
        'torch.nn.modules.linear.Linear'
    """
    module = getattr(code, "__module__", None)
    name = getattr(code, "__qualname__", None) or getattr(code, "__name__", None) or type(code).__qualname__
    if module in {"__main__", "__mp_main__"}:
        main = sys.modules.get(module)
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name.removesuffix(".__main__") if spec is not None else Path(file).stem if file else "__main__"
    return f"{module}.{name}" if module else str(name)


def is_library(cls: type) -> bool:
    """Tell whether a class is of a library known by name, or extends one of transformers and its relatives."""
    return package_of(cls) in _SILENT or any(package_of(each) in _EXTENDED for each in cls.__mro__)


def is_foreign(cls: type) -> bool:
    """Tell whether a class is neither the user's own nor of a library known by name: it hides its state as it likes.

    Args:
        cls: Any class; modules and encoders are never foreign.

    Returns:
        Whether it comes from the standard library or from an installed package.

    Example:
        >>> is_foreign(Fraction), is_foreign(nn.Linear)
        (True, False)
    """
    if is_library(cls) or issubclass(cls, nn.Module) or package_of(cls) in _RUNNING:
        return False
    return _is_installed(cls.__module__)


@functools.cache
def _is_installed(module: str) -> bool:
    if module.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """Give the functions that the user has put before and behind a module's ``forward``.

    Args:
        module: Any module. Hooks that PyTorch and the libraries built on it install are left out: they come and go
            with a library's version, and what they compute is known by the weights.

    Returns:
        Functions by "forward_pre_hook.<n>" and "forward_hook.<n>", in the order in which they are called.

    Example:
        >>> layer = nn.ReLU()
        >>> _ = layer.register_forward_hook(print)
        >>> hooks_of(layer)
        {'forward_hook.0': <built-in function print>}
    """
    found: dict[str, Any] = {}
    for kind in ("forward_pre_hook", "forward_hook"):
        hooks = (getattr(module, f"_{kind}s", None) or {}).values()
        own = [hook for hook in hooks if not _is_of_a_library(hook)]
        found.update((f"{kind}.{index}", hook) for index, hook in enumerate(own))
    return found


def _is_of_a_library(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] in _SILENT - {"builtins"}


def readable(value: Any) -> JSON:
    """Give the text of a value of the standard library that a person would write in this way, or None.

    Args:
        value: Anything.

    Returns:
        For instance "datetime.date(2020, 1, 1)"; the digest of bytes; None for what is of another type.

    Example:
        >>> readable(1 + 2j), readable(np.datetime64("2020-01-01"))
        ('(1+2j)', 'datetime64[D] 2020-01-01')
    """
    if isinstance(value, np.datetime64 | np.timedelta64):
        return f"{value.dtype} {value}"
    if isinstance(value, np.complexfloating):
        value = value.item()
    if isinstance(value, bytearray | memoryview):
        return "xxh3_128:" + xxhash.xxh3_128_hexdigest(bytes(value))
    plain = type(value) in _BY_REPR or (type(value) is datetime and value.tzinfo is None)
    return repr(value) if plain else None


def own_attributes(value: Any) -> dict[str, Any]:
    """Give the attributes of an object that count, private ones if its class is of an installed package.

    Args:
        value: Any object but a module.

    Returns:
        Values by name; nothing for an object of a package that says itself what it holds (see :func:`state_of`), and
        the entries of ``to_dict`` for one that is written down by it (a table of pandas keeps memos beside them).
    """
    cls = type(value)
    library, foreign = is_library(cls), is_foreign(cls)
    found = attributes(value)
    if not library and callable(getattr(value, "to_dict", None)):
        written = value.to_dict()
        found = {str(key): inner for key, inner in written.items()} if isinstance(written, Mapping) else found
    elif foreign and _definer(cls) is not None and state_of(value):
        return {}
    elif foreign:  # what the class itself holds under such names is how the package is written
        found = {
            name: inner
            for name, inner in found.items()
            if name in getattr(value, "__dict__", ()) or not (name.startswith("_") and _is_of_class(cls, name))
        }
    return {
        name: inner for name, inner in found.items() if not is_ignored(name, inner, library=library, private=foreign)
    }


def _is_of_class(cls: type, name: str) -> bool:
    return not hasattr(inspect.getattr_static(cls, name), "__get__")


def state_of(value: Any) -> dict[str, Any]:
    """Give what a copy of an object would be made from, as ``copyreg`` and ``__reduce_ex__`` tell it.

    Args:
        value: Any object; of one whose class is the user's own, only what it inherits from a class that is not (a
            deque, a date): its attributes are found otherwise.

    Returns:
        Parts by name; nothing for what cannot be copied (a lock, a file) or says all by its attributes.

    Example:
        >>> import re
        >>> state_of(re.compile("[aeiou]"))
        {'arguments': ('[aeiou]', 32)}
    """
    cls = type(value)
    own = not is_library(cls) and not is_foreign(cls)
    reduce: Callable[[Any], Any] | None = copyreg.dispatch_table.get(cls)
    if reduce is None:
        defined = _definer(cls)
        if defined is not None and not is_library(defined) and not is_foreign(defined):
            return {}  # the user says how it is copied: by a path, say, which is no part of it
        if defined is None and (own or getattr(value, "__dict__", None)):
            return {}
    try:
        parts = reduce(value) if reduce is not None else value.__reduce_ex__(4)
    except Exception:  # whatever a lock, a handle or a half-made object raises: it cannot be copied
        return {}
    if isinstance(parts, str):
        return {"name": parts}
    made_by, arguments, state, items, pairs = (*parts, None, None, None, None)[:5]
    if arguments and arguments[0] is cls:
        arguments = arguments[1:]
    found = {
        "made_by": None if isinstance(made_by, type | types.FunctionType | types.BuiltinFunctionType) else made_by,
        "arguments": arguments,
        "state": None if own or (is_library(cls) and getattr(value, "__dict__", None)) else state,
        "items": list(items) if isinstance(items, Iterator) else items,
        "pairs": dict(pairs) if isinstance(pairs, Iterator) else pairs,
    }
    return {name: part for name, part in found.items() if part is not None and part != ()}


def _definer(cls: type) -> type | None:
    """Find the class that says how its objects are copied; None: they are copied as any object."""
    for each in cls.__mro__[:-1]:
        if not {"__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"}.isdisjoint(vars(each)):
            return each
    return None


def key_order(value: JSON) -> JSON:
    """Give the keys of the mappings in a JSON value in their order, or None if each is sorted.

    Example:
        >>> key_order({"title": 2, "body": [1]}), key_order({"body": 1, "title": 2})
        (['title', 'body'], None)
    """
    if isinstance(value, dict):
        orders = [key_order(each) for each in value.values()]
        keys: list[JSON] = list(value)
        if all(order is None for order in orders):
            return None if keys == sorted(value) else keys
        return [keys, orders]
    if isinstance(value, list):
        orders = [key_order(each) for each in value]
        return None if all(order is None for order in orders) else orders
    return None
