"""How a head is written down and built again: ``{"kind": ..., "config": {...}}``, data and never code.

A kind is looked up in tables that live in this process. The rejected alternative, a class path in the file, would let
a file choose what is imported and called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from quatcache.errors import ConfigError, ModelDefinitionError
from quatcache.heads.encoder_head import EncoderHead

__all__ = ["HEADS", "head_from_config", "head_to_config", "layer_from_config", "layer_to_config", "register_head"]

HEADS: dict[str, type[EncoderHead]] = {}
"""Head class per kind, the name that stands in saved files; filled by :func:`register_head`."""

_Head = TypeVar("_Head", bound=EncoderHead)


def register_head(kind: str) -> Callable[[type[_Head]], type[_Head]]:
    """Give a head class the kind under which models that use it are saved and loaded.

    Args:
        kind: Name written to saved files. It outlives the class name, so renaming the class breaks no file.

    Returns:
        A class decorator that returns the class unchanged.

    Raises:
        ConfigError: If another class has this kind.

    Example:
        >>> import torch
        >>> from quatcache.heads import EncoderHead, head_from_config, head_to_config
        >>> @register_head("halving")
        ... class HalvingHead(EncoderHead):
        ...     @property
        ...     def output_size(self) -> int:
        ...         return self.input_embedding_size
        ...
        ...     def transform(self, inputs):
        ...         return inputs / 2
        >>> head_from_config(head_to_config(HalvingHead(4)))(torch.ones(1, 4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
        >>> del HEADS["halving"]
    """

    def register(cls: type[_Head]) -> type[_Head]:
        known = HEADS.get(kind)
        # A notebook cell that is run again, or a reloaded module, defines the same class anew: the newest one counts.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"head kind {kind!r} already belongs to {known.__qualname__}; choose another name")
        HEADS[kind] = cls
        return cls

    return register


class _Layer(NamedTuple):
    """How a plain torch layer is written down: its class and its constructor arguments, read back as attributes."""

    cls: type[nn.Module]
    fields: tuple[str, ...] = ()


_LAYERS: dict[str, _Layer] = {
    "torch.batch_norm_1d": _Layer(nn.BatchNorm1d, ("num_features", "eps", "momentum", "affine", "track_running_stats")),
    "torch.dropout": _Layer(nn.Dropout, ("p", "inplace")),
    "torch.elu": _Layer(nn.ELU, ("alpha", "inplace")),
    "torch.gelu": _Layer(nn.GELU, ("approximate",)),
    "torch.identity": _Layer(nn.Identity),
    "torch.layer_norm": _Layer(nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias")),
    "torch.leaky_relu": _Layer(nn.LeakyReLU, ("negative_slope", "inplace")),
    "torch.linear": _Layer(nn.Linear, ("in_features", "out_features", "bias")),
    "torch.mish": _Layer(nn.Mish, ("inplace",)),
    "torch.relu": _Layer(nn.ReLU, ("inplace",)),
    "torch.sigmoid": _Layer(nn.Sigmoid),
    "torch.silu": _Layer(nn.SiLU, ("inplace",)),
    "torch.softmax": _Layer(nn.Softmax, ("dim",)),
    "torch.tanh": _Layer(nn.Tanh),
}
_SEQUENTIAL = "torch.sequential"


def head_to_config(head: nn.Module) -> dict[str, Any]:
    """Describe a head in JSON values, without its weights.

    Args:
        head: A head whose class has a registered kind.

    Returns:
        ``{"kind": str, "config": dict}``, which :func:`head_from_config` takes back.

    Raises:
        ModelDefinitionError: If the class, or that of a layer inside, has no kind, or its config is not JSON.

    Example:
        >>> from quatcache.heads import LinearHead
        >>> head_to_config(LinearHead(384, 22))
        {'kind': 'linear', 'config': {'input_embedding_size': 384, 'dropout': 0.0, 'output_size': 22, 'bias': True}}
    """
    # The class itself must be registered: a subclass may compute something else from the same config.
    kind = next((kind for kind, cls in HEADS.items() if cls is type(head)), None)
    name = type(head).__qualname__
    if kind is None or not isinstance(head, EncoderHead):
        if isinstance(head, EncoderHead):
            remedy = "decorate the class with register_head('a name')"
        elif _layer_kind(head) is not None:
            remedy = "wrap it, as in SequentialHead(module, output_size=...)"
        else:
            remedy = "derive it from EncoderHead and decorate it with register_head('a name')"
        raise ModelDefinitionError(f"{name} has no registered kind and cannot be saved; {remedy}")
    config = head.config()
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelDefinitionError(
            f"{name}.config() holds something that JSON has not: {error}; return bool, int, float, str, None, lists "
            "and dicts of these"
        ) from error
    return {"kind": kind, "config": config}


def head_from_config(config: Mapping[str, Any]) -> EncoderHead:
    """Build a head, with fresh weights, from its description.

    Nothing but the registered kinds can be built: a name in a file never becomes code.

    Args:
        config: What :func:`head_to_config` gave.

    Returns:
        A head in training mode; load its ``state_dict`` next.

    Raises:
        ConfigError: If the kind is unknown, or the config does not fit it.

    Example:
        >>> head = head_from_config({"kind": "gated", "config": {"input_embedding_size": 8}})
        >>> head
        GatedHead(
          input_embedding_size=8, output_size=8
          (dropout): Dropout(p=0.0, inplace=False)
        )
        >>> head_from_config({"kind": "os.system", "config": {}})
        Traceback (most recent call last):
            ...
        quatcache.errors.ConfigError: head kind 'os.system' is unknown; known are empty, gated, linear, ...
    """
    kind, arguments = _kind_and_arguments(config)
    cls = HEADS.get(kind)
    if cls is None:
        raise ConfigError(
            f"head kind {kind!r} is unknown; known are {', '.join(sorted(HEADS))}; import the module that registers it"
        )
    try:
        return cls.from_config(arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise _misfit(kind, error) from error


def _layer_kind(layer: nn.Module) -> str | None:
    if type(layer) is nn.Sequential:
        return _SEQUENTIAL
    return next((kind for kind, entry in _LAYERS.items() if entry.cls is type(layer)), None)


def layer_to_config(layer: nn.Module) -> dict[str, Any]:
    """Describe a layer of a :class:`SequentialHead`: a head, or one of the layers of torch that are known here.

    Raises:
        ModelDefinitionError: If its class has no kind.
    """
    kind = _layer_kind(layer)
    if kind is None:
        return head_to_config(layer)
    if kind == _SEQUENTIAL:
        return {"kind": kind, "config": {"layers": [layer_to_config(inner) for inner in layer.children()]}}
    config: dict[str, Any] = {}
    for field in _LAYERS[kind].fields:
        value = getattr(layer, field)
        if field == "bias":  # the attribute is the parameter, the argument a flag
            value = value is not None
        config[field] = list(value) if isinstance(value, tuple) else value
    return {"kind": kind, "config": config}


def layer_from_config(config: Any) -> nn.Module:
    """Build, with fresh weights, what :func:`layer_to_config` described.

    Raises:
        ConfigError: If the kind is unknown, or the config does not fit it.
    """
    kind, arguments = _kind_and_arguments(config)
    if kind == _SEQUENTIAL:
        layers = arguments.get("layers")
        if not isinstance(layers, list):
            raise ConfigError(f"a torch.sequential has layers {layers!r}; the config needs a list")
        return nn.Sequential(*(layer_from_config(inner) for inner in layers))
    entry = _LAYERS.get(kind)
    if entry is None:
        return head_from_config(config)
    unknown = sorted(set(arguments) - set(entry.fields))
    if unknown:
        # Only the recorded arguments: `device` or `dtype` from a file would place weights where nobody looks for them.
        raise _misfit(kind, f"unknown argument {unknown[0]!r}")
    try:
        return entry.cls(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _misfit(kind, error) from error


def _misfit(kind: str, reason: object) -> ConfigError:
    return ConfigError(f"the config does not fit head kind {kind!r}: {reason}; save the model again with this version")


def _kind_and_arguments(config: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(config, Mapping):
        kind, arguments = config.get("kind"), config.get("config")
        if isinstance(kind, str) and isinstance(arguments, Mapping) and all(isinstance(key, str) for key in arguments):
            return kind, dict(arguments)
    raise ConfigError(f"a head is described by {config!r:.200}; expected {{'kind': str, 'config': dict}}")
