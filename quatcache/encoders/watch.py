"""Whether an encoder may have changed since its identity was found, told in a small part of the time that takes.

To find an identity, every weight is read: some milliseconds, many times what a row takes. So between two such looks
only marks are compared: which tensors and modules there are, how often each tensor was written to, one value of each,
and the attributes of all modules and of what they hold. A write through ``.data`` counts nowhere, so it is found by
those values if it was one to a whole model, as of an optimizer, an average or an adapter that is merged. One to a few
rows, or deep inside an object, leaves no mark; so a look is due from time to time as well, as often as
:data:`SHARE_OF_TIME` allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from inspect import isroutine
from typing import Any

import torch
from torch import nn

from quatcache.encoders.deferred import passing_over
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.weights import package_of

__all__ = ["Watch"]

SHARE_OF_TIME = 0.02
"""Of the time between two looks, looking takes at most so much."""

_LONGEST = 64
"""A container with more entries counts as one thing: it is a vocabulary, or a memo."""

_DEPTH = 4  # the pairs of a mapping are one level, their values the next
_OWN = frozenset({*vars(nn.Module()), "_deferred"}) - {"training"}
_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


class Watch:
    """Remembers how an encoder looked.

    Args:
        encoder: The encoder; it is not loaded for that.
        time_func: Clock in seconds.

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> encoder = ModuleEncoder(nn.Linear(2, 2), torch.tensor, 2)
        >>> watch = Watch(encoder)
        >>> watch.remember(cost=0.0)
        >>> with torch.no_grad():
        ...     _ = encoder.module.bias.add_(1)
        >>> watch.differs()
        True
    """

    def __init__(self, encoder: Encoder, time_func: Callable[[], float] = time.monotonic) -> None:
        """Remember nothing yet."""
        self._encoder = encoder
        self._time = time_func
        self._marks: list[Any] = []
        self._due = float("-inf")

    def remember(self, cost: float) -> None:
        """Take the encoder as it is now for the one whose identity was just found.

        Args:
            cost: Seconds that finding it took.
        """
        self._marks = self._now()
        self._due = self._time() + cost / SHARE_OF_TIME

    def is_due(self) -> bool:
        """Say whether its identity should be found anew: it may have changed, or it was not looked at for a while."""
        return self._time() >= self._due or self.differs()

    def differs(self) -> bool:
        """Say whether there is any sign that it changed."""
        return self._now() != self._marks

    def _now(self) -> list[Any]:
        seen: set[int] = set()
        with passing_over([self._encoder]):
            modules = list(self._encoder.modules())
            tensors = [tensor for module in modules for tensor in _tensors(module)]
        return [*(mark for module in modules for mark in _marks(module, seen)), *_values(tensors)]


def _marks(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    yield id(module)
    held = vars(module)
    for name in ("_parameters", "_buffers"):
        for key, tensor in held[name].items():
            yield key, None if tensor is None else _mark_of(tensor)
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
        if held[name]:
            yield name, [(key, id(value)) for key, value in held[name].items()]
    if package_of(type(module)) != "torch":  # nobody sets an attribute of a layer
        for name, value in tuple(held.items()):
            if name not in _OWN:
                yield name, _mark(value, 0, seen)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def _values(tensors: list[torch.Tensor]) -> Iterator[Any]:
    """Give the value in the middle of each tensor, those of one device and dtype copied at once."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.numel() and not _is_opaque(tensor):
            middle = tensor.detach()[tuple(size // 2 for size in tensor.shape)]
            alike.setdefault((tensor.device, tensor.dtype), []).append(middle)
    for values in alike.values():
        yield torch.stack(values).cpu().double().numpy().tobytes()  # as bytes: NaN equals itself


def _is_opaque(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.layout is not torch.strided


def _mark_of(tensor: torch.Tensor) -> Any:
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return id(tensor), address, None if tensor.is_inference() else tensor._version, tensor.dtype


def _mark(value: Any, depth: int, seen: set[int]) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return _mark_of(value)
    if depth < _DEPTH and isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) <= _LONGEST:
        inner = value.items() if isinstance(value, Mapping) else value
        return type(value), [_mark(one, depth + 1, seen) for one in inner]
    if depth == 0 and id(value) not in seen and not isinstance(value, type | nn.Module) and not isroutine(value):
        seen.add(id(value))  # all modules of a model hold its configuration
        held = tuple(getattr(value, "__dict__", {}).items())
        return id(value), [(name, _mark(one, _DEPTH, seen)) for name, one in held]
    return id(value)
