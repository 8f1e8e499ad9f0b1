"""Bringing what encoders take, and losses, to a device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

__all__ = ["to_device"]


def to_device(inputs: Any, device: torch.device) -> Any:
    """Give inputs with their tensors on a device, without changing what was passed.

    Args:
        inputs: Tensors in mappings, lists, tuples and dataclasses, nested as they may be; or an object with ``to``.
        device: Where they are needed.

    Returns:
        New containers of the same types; tensors that are on the device already are shared, and what is no tensor
        stays as it is.

    Example:
        >>> to_device({"ids": torch.ones(2), "modality": "text"}, torch.device("cpu"))
        {'ids': tensor([1., 1.]), 'modality': 'text'}
    """
    if isinstance(inputs, torch.Tensor):  # copies to a processor, or to MPS, could be read before they are there
        return inputs if inputs.device == device else inputs.to(device, non_blocking=device.type not in ("cpu", "mps"))
    if type(inputs) is dict:
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, tuple) and callable(getattr(inputs, "to", None)):
        return inputs.to(device)  # type: ignore[attr-defined]  # a packed sequence keeps its sizes where they are
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(to_device(value, device) for value in inputs))
    if isinstance(inputs, list | tuple):
        return type(inputs)(to_device(value, device) for value in inputs)
    moves, mapping = callable(getattr(inputs, "to", None)), isinstance(inputs, Mapping)
    if not (moves or mapping or dataclasses.is_dataclass(inputs)):
        return inputs
    if mapping and not moves and not isinstance(inputs, MutableMapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    moved: Any = copy.copy(inputs) if mapping or dataclasses.is_dataclass(inputs) else inputs
    if moves:
        return moved.to(device)  # mappings of transformers change in place: that is the copy
    if isinstance(inputs, MutableMapping):
        moved.update((name, to_device(value, device)) for name, value in inputs.items())
    elif dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        for field in dataclasses.fields(inputs):
            object.__setattr__(moved, field.name, to_device(getattr(inputs, field.name), device))
    return moved
