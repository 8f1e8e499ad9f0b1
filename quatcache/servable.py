"""What remains of a model after training: encoders and head, in one directory of safetensors and JSON.

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
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

import quatcache.encoders
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.weights import to_device
from quatcache.errors import ConfigError, EncoderOutputError, FormatError, ModelDefinitionError, StoreError
from quatcache.heads import head_from_config, head_input, head_to_config

__all__ = ["ServableModel"]

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


class ServableModel(nn.Module):
    """Encoders and a head, ready to encode items and to be saved.

    Args:
        encoders: One or more encoders by name. Their rows are concatenated in the order of the sorted names.
        head: Takes a batch of shape (B, sum of the embedding sizes).

    Attributes:
        encoders: The encoders by name, sorted.
        head: The head.

    Raises:
        ConfigError: If there is no encoder, a name is not a string, or the head expects rows of another size.
        ModelDefinitionError: If something that is no encoder, or no module, was passed.

    Example:
        >>> import tempfile
        >>> from quatcache.encoders import ModuleEncoder
        >>> from quatcache.heads import LinearHead
        >>> def encoder():
        ...     return ModuleEncoder(nn.Embedding(5, 4), torch.tensor, 4)
        >>> model = ServableModel({"default": encoder()}, LinearHead(4, 2))
        >>> rows = model.encode([0, 3, 3])
        >>> rows.shape
        torch.Size([3, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder)
        ...     again = ServableModel.load(folder, encoders={"default": encoder()})
        >>> torch.equal(again.encode([0, 3, 3]), rows)
        True
    """

    def __init__(self, encoders: Mapping[str, Encoder], head: nn.Module) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping) or not encoders:
            raise ConfigError(f"encoders is {encoders!r:.80}; pass a dict with one or more encoders by name")
        for name, encoder in encoders.items():
            if not isinstance(name, str):
                raise ConfigError(f"an encoder is named {name!r}; names are strings")
            if not isinstance(encoder, Encoder):
                raise ModelDefinitionError(
                    f"encoder {name!r} is a {type(encoder).__qualname__}; pass a quatcache.encoders.Encoder"
                )
        if not isinstance(head, nn.Module):
            raise ModelDefinitionError(f"head is a {type(head).__qualname__}; pass a torch.nn.Module")
        self._names = tuple(sorted(encoders))
        # Not a ModuleDict: that one refuses names with dots, and names like "keys".
        self._encoders = nn.ModuleList(encoders[name] for name in self._names)
        self.head = head
        size, expected = self.embedding_size, getattr(head, "input_embedding_size", None)
        if expected is not None and expected != size:
            raise ConfigError(f"the encoders give {size} values per item, the head takes {expected}; make them agree")
        self.eval()

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders by name, sorted."""
        return {name: cast("Encoder", module) for name, module in zip(self._names, self._encoders, strict=True)}

    @property
    def embedding_size(self) -> int:
        """Size of the head's input: the sum over the encoders."""
        return sum(encoder.embedding_size for encoder in self.encoders.values())

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Encode collated items.

        Args:
            inputs: For each encoder's name, what its ``collate`` returned for the same B items.

        Returns:
            What the head makes of the concatenated rows, of shape (B, D).
        """
        result: Tensor = self.head(head_input({name: encoder(inputs[name]) for name, encoder in self.encoders.items()}))
        return result

    def encode(self, items: Sequence[Any], batch_size: int = 32, show_progress_bar: bool = False) -> Tensor:
        """Encode items, in eval mode and without gradients; the modes of the modules are left as they were found.

        Args:
            items: N items. Items of like length are batched together, the result is in their order.
            batch_size: Items per call of the encoders, at least 1.
            show_progress_bar: Whether to show a progress bar.

        Returns:
            Rows of shape (N, D), on the device of the model.

        Raises:
            ConfigError: If ``items`` is a single string, or ``batch_size`` is below 1.
            EncoderOutputError: If the head returned another number of rows than there were items.
        """
        if isinstance(items, str | bytes):
            raise ConfigError(f"items is the single text {items[:40]!r}; pass a list of items")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; pass a number of at least 1")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                return self._encode(items, batch_size, show_progress_bar)
        finally:
            for module, mode in modes:
                module.training = mode

    def _encode(self, items: Sequence[Any], batch_size: int, show_progress_bar: bool) -> Tensor:
        encoders, device = self.encoders, _device(self)
        if len(items) == 0:
            # The head alone knows the size of its output.
            dtype = next((parameter.dtype for parameter in self.head.parameters()), torch.float32)
            empty: Tensor = self.head(torch.zeros(0, self.embedding_size, device=device, dtype=dtype))
            return empty
        costs = [sum(encoder.length(item) for encoder in encoders.values()) for item in items]
        order = sorted(range(len(items)), key=costs.__getitem__, reverse=True)
        rows: list[Tensor] = []
        starts = range(0, len(items), batch_size)
        for start in track(starts, "encoding", disable=not show_progress_bar):
            batch = [items[index] for index in order[start : start + batch_size]]
            inputs = {name: to_device(encoder.collate(batch), _device(encoder)) for name, encoder in encoders.items()}
            encoded = self(inputs)
            if encoded.dim() == 0 or len(encoded) != len(batch):
                raise EncoderOutputError(
                    f"the head returned shape {tuple(encoded.shape)} for {len(batch)} items; return one row per item"
                )
            rows.append(encoded)
        together = torch.cat(rows)
        result = torch.empty_like(together)
        result[torch.tensor(order, device=together.device)] = together
        return result

    def save(self, path: str | PathLike[str]) -> None:
        """Write encoders and head as safetensors and JSON; a model that was saved there before is replaced.

        Args:
            path: A directory that does not exist, is empty, or holds a saved model.

        Raises:
            ConfigError: If the directory holds something else, which is left alone.
            ModelDefinitionError: If an encoder cannot be saved as data.
            StoreError: If the directory cannot be written; what it held before is intact.
        """
        target = Path(path)
        if target.exists() and not (target / _INDEX).is_file() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and holds no saved model; choose another path")
        unfinished = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        try:
            unfinished.mkdir(parents=True)
            self._write(unfinished)
            _flush(unfinished)
            _replace(target, unfinished)
        except OSError as error:
            raise StoreError(f"{target} cannot be written ({error}); free space or choose another path") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        listed = []
        for index, (name, encoder) in enumerate(self.encoders.items()):
            kind = _kind(encoder)
            place = folder / _ENCODERS / str(index)
            # Not the save of a custom class: load gives the tensors back to an instance that the caller made.
            (Encoder if kind == _CUSTOM else type(encoder)).save(encoder, place)
            listed.append({"name": name, "kind": kind})
        try:
            head: dict[str, Any] | None = head_to_config(self.head)
        except ModelDefinitionError:
            head = None  # a head of the user's own: load asks for an instance
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.head.state_dict().items()}
        save_file(state, folder / _HEAD)
        document = {"format": _FORMAT, "encoders": listed, "head": head, "head_class": type(self.head).__qualname__}
        (folder / _INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        encoders: Mapping[str, Encoder] | None = None,
        head: nn.Module | None = None,
    ) -> Self:
        """Rebuild a model from what :meth:`save` wrote.

        Args:
            path: The directory that was given to :meth:`save`.
            encoders: Instances, by name, of the encoders that are not among the built-in kinds (your own classes, and
                ``ModuleEncoder``); the saved tensors are copied into them.
            head: An instance of the head if it is not among the registered kinds; the saved state is copied into it.

        Returns:
            A model in eval mode, on the CPU.

        Raises:
            ConfigError: If an instance is missing, or was passed where none is needed.
            FormatError: If a file is missing, damaged or from a newer version, or could run code.
        """
        folder = Path(path)
        listed, head_config, head_class = _read_index(folder / _INDEX)
        given = dict(encoders or {})
        custom = [name for name, kind in listed if kind == _CUSTOM]
        for name in given:
            if name not in custom:
                reason = "is rebuilt from its files" if name in dict(listed) else "is not part of the saved model"
                raise ConfigError(f"encoder {name!r} {reason}; leave it out of encoders=")
        rebuilt: dict[str, Encoder] = {}
        for index, (name, kind) in enumerate(listed):
            place = folder / _ENCODERS / str(index)
            if kind != _CUSTOM:
                rebuilt[name] = getattr(quatcache.encoders, _KINDS[kind]).load(place)
                continue
            if name not in given:
                raise ConfigError(
                    f"encoder {name!r} is of a class that its files cannot rebuild; pass an instance: "
                    f"encoders={{{name!r}: ...}}"
                )
            Encoder.load_weights(given[name], place)
            rebuilt[name] = given[name]
        return cls(rebuilt, _load_head(folder / _HEAD, head_config, head_class, head))


def _kind(encoder: Encoder) -> str:
    """Name the kind of an encoder; a subclass of a built-in one may compute something else, and is custom."""
    for kind, name in _KINDS.items():
        # By name first: asking for the class would import its library for nothing.
        if type(encoder).__qualname__ == name and type(encoder) is getattr(quatcache.encoders, name):
            return kind
    return _CUSTOM


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


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
