"""The tensors of an encoder: their names, and a digest of each.

A digest is xxh3_128 over dtype, shape and bytes, so that neither device nor memory layout matters. On the CPU the
bytes are hashed where they lie, at about the speed of memory: 100 MB take about 4 ms. It is therefore done anew each
time. Remembering the digest by the tensor's identity, ``_version`` and ``data_ptr`` was rejected for the
CPU: a write through ``.data`` changes none of the three, and that is how peft merges an adapter. Tensors on an
accelerator must be copied first, which is slow; their digests are remembered, and trusted only while two sums over
the bits, taken on the device, are unchanged.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from quatcache.encoders.serialised import JSON
from quatcache.errors import FormatError, ModelDefinitionError

__all__ = [
    "FOREIGN_STATE",
    "LIBRARIES",
    "assign_tensors",
    "attributes",
    "copy_without_weights",
    "named_modules",
    "named_tensors",
    "package_of",
    "packed_tensors",
    "tensor_digest",
    "tensors_in",
    "weight_facts",
]

_Module = TypeVar("_Module", bound=nn.Module)

_CHUNK = 64 * 2**20
_INTERNAL = frozenset(nn.Module().__dict__)
LIBRARIES = frozenset(
    {"builtins", "peft", "sentence_transformers", "tokenizers", "torch", "torchvision", "transformers"}
)
"""Packages whose classes are known by name: their class attributes describe the library."""
FOREIGN_STATE = frozenset(
    {"accelerate", "auto_gptq", "auto_round", "awq", "bitsandbytes", "eetq", "gptqmodel", "hqq", "optimum", "torchao"}
)
"""Packages of quantised layers: their attributes remember the last call, and what counts is in their weights."""
_SAVED_ONLY = frozenset({"peft", "transformers"})
# Counted from 0 by the code of a model; some versions of transformers save them, some do not.
_DERIVED = frozenset({"position_ids", "token_type_ids"})
_remembered: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], str]] = {}


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give a module and all modules inside it, as often as they occur, compiled ones under their plain names.

    Args:
        module: Any module.

    Yields:
        Dotted path ("" for the module itself) and module. What ``torch.compile`` wraps around a module computes the
        same from the same weights, so it is passed over, and its name is no part of a path.

    Example:
        >>> shared = nn.ReLU()
        >>> [path for path, _ in named_modules(nn.Sequential(shared, shared))]
        ['', '0', '1']
    """
    for path, submodule in module.named_modules(remove_duplicate=False):
        if not isinstance(getattr(submodule, "_orig_mod", None), nn.Module):
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), submodule


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name every tensor that a module holds: parameters, buffers, and plain tensors or arrays in attributes.

    Modules of transformers and peft count with what they save: what else they hold is computed from their
    configuration, or remembers the last call.

    Args:
        module: Any module. Attributes may be tensors, NumPy arrays, or lists, tuples and dicts of these, on the
            instance or on its class, private or not.

    Returns:
        Tensors by dotted name; a tensor with two names appears under both. Arrays come as tensors over their memory.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.scale = torch.ones(1)
        >>> sorted(named_tensors(layer))
        ['bias', 'scale', 'weight']
    """
    found: dict[str, Tensor] = {}
    for path, submodule in named_modules(module):
        own: dict[str, Tensor] = dict(submodule.named_parameters(recurse=False, remove_duplicate=False))
        saved = package_of(type(submodule)) in _SAVED_ONLY
        for name, buffer in submodule.named_buffers(recurse=False, remove_duplicate=False):
            if not saved or (name not in submodule._non_persistent_buffers_set and name not in _DERIVED):
                own[name] = buffer
        if not saved:
            torch_made = package_of(type(submodule)) == "torch"
            for name, value in attributes(submodule).items():
                if torch_made and name.startswith("_"):
                    continue  # views of the parameters, as in nn.LSTM
                own.update((f"{name}.{rest}".rstrip("."), tensor) for rest, tensor in tensors_in(value))
        found.update((f"{path}.{name}" if path else name, tensor) for name, tensor in own.items())
    return found


def packed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name the tensors that a module saves but holds in no parameter or buffer: those of quantised layers.

    Args:
        module: Any module.

    Returns:
        Copies by dotted name, for reading only.
    """
    found: dict[str, Tensor] = {}
    for path, submodule in named_modules(module):
        if type(submodule)._save_to_state_dict is not nn.Module._save_to_state_dict:
            saved: dict[str, Any] = {}
            submodule._save_to_state_dict(saved, f"{path}." if path else "", True)
            for name, value in saved.items():
                if not isinstance(value, nn.Parameter):
                    found.update((f"{name}.{rest}".rstrip("."), tensor) for rest, tensor in tensors_in(value))
    return found


def attributes(module: object) -> dict[str, Any]:
    """Give the attributes of an object: those of its own classes, overridden by those of the instance.

    Classes of PyTorch and of the libraries built on it contribute nothing: their class attributes describe the
    library, and change with its version.
    """
    found: dict[str, Any] = {}
    for cls in reversed(type(module).__mro__):
        if package_of(cls) not in LIBRARIES and cls.__module__ != "quatcache.encoders.encoder":
            found.update((name, value) for name, value in vars(cls).items() if not _is_definition(name, value))
            slots = vars(cls).get("__slots__", ())
            slots = (slots,) if isinstance(slots, str) else slots
            found.update((name, getattr(module, name)) for name in slots if hasattr(module, name))
    found.update(getattr(module, "__dict__", {}))
    if isinstance(module, nn.Module):
        return {name: value for name, value in found.items() if name not in _INTERNAL}
    return found


def package_of(cls: type) -> str:
    """Give the top-level package that a class comes from."""
    return cls.__module__.partition(".")[0]


def _is_definition(name: str, value: object) -> bool:
    """Tell methods, properties, descriptors and dunder names from data on a class."""
    return name.startswith("__") or name == "_abc_impl" or callable(value) or hasattr(value, "__get__")


def tensors_in(value: object) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors and arrays in nested lists, tuples and dicts, each with its dotted place; "" for the value."""
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield "", torch.as_tensor(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            for rest, tensor in tensors_in(inner):
                yield f"{key}.{rest}".rstrip("."), tensor
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            for rest, tensor in tensors_in(inner):
                yield f"{index}.{rest}".rstrip("."), tensor


def assign_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into those of the same names that a module holds.

    Args:
        module: The module to change, in place.
        tensors: One tensor for every name in ``named_tensors(module)``, of the same shape.
        source: Where the tensors came from, for the error message.

    Raises:
        FormatError: If a name is missing or unknown, or a shape differs; the module is then unchanged.
    """
    own = named_tensors(module)
    for name in sorted(own.keys() ^ tensors.keys()):
        where = f"{source} lacks the tensor {name!r}" if name in own else f"{source} has a tensor {name!r}"
        raise FormatError(f"{where} and {type(module).__qualname__} does {'' if name in own else 'not '}have one")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise FormatError(
                f"{source}: {name!r} has shape {tuple(tensor.shape)}, but {type(module).__qualname__} has "
                f"{tuple(own[name].shape)}"
            )
    for name, tensor in tensors.items():
        own[name].detach().copy_(tensor)


def tensor_digest(tensor: Tensor) -> str:
    """Digest a tensor's dtype, shape and bytes.

    Args:
        tensor: A tensor of any shape, dtype, layout and device, "meta" excepted.

    Returns:
        32 hex characters; equal for equal tensors on any device, in any process.

    Raises:
        ModelDefinitionError: If the tensor has no data (device "meta").

    Example:
        >>> tensor_digest(torch.ones(2)) == tensor_digest(torch.ones(2))
        True
        >>> tensor_digest(torch.ones(2)) == tensor_digest(torch.ones(2, dtype=torch.float64))
        False
    """
    if tensor.device.type == "meta":
        raise ModelDefinitionError(
            f"a tensor of shape {tuple(tensor.shape)} is on device 'meta' and has no values to digest; load the weights"
        )
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_quantized:
        plain = plain.dequantize()
    return _hash(plain) if plain.device.type == "cpu" else _remembered_digest(tensor, plain)


def weight_facts(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, JSON]:
    """Digest tensors by name, and name their dtypes in one fact of its own.

    Args:
        tensors: Tensors by name; two names of one tensor are digested once.
        prefix: Put between "weights." and every name, with its dot.

    Returns:
        "weights.<name>": digest for every tensor, and "dtype": the floating dtypes joined by "+".
    """
    digests: dict[int, str] = {}
    facts: dict[str, JSON] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in digests:
            digests[id(tensor)] = tensor_digest(tensor)
        facts[f"weights.{prefix}{name}"] = digests[id(tensor)]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if dtypes:
        facts[f"{prefix}dtype"] = "+".join(sorted(dtypes))
    return facts


def _remembered_digest(tensor: Tensor, plain: Tensor) -> str:
    """Hash the values (``plain``) of a tensor, unless they were hashed before and two sums over them are as then."""
    state = (plain.data_ptr(), tensor._version, plain.dtype, tuple(plain.shape), *_bit_sums(plain))
    known = _remembered.get(id(tensor))
    # The reference guards against another tensor that was given the id of one that is gone.
    if known is not None and known[0]() is tensor and known[1] == state:
        return known[2]
    digest = _hash(plain)
    _remembered[id(tensor)] = (weakref.ref(tensor), state, digest)
    return digest


def _hash(tensor: Tensor) -> str:
    state = xxhash.xxh3_128(f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}".encode())
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK):
        state.update(flat[start : start + _CHUNK].cpu().numpy().data)
    return state.hexdigest()


def _bit_sums(tensor: Tensor) -> tuple[int, int]:
    """Sum the bytes of a tensor on its device, plain and weighted by position."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    plain = weighted = 0
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        plain += int(part.sum())
        weighted += start * plain + int((part * torch.arange(part.numel(), device=part.device)).sum())
    return plain, weighted


def copy_without_weights(module: _Module) -> _Module:
    """Copy a module, with every parameter and buffer replaced by a tensor on "meta" of the same shape.

    A loader's worker needs the part of a model that collates, and the libraries do not keep that part in one place.
    So the whole object is copied, and the copy is told that the weights are copied already: the memo of ``deepcopy``
    maps each to a tensor that holds nothing.

    Args:
        module: Any module whose other attributes can be copied.

    Returns:
        A module that pickles to the size of its settings (tokenizer included), and that cannot run ``forward``.

    Example:
        >>> import pickle
        >>> len(pickle.dumps(copy_without_weights(nn.Linear(1000, 1000)))) < 10_000
        True
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)
