"""What decides an encoder's output, as flat JSON facts that a person can read and two runs can compare.

A fact that should not count costs a whole fill, a fact that is missing serves stale rows. So everything that an
encoder holds counts by default, and what is left out is listed (in ``serialised.py``): where a model came from and
where it runs (paths, device), how it is trained (learning rate, requires_grad), and names that begin with an
underscore, which is where counters and memos belong; objects of installed packages keep their state under such names,
so there they count. Of a transformers model inside an encoder the configuration
counts, not the attributes that this or that version of the library derives from it.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import random
import types
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quatcache.encoders.objects import code_name, hooks_of, is_library, key_order, own_attributes, readable, state_of
from quatcache.encoders.serialised import JSON, compact, flatten, is_ignored, read_config, to_json, tokenizer_facts
from quatcache.encoders.weights import (
    FOREIGN_STATE,
    LIBRARIES,
    attributes,
    named_modules,
    named_tensors,
    package_of,
    packed_tensors,
    tensor_digest,
    weight_facts,
)

__all__ = [
    "adapter_facts",
    "code_name",
    "describe",
    "foreign_facts",
    "hook_facts",
    "module_facts",
    "own_facts",
]

_IGNORED_TYPES = (
    PathLike,
    torch.device,
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
    logging.Logger,
    logging.LoggerAdapter,
    types.ModuleType,
)
_DEPTH = 8
_Seen = dict[int, tuple[str, Any]]
"""Objects by id, with the name of their first description; they are kept here, so that no id is used again."""


def module_facts(module: nn.Module, prefix: str = "") -> dict[str, JSON]:
    """List the facts of any module: tensors, classes of its submodules, and their settings.

    Args:
        module: The module, an :class:`~quatcache.encoders.Encoder` or not.
        prefix: Put before every name, with its dot.

    Returns:
        "weights.<name>": digest, "module.<path>": class, "<path>.<attribute>": value.

    Example:
        >>> facts = module_facts(nn.Sequential(nn.LayerNorm(2, eps=1e-6)))
        >>> facts["module.0"], facts["0.eps"]
        ('torch.nn.modules.normalization.LayerNorm', 1e-06)
    """
    tensors = named_tensors(module)
    facts = {**weight_facts({**tensors, **packed_tensors(module)}, prefix), **adapter_facts(module, prefix)}
    seen: _Seen = {}
    for path, known in (*named_modules(module), *tensors.items()):
        seen.setdefault(id(known), (f"{prefix}{path}" if path else prefix[:-1], known))
    for path, submodule in named_modules(module):
        inner = f"{prefix}{path}." if path else prefix
        first, _ = seen[id(submodule)]
        if first != inner[:-1]:  # a module at two places
            facts[f"module.{inner[:-1]}"] = f"= {first}"
            continue
        if path:
            facts[f"module.{inner[:-1]}"] = code_name(type(submodule))
        facts.update(_settings(submodule, inner, seen))
    return facts


def foreign_facts(model: nn.Module, prefix: str = "") -> dict[str, JSON]:
    """List the modules of the user's own inside a model of a library: an adapter written by hand, for instance.

    Args:
        model: A model of transformers, whose own modules are known by its class and configuration.
        prefix: Put before every name, with its dot.

    Returns:
        "module.<path>": class, "<path>.<attribute>": value; tensors are left out.
    """
    facts: dict[str, JSON] = {}
    seen: _Seen = {}
    for path, submodule in named_modules(model):
        seen.setdefault(id(submodule), (f"{prefix}{path}" if path else prefix[:-1], submodule))
    for path, submodule in named_modules(model):
        inner = f"{prefix}{path}." if path else prefix
        if path and package_of(type(submodule)) not in LIBRARIES | FOREIGN_STATE:
            facts[f"module.{prefix}{path}"] = code_name(type(submodule))
            facts.update(_settings(submodule, inner, seen))
        else:
            facts.update(hook_facts(submodule, inner, seen))
    return {name: value for name, value in facts.items() if not name.startswith("weights.")}


def _settings(module: nn.Module, prefix: str, seen: _Seen) -> dict[str, JSON]:
    facts: dict[str, JSON] = {}
    known, library = package_of(type(module)) in {"transformers", "peft"}, is_library(type(module))
    for name, value in attributes(module).items():
        if not is_ignored(name, value, library=library) and (not known or name == "config"):
            describe(value, prefix + name, facts, seen, ordered=not library)
    return {**facts, **hook_facts(module, prefix, seen)}


def hook_facts(module: nn.Module, prefix: str = "", seen: _Seen | None = None) -> dict[str, JSON]:
    """List the forward hooks of one module that are the user's own; they may change what comes out.

    Args:
        module: Any module; not those inside it.
        prefix: Put before every name, with its dot.
        seen: Objects that need no second description, as in :func:`describe`.

    Returns:
        "forward_hook.<n>" and "forward_pre_hook.<n>": the function's name, and what it carries along.
    """
    facts: dict[str, JSON] = {}
    seen = {id(module): (prefix[:-1], module)} if seen is None else seen
    for name, hook in hooks_of(module).items():
        describe(hook, prefix + name, facts, seen)
    return facts


def own_facts(encoder: nn.Module, besides: Collection[str]) -> dict[str, JSON]:
    """List the facts of an encoder that are not those of the model it adapts: its settings, and what a subclass adds.

    Args:
        encoder: An adapter, or a subclass of one.
        besides: Names of the submodules whose facts are listed otherwise.

    Returns:
        Settings by attribute name; tensors and modules of a subclass as in :func:`module_facts`.
    """
    seen: _Seen = {id(submodule): (path, submodule) for path, submodule in reversed(list(named_modules(encoder)))}
    facts: dict[str, JSON] = {}
    tensors = {**dict(encoder.named_parameters(recurse=False)), **dict(encoder.named_buffers(recurse=False))}
    library = is_library(type(encoder))
    for name, value in attributes(encoder).items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif not is_ignored(name, value, library=library):
            describe(value, name, facts, seen, ordered=not library)
    facts.update(hook_facts(encoder, "", seen))
    if tensors:
        facts.update(weight_facts(tensors))
    for name, child in encoder.named_children():
        if name not in besides:
            facts[f"module.{name}"] = code_name(type(child))
            facts.update(module_facts(child, f"{name}."))
    return facts


def adapter_facts(module: nn.Module, prefix: str = "") -> dict[str, JSON]:
    """List the state of peft adapters: which are active, disabled or merged, and how strongly they act.

    Args:
        module: A model whose layers may be peft layers.
        prefix: Put before every name, with its dot.

    Returns:
        "adapter.<entry>", numbered if layers differ; nothing if the module has no adapters.
    """
    states: dict[str, dict[str, JSON]] = {}
    layer: Any
    for layer in module.modules():
        if package_of(type(layer)) != "peft" or not hasattr(layer, "merged_adapters"):
            continue
        scaling = getattr(layer, "scaling", None)  # some methods have none
        state = {
            "active": to_json(list(layer.active_adapters)),
            "disabled": bool(layer.disable_adapters),
            "merged": to_json(list(layer.merged_adapters)),
            "scaling": to_json(dict(scaling)) if isinstance(scaling, Mapping) else None,
        }
        states.setdefault(json.dumps(state, sort_keys=True), state)
    facts: dict[str, JSON] = {}
    for index, key in enumerate(sorted(states)):
        for name, value in states[key].items():
            facts[f"{prefix}adapter.{index}.{name}" if len(states) > 1 else f"{prefix}adapter.{name}"] = value
    return facts


def describe(
    value: Any,
    name: str,
    facts: dict[str, JSON],
    seen: _Seen | None = None,
    depth: int = 0,
    *,
    ordered: bool = True,
) -> None:
    """Add the facts of one attribute, whatever it is.

    Args:
        value: A setting, a tensor, a tokenizer, a processor, a function, or an object that holds such things.
        name: The name of the fact, and the prefix of the facts inside it.
        facts: Receives the facts.
        seen: Objects that need no second description, by id. A second place is told by the name of the first; a way
            back to what holds the value is not told.
        depth: How deep the value lies; below 8 levels only classes are named.
        ordered: Whether the order of a mapping counts, as it does for the user's own; libraries write theirs anyhow.
    """
    seen = {} if seen is None else seen
    if isinstance(value, _IGNORED_TYPES):
        return
    try:
        plain = to_json(value)
    except TypeError:
        plain = readable(value)
    if plain is not None or value is None:
        facts[name] = compact(plain)
        if ordered and (order := key_order(plain)) is not None:
            facts[f"{name}.order"] = compact(order)
        return
    if id(value) in seen:
        first, _ = seen[id(value)]
        if isinstance(value, Tensor):  # tied or not, what counts are the values
            if f"weights.{name}" not in facts:
                facts[f"weights.{name}"] = tensor_digest(value)
        elif first and not f"{name}.".startswith(f"{first}."):
            facts[name] = f"= {first}"
        return
    seen[id(value)] = name, value
    if isinstance(value, Tensor):
        facts[f"weights.{name}"] = tensor_digest(value)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "biufc":
            facts[f"weights.{name}"] = tensor_digest(torch.from_numpy(np.ascontiguousarray(value)))
        elif value.dtype.kind in "mM":  # times: whole numbers in the unit that the dtype names
            facts[name] = str(value.dtype)
            facts[f"weights.{name}"] = tensor_digest(torch.from_numpy(np.ascontiguousarray(value).view(np.int64)))
        else:
            describe(value.tolist(), name, facts, seen, depth + 1)
    elif depth >= _DEPTH:
        facts[name] = code_name(type(value))
    elif isinstance(value, nn.Module):
        facts[f"module.{name}"] = code_name(type(value))
        facts.update(module_facts(value, f"{name}."))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            describe(inner, f"{name}.{key}", facts, seen, depth + 1, ordered=ordered)
        keys: list[JSON] = [str(key) for key in value]
        if ordered and keys != sorted(map(str, value)):
            facts[f"{name}.order"] = compact(keys)
    elif isinstance(value, list | tuple | set | frozenset):
        listed = value if isinstance(value, list | tuple) else _in_order(value, name, seen, depth)
        for index, inner in enumerate(listed):
            describe(inner, f"{name}.{index}", facts, seen, depth + 1, ordered=ordered)
    elif hasattr(value, "encode_batch") or hasattr(value, "convert_tokens_to_ids"):
        facts.update(tokenizer_facts(value, f"{name}."))
    elif callable(getattr(value, "to_dict", None)) and (is_library(type(value)) or hasattr(value, "to_diff_dict")):
        facts[name] = type(value).__name__
        # A configuration of transformers, else a processor; the defaults of a processor are part of what it does.
        flatten(read_config(value) if hasattr(value, "to_diff_dict") else value.to_dict(), name, facts)
    elif isinstance(value, functools.partial):
        for part, inner in (("", value.func), (".args", value.args), (".keywords", value.keywords)):
            describe(inner, name + part, facts, seen, depth + 1)
    elif inspect.isroutine(value) or isinstance(value, type):
        facts[name] = code_name(value)
        _describe_function(value, name, facts, seen, depth)
    else:
        _describe_object(value, name, facts, seen, depth)


def _describe_object(value: Any, name: str, facts: dict[str, JSON], seen: _Seen, depth: int) -> None:
    """Add an object's class, its attributes, and what it holds beside them."""
    library = is_library(type(value))
    facts[name] = code_name(type(value))
    for part, inner in {**own_attributes(value), **state_of(value)}.items():
        describe(inner, f"{name}.{part}", facts, seen, depth + 1, ordered=not library)


def _in_order(values: Collection[Any], name: str, seen: _Seen, depth: int) -> list[Any]:
    """Sort a set by what its members are described as: their own order differs from process to process."""

    def described(value: Any) -> str:
        facts: dict[str, JSON] = {}
        describe(value, name, facts, dict(seen), depth + 1)
        return json.dumps(facts, sort_keys=True)

    return sorted(values, key=described)


def _describe_function(
    function: Callable[..., Any] | type, name: str, facts: dict[str, JSON], seen: _Seen, depth: int
) -> None:
    """Add what a function carries along: its instance, its closure, its defaults."""
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, type | types.ModuleType):
        describe(owner, f"{name}.self", facts, seen, depth + 1)
    code = getattr(function, "__code__", None)
    for variable, cell in zip(
        getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False
    ):
        try:
            describe(cell.cell_contents, f"{name}.{variable}", facts, seen, depth + 1)
        except ValueError:  # a variable that was never assigned
            continue
    for parameter, default in (getattr(function, "__kwdefaults__", None) or {}).items():
        describe(default, f"{name}.{parameter}", facts, seen, depth + 1)
    for index, default in enumerate(getattr(function, "__defaults__", None) or ()):
        describe(default, f"{name}.default_{index}", facts, seen, depth + 1)
