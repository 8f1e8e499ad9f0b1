"""Saved encoders: a settings file beside a model or weights, and the refusal of all in it that could run code.

A directory may come from anywhere. Settings are read against a list of names and types; the model beside them may
hold safetensors, JSON and text only; and the classes that its JSON names must be those of the library that loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from quatcache.encoders.facts import adapter_facts
from quatcache.encoders.serialised import JSON
from quatcache.encoders.weights import assign_tensors, named_tensors
from quatcache.errors import FormatError, ModelDefinitionError

__all__ = [
    "SavedModel",
    "load_weights",
    "naming_damage",
    "open_model",
    "refuse_classes",
    "require_saveable",
    "save_model",
    "save_weights",
]

SETTINGS_FILE = "encoder.json"
FORMAT_VERSION = 1
_WEIGHTS_FILE = "weights.safetensors"
_MODEL_FOLDER = "model"
# Files that are executed, or unpickled, by whoever loads a model from a folder.
_CODE = frozenset(
    {".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack"}
)


def save_weights(path: str | PathLike[str], module: nn.Module, about: Mapping[str, JSON]) -> None:
    """Write the tensors of an encoder of a class that its files cannot name.

    Args:
        path: The encoder's directory; it is made if it does not exist.
        module: The encoder.
        about: What a person should know of it; it is written beside the tensors, and never read.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # A tensor that shares memory, or has gaps, is refused by safetensors.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors(module).items()}
    save_file(tensors, folder / _WEIGHTS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_weights(path: str | PathLike[str], module: nn.Module) -> None:
    """Fill in the tensors that :func:`save_weights` wrote; every one of them must fit.

    Args:
        path: The encoder's directory.
        module: The encoder.

    Raises:
        FormatError: If the file is missing or damaged, or holds other tensors than the encoder has.
    """
    file = Path(path) / _WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{file} cannot be read ({error}); save the encoder again") from error
    with torch.no_grad():
        assign_tensors(module, tensors, source=str(file))


def save_model(
    path: str | PathLike[str],
    kind: str,
    model: nn.Module,
    settings: Mapping[str, JSON],
    write: Callable[[Path], object],
) -> None:
    """Write the model of a built-in encoder, and beside it the settings.

    Args:
        path: The encoder's directory; it is made if it does not exist.
        kind: The key of the class in the fixed registry of kinds.
        model: The model; the dtype of its weights is one of the settings.
        settings: The other arguments that make the encoder again.
        write: Writes the model, and what belongs to it, into a directory.

    Raises:
        FormatError: If a file was written that could run code.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / _MODEL_FOLDER)
    _refuse_code(folder / _MODEL_FOLDER)
    dtype = _floating_dtype(model)
    named = {**settings, "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    document = {"format": FORMAT_VERSION, "kind": kind, "settings": named}
    (folder / SETTINGS_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class SavedModel(NamedTuple):
    """A model that was saved, before its library reads it.

    Attributes:
        folder: Its directory, without a file that could run code.
        settings: The arguments that make the encoder again, less the model.
        dtype: The dtype of its weights; None: it has several.
    """

    folder: Path
    settings: dict[str, Any]
    dtype: torch.dtype | None


def open_model(path: str | PathLike[str], kind: str, allowed: Mapping[str, tuple[type, ...]]) -> SavedModel:
    """Check what :func:`save_model` wrote.

    Args:
        path: The encoder's directory.
        kind: The kind that it must be of.
        allowed: The types of every setting but the dtype; None is always allowed.

    Returns:
        What the library needs to read it.

    Raises:
        FormatError: If the settings are missing or damaged, or a file could run code.
    """
    settings = _read_settings(path, kind, {**allowed, "dtype": (str,)})
    folder = Path(path) / _MODEL_FOLDER
    _refuse_code(folder)
    dtype = _dtype_of(settings.pop("dtype"), folder)
    return SavedModel(folder, settings, dtype)


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Let a library load a saved model.

    Raises:
        FormatError: It could not; the message names the folder.
    """
    try:
        yield
    except Exception as error:  # whatever the library makes of damaged files
        reason = " ".join(str(error).split())
        raise FormatError(f"{folder} cannot be loaded ({reason}); save the encoder again") from error


def _floating_dtype(module: nn.Module) -> torch.dtype | None:
    """Give the one floating dtype of a module's parameters, or None if there are several or none."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _read_settings(path: str | PathLike[str], kind: str, allowed: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Read the settings of a built-in encoder, taking nothing on trust.

    Args:
        path: The encoder's directory.
        kind: The kind that the file must name.
        allowed: The types of every setting that may occur; None is always allowed.

    Returns:
        All the settings.

    Raises:
        FormatError: If the file is missing, damaged, of a newer format or of another kind, or has a setting too many or
            too few.
    """
    file = Path(path) / SETTINGS_FILE
    document = _read_json(file)
    if not isinstance(document, dict) or not isinstance(document.get("settings"), dict):
        raise FormatError(f"{file} does not hold the settings of an encoder; save the encoder again")
    if document.get("format") != FORMAT_VERSION:
        raise FormatError(
            f"{file} has format {document.get('format')!r}, this version reads {FORMAT_VERSION}; upgrade quatcache"
        )
    if document.get("kind") != kind:
        raise FormatError(
            f"{file} is of kind {document.get('kind')!r}, not {kind!r}; load it with the class that saved it"
        )
    settings: dict[str, Any] = document["settings"]
    for name, value in settings.items():
        types = allowed.get(name)
        if types is None or not (value is None or type(value) in types):
            raise FormatError(f"{file}: {name} = {value!r} is not a setting of this kind; save the encoder again")
    missing = sorted(allowed.keys() - settings.keys())
    if missing:
        raise FormatError(f"{file} lacks the setting {missing[0]!r}; save the encoder again")
    return settings


def _dtype_of(name: str | None, folder: Path) -> torch.dtype | None:
    """Turn the name of a floating dtype in a file into the dtype; None stays None.

    Raises:
        FormatError: If torch has no floating dtype of that name.
    """
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise FormatError(f"{folder} has the dtype {name!r}, which torch does not know; save the encoder again")
    return dtype


def _refuse_code(folder: Path) -> None:
    """Refuse a model directory in which a file could run code when it is loaded.

    Args:
        folder: A directory with a saved model.

    Raises:
        FormatError: If it does not exist, or holds Python source, a pickle, or another executable format.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder} does not exist; save the encoder again")
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in _CODE:
            raise FormatError(f"{file} could run code when loaded; save the model with safetensors and JSON only")


def require_saveable(model: nn.Module, owner: str) -> None:
    """Refuse to save a model whose adapters its library would save without the model under them."""
    if adapter_facts(model):
        raise ModelDefinitionError(
            f"{owner} has a peft adapter that is not merged; call merge_and_unload() on the model before saving it"
        )


def _read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        FormatError: If it is missing, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read ({error}); save it again") from error


def refuse_classes(folder: Path) -> None:
    """Refuse a sentence-transformers model whose JSON names classes to import from elsewhere.

    Args:
        folder: The model's directory.

    Raises:
        FormatError: If a module is not of sentence-transformers, or an activation function not of ``torch.nn``.
    """
    for file in sorted(folder.rglob("*.json")):
        for name, package in _named_classes(file, folder):
            if not isinstance(name, str) or not name.startswith(package):
                raise FormatError(f"{file} names the class {name!r}; only {package}* may come from a file")


def _named_classes(file: Path, folder: Path) -> Iterator[tuple[object, str]]:
    """Give the classes that a file makes sentence-transformers import, each with the package it must be in."""
    if file.name == "modules.json":
        stages = _read_json(file)
        for stage in stages if isinstance(stages, list) else [stages]:
            yield (stage.get("type") if isinstance(stage, dict) else stage), "sentence_transformers."
    elif file.name == "router_config.json":
        config = _read_json(file)
        types = config.get("types") if isinstance(config, dict) else None
        for name in types.values() if isinstance(types, dict) else [types]:
            yield name, "sentence_transformers."
    elif file.name == "config.json" and file.parent != folder:
        config = _read_json(file)
        if isinstance(config, dict) and config.get("activation_function") is not None:
            yield config["activation_function"], "torch.nn."
