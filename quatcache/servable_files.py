"""The directory of a servable model: encoders and head, as safetensors and JSON.

    servable.json           {"format": 1, "encoders": [{"name": ..., "kind": ...}, ...], "head": {...} or null}
    head.safetensors        the head's state
    encoders/0/ ...         one directory per encoder, in the order of the list

A directory of an encoder is found by its place in the list, so a name, which may be any string, never becomes a path.
A kind is looked up in a table of this module, or of ``quatcache.heads``: a file cannot name what is imported. The
rejected alternative, one pickle of the module, is shorter, and runs whatever its sender wrote.

Everything is written beside the target and renamed, so that a target either holds the whole model or what it held
before.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import quatcache.encoders
from quatcache.encoders.encoder import Encoder
from quatcache.errors import ConfigError, FormatError, ModelDefinitionError, StoreError
from quatcache.heads import head_from_config, head_to_config

__all__ = ["load_parts", "save_parts"]

_FORMAT = 1
_INDEX = "servable.json"
_HEAD = "head.safetensors"
_ENCODERS = "encoders"
_CUSTOM = "custom"
# Kinds that can be rebuilt from their files alone; the values are names in quatcache.encoders, imported on first use.
_KINDS = {
    "sentence_transformers": "SentenceTransformerEncoder",
    "transformers": "TransformersEncoder",
    "lower_layers": "LowerLayersEncoder",
}


def save_parts(target: Path, encoders: Mapping[str, Encoder], head: nn.Module) -> None:
    """Write encoders and head; what was saved there before is replaced.

    Args:
        target: A directory that does not exist, is empty, or holds a saved model.
        encoders: The encoders by name.
        head: The head.

    Raises:
        ConfigError: If the directory holds something else, which is left alone.
        ModelDefinitionError: If an encoder cannot be saved as data.
        StoreError: If the directory cannot be written; what it held before is intact.
    """
    if target.exists() and not (target / _INDEX).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and holds no saved model; choose another path")
    unfinished = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        _write(unfinished, encoders, head)
        _flush(unfinished)
        _replace(target, unfinished)
    except OSError as error:
        raise StoreError(f"{target} cannot be written ({error}); free space or choose another path") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, encoders: Mapping[str, Encoder], head: nn.Module) -> None:
    listed = []
    for index, (name, encoder) in enumerate(encoders.items()):
        kind = _kind(encoder)
        place = folder / _ENCODERS / str(index)
        # Not the save of a custom class: load gives the tensors back to an instance that the caller made.
        (Encoder if kind == _CUSTOM else type(encoder)).save(encoder, place)
        listed.append({"name": name, "kind": kind})
    try:
        config: dict[str, Any] | None = head_to_config(head)
    except ModelDefinitionError:
        config = None  # a head of the user's own: load asks for an instance
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    save_file(state, folder / _HEAD)
    document = {"format": _FORMAT, "encoders": listed, "head": config, "head_class": type(head).__qualname__}
    (folder / _INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _kind(encoder: Encoder) -> str:
    """Name the kind of an encoder; a subclass of a built-in one may compute something else, and is custom."""
    for kind, name in _KINDS.items():
        # By name first: asking for the class would import its library for nothing.
        if type(encoder).__qualname__ == name and type(encoder) is getattr(quatcache.encoders, name):
            return kind
    return _CUSTOM


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _replace(target: Path, finished: Path) -> None:
    """Put a finished directory in the place of the target, with no moment at which both are gone."""
    if not target.exists():
        finished.rename(target)
        return
    old = target.parent / f"{finished.name}.old"
    target.rename(old)
    try:
        finished.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_parts(
    folder: Path, encoders: Mapping[str, Encoder], head: nn.Module | None
) -> tuple[dict[str, Encoder], nn.Module]:
    """Read what :func:`save_parts` wrote.

    Args:
        folder: The directory.
        encoders: Instances, by name, of the encoders that their files cannot rebuild.
        head: An instance of a head that its file cannot rebuild.

    Returns:
        The encoders by name, and the head.

    Raises:
        ConfigError: If an instance is missing, or was passed where none is needed.
        FormatError: If a file is missing, damaged or from a newer version, or could run code.
    """
    listed, head_config, head_class = _read_index(folder / _INDEX)
    custom = [name for name, kind in listed if kind == _CUSTOM]
    for name in encoders:
        if name not in custom:
            reason = "is rebuilt from its files" if name in dict(listed) else "is not part of the saved model"
            raise ConfigError(f"encoder {name!r} {reason}; leave it out of encoders=")
    rebuilt: dict[str, Encoder] = {}
    for index, (name, kind) in enumerate(listed):
        place = folder / _ENCODERS / str(index)
        if kind != _CUSTOM:
            rebuilt[name] = getattr(quatcache.encoders, _KINDS[kind]).load(place)
            continue
        if name not in encoders:
            raise ConfigError(
                f"encoder {name!r} is of a class that its files cannot rebuild; pass an instance: "
                f"encoders={{{name!r}: ...}}"
            )
        Encoder.load_weights(encoders[name], place)
        rebuilt[name] = encoders[name]
    return rebuilt, _load_head(folder / _HEAD, head_config, head_class, head)


def _read_index(file: Path) -> tuple[list[tuple[str, str]], dict[str, Any] | None, str]:
    """Read and check servable.json: names and kinds of the encoders, and the head."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read ({error}); is this the directory of a saved model?") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise FormatError(f"{file} has format {found!r}, this version of quatcache reads {_FORMAT}; upgrade quatcache")
    listed: list[tuple[str, str]] = []
    entries = document.get("encoders")
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"{file} lists no encoder; save the model again")
    for entry in entries:
        name, kind = (entry.get("name"), entry.get("kind")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(kind, str) or (kind not in _KINDS and kind != _CUSTOM):
            raise FormatError(f"{file} lists the encoder {entry!r}; known kinds are {', '.join([*_KINDS, _CUSTOM])}")
        if name in dict(listed):
            raise FormatError(f"{file} lists the encoder {name!r} twice; save the model again")
        listed.append((name, kind))
    head = document.get("head")
    if not (head is None or isinstance(head, dict)):
        raise FormatError(f"{file} describes the head as {head!r:.80}; save the model again")
    return listed, head, str(document.get("head_class"))


def _load_head(file: Path, config: dict[str, Any] | None, name: str, given: nn.Module | None) -> nn.Module:
    if config is None and given is None:
        raise ConfigError(f"the head is a {name}, which has no registered kind; pass an instance: head=...")
    if config is not None and given is not None:
        raise ConfigError(f"the head {name} is rebuilt from its files; leave out head=")
    try:
        state = {key: tensor.clone() for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{file} cannot be read ({error}); save the model again") from error
    try:
        if given is not None:
            given.load_state_dict(state)
            return given
        head = head_from_config(config or {})
        # Assigned, not copied: a head in half precision stays one.
        head.load_state_dict(state, assign=True)
    except (RuntimeError, ConfigError) as error:
        reason = " ".join(str(error).split())
        if given is not None:
            raise ConfigError(
                f"the head that was passed does not fit {file} ({reason}); pass a head of the shapes that were saved"
            ) from error
        raise FormatError(f"{file} does not fit the head {name} ({reason}); save the model again") from error
    return head
