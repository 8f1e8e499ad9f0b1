"""What the files of a model tell without loading it: where they are, and the size of its embeddings.

Only folders of well-known layouts are understood, with everything that decides the model inside them. Of any other
(adapters over a model elsewhere, tokenizers without tokenizer.json, modules of somebody's own) nothing is said, and the
model is loaded at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

__all__ = [
    "ModelFiles",
    "absolute",
    "sentence_transformer_files",
    "sentence_transformer_size",
    "transformer_files",
    "transformer_size",
]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_WITHOUT_SIZE = frozenset({"Normalize", "Dropout"})
_ELSEWHERE = "name_or_path"


class ModelFiles(NamedTuple):
    """The files of a model that can be loaded later.

    Attributes:
        folders: Where they are: those of the model, and of a tokenizer that lies elsewhere.
        embedding_size: Size of its embeddings, as they say.
    """

    folders: tuple[Path, ...]
    embedding_size: int


def absolute(name: Any) -> Any:
    """Make the name of a directory absolute, for it may be used after a chdir; anything else stays as it is."""
    return str(Path(name).absolute()) if isinstance(name, str | os.PathLike) and Path(name).is_dir() else name


def sentence_transformer_files(model: object, prompt_name: str | None) -> ModelFiles | None:
    """Find the files of a sentence-transformers model.

    Args:
        model: Its directory, or its name on the hub; what is loaded already needs nothing.
        prompt_name: The prompt that it must have; None: any.

    Returns:
        They; None: they do not tell all that must be known, so it must be loaded now.
    """
    if not isinstance(model, str):
        return None
    folder = _local_folder(model, "modules.json", os.environ.get("SENTENCE_TRANSFORMERS_HOME"), "sentence-transformers")
    size = None if folder is None else sentence_transformer_size(folder)
    if folder is None or size is None or not (prompt_name is None or prompt_name in _saved_prompts(folder)):
        return None
    return ModelFiles((folder,), size)


def transformer_files(model: object, tokenizer: object) -> ModelFiles | None:
    """Find the files of a transformers model.

    Args:
        model: Its directory, or its name on the hub; what is loaded already needs nothing.
        tokenizer: That of its tokenizer; None: the same.

    Returns:
        They; None: they do not tell all that must be known, so it must be loaded now.
    """
    tokenizer = model if tokenizer is None else tokenizer
    if not isinstance(model, str) or not isinstance(tokenizer, str):
        return None
    folder, place = (_local_folder(name, "config.json") for name in (model, tokenizer))
    size = None if folder is None or place is None else transformer_size(folder, place)
    if folder is None or place is None or size is None or not _has_pad_token(place):
        return None
    return ModelFiles(tuple(dict.fromkeys((folder, place))), size)


def _local_folder(name: str, file: str, cache: str | None = None, owner: str | None = None) -> Path | None:
    """Find the folder of a model, as its library would.

    Of a model of the hub that is in the local cache, the revision is compared with that of the hub (unless offline).

    Args:
        name: A directory, or a name on the hub.
        file: A file that the model must have.
        cache: The hub's local cache; None: where it usually is.
        owner: Owner of a name without one; None: such names are not looked for.

    Returns:
        The folder; None: it is not there, or not complete.
    """
    if Path(name).is_dir():
        return Path(name).absolute()  # a later chdir must not move it
    name = f"{owner}/{name}" if owner and "/" not in name else name
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(name, file, cache_dir=cache), str):
            return None  # the library downloads it
        return Path(hf_hub_download(name, file, cache_dir=cache)).parent
    except Exception:  # whatever the hub's client makes of a name, or of the network: the library will tell
        return None


def sentence_transformer_size(folder: Path) -> int | None:
    """Read the embedding size of a sentence-transformers model from its files.

    Args:
        folder: Its directory, with modules.json.

    Returns:
        The size; None: the files are not understood.
    """
    stages = _read(folder / "modules.json")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return None
    size = None
    for stage in stages:
        package, _, kind = str(stage.get("type")).rpartition(".")
        place = folder / str(stage.get("path") or "")
        if not package.startswith("sentence_transformers."):
            return None
        if kind not in _WITHOUT_SIZE:
            measure = _SIZES.get(kind)
            size = None if measure is None else measure(place)
            if size is None:
                return None
    config = _read(folder / "config_sentence_transformers.json")
    kept = _number(config, "truncate_dim") if isinstance(config, dict) else None
    return size if size is None or kept is None else min(size, kept)


def _saved_prompts(folder: Path) -> frozenset[str]:
    """Name the prompts that a sentence-transformers model was saved with."""
    config = _read(folder / "config_sentence_transformers.json")
    prompts = config.get("prompts") if isinstance(config, dict) else None
    return frozenset(prompts) if isinstance(prompts, dict) else frozenset()


def transformer_size(folder: Path, tokenizer: Path | None = None) -> int | None:
    """Read the size of the hidden states of a transformers model from its files.

    Args:
        folder: Its directory.
        tokenizer: The directory of its tokenizer; None: the same.

    Returns:
        The size; None: the files are not understood, or would load something that lies elsewhere.
    """
    config, place = _read(folder / "config.json"), tokenizer or folder
    known = isinstance(config, dict) and "auto_map" not in config and "quantization_config" not in config
    if not known or not (place / "tokenizer.json").is_file() or not _has_weights(folder):
        return None
    return _number(config, "hidden_size")


def _has_pad_token(folder: Path) -> bool:
    """Whether a tokenizer was saved with a token for padding."""
    configs = (_read(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return any(bool(config.get("pad_token")) for config in configs if isinstance(config, dict))


def _transformer(folder: Path) -> int | None:
    settings = [_read(file) for file in folder.glob("sentence_*_config.json")]
    if any(_ELSEWHERE in key for each in settings if isinstance(each, dict) for key in each):
        return None
    return transformer_size(folder)


def _pooling(folder: Path) -> int | None:
    config = _read(folder / "config.json")
    if not isinstance(config, dict):
        return None
    mode = config.get("pooling_mode")
    legacy = sum(value is True for name, value in config.items() if name.startswith("pooling_mode_"))
    modes = len(mode) if isinstance(mode, list) else 1 if mode else max(1, legacy)
    size = _number(config, "embedding_dimension") or _number(config, "word_embedding_dimension")
    return None if size is None else size * modes


def _dense(folder: Path) -> int | None:
    config = _read(folder / "config.json")
    return _number(config, "out_features") if isinstance(config, dict) and _has_weights(folder) else None


def _static(folder: Path) -> int | None:
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:  # its header alone is read
            shape = file.get_slice("embedding.weight").get_shape()
    except (OSError, SafetensorError):
        return None
    return int(shape[1]) if len(shape) == 2 and (folder / "tokenizer.json").is_file() else None


_SIZES = {"Transformer": _transformer, "Pooling": _pooling, "Dense": _dense, "StaticEmbedding": _static}


def _has_weights(folder: Path) -> bool:
    if (folder / "adapter_config.json").exists():
        return False
    return any(file.stat().st_size > 0 for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file())


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
