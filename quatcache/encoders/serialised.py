"""JSON of what transformers and tokenizers serialise, less what changes with their versions or with the calls made.

These libraries write an object down completely: where it came from, which version wrote it, what the last call set.
Read as it is, the same tokenizer would differ from itself. What is left out is listed here.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

__all__ = ["JSON", "compact", "flatten", "is_ignored", "read_config", "to_json", "tokenizer_facts"]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

# Names that say where, or how fast; never what.
_IGNORED = frozenset(
    {
        *("batch_size", "cache_dir", "cache_folder", "device", "devices", "gradient_checkpointing", "learning_rate"),
        *("log_level", "lr", "num_workers", "trainable", "training", "verbose", "weight_decay"),
    }
)
# Names that transformers and its relatives give to what says where from, or acts elsewhere than in the output.
_IGNORED_IN_LIBRARIES = frozenset(
    {
        *("architectures", "auto_map", "feature_extractor_type", "id2label", "image_processor_type"),
        *("initializer_factor", "initializer_range", "label2id", "output_attentions", "output_hidden_states"),
        *("problem_type", "processor_class", "return_dict", "tokenizer_file", "torch_dtype", "transformers_version"),
        *("use_cache", "video_processor_type", "vocab_file", "warnings_issued"),
    }
)
_PLACES = ("path", "_dir", "folder")
_FILES = frozenset({"tokenizer_file", "vocab_file"})
_INLINE = 200
_KNOWN: dict[str, dict[str, JSON]] = {}  # facts of serialised tokenizers by digest
_KEPT = 16


def is_ignored(name: str, value: Any = None, *, library: bool = True, private: bool = False) -> bool:
    """Tell whether an attribute or entry says nothing about the output, or is private.

    Args:
        name: Its name.
        value: Its value; needed for an object that is no library's.
        library: Whether the object that holds it is of a library known by name. Elsewhere "xpath" may be anything: a
            name like that is a place only if something is there.
        private: Whether names with an underscore count; those with two at both ends never do.

    Example:
        >>> is_ignored("xpath"), is_ignored("xpath", "//title", library=False), is_ignored("lr", 0.1, library=False)
        (True, False, True)
    """
    if name.startswith("__" if private else "_") or name in _IGNORED:
        return True
    if library:
        return name in _IGNORED_IN_LIBRARIES or name.endswith(_PLACES)
    if name.endswith(_PLACES) or name in _FILES:
        return isinstance(value, str) and (name.endswith("name_or_path") or _exists(value))
    return False


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or a null character
        return False


def to_json(value: Any) -> JSON:
    """Turn a simple value into JSON.

    Args:
        value: None, bool, int, float, str, bytes, an enum, a torch dtype, a NumPy scalar, or lists, tuples, sets and
            mappings of these.

    Returns:
        The JSON value; infinities and NaN become strings, sets are sorted, bytes are digested.

    Raises:
        TypeError: If the value is of another type.

    Example:
        >>> to_json((1, float("inf"), {"a": torch.float16}))
        [1, 'inf', {'a': 'float16'}]
    """
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return "xxh3_128:" + xxhash.xxh3_128_hexdigest(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((to_json(inner) for inner in value), key=repr)
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    raise TypeError(f"{type(value).__qualname__} is not a JSON value")


def compact(value: JSON) -> JSON:
    """Give a value as it is if a person would read it, and its digest if it is too long for that."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= _INLINE else "xxh3_128:" + xxhash.xxh3_128_hexdigest(text.encode())


def flatten(value: Any, name: str, facts: dict[str, JSON]) -> None:
    """Add nested mappings as dotted facts, without the entries that are ignored.

    Args:
        value: What an object of transformers serialised to.
        name: The name of the fact, and the prefix of the facts inside it.
        facts: Receives the facts; of a value that is not JSON, the type's name.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not is_ignored(str(key)):
                flatten(inner, f"{name}.{key}", facts)
        return
    try:
        facts[name] = compact(to_json(value))
    except TypeError:
        facts[name] = type(value).__qualname__


def read_config(config: Any) -> dict[str, Any]:
    """Read a model's configuration: what differs from the defaults of its class, less what acts in training only.

    The dtype in it is left out too: it tells how the model was loaded, the weights themselves tell what it has become.
    A newer version of transformers adds entries with defaults; counting them, each upgrade would look like a change.
    (``to_diff_dict`` of transformers compares with the defaults of the base class, so it keeps them.)

    Args:
        config: A ``PretrainedConfig``, or another object with ``to_dict``.

    Returns:
        The entries by name; "model_type" is always among them.
    """
    entries = _without_dtype(config.to_dict())
    try:
        defaults = _without_dtype(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError):  # a composite configuration that needs its parts
        defaults = {}
    return {
        name: value
        for name, value in entries.items()
        if name == "model_type"
        or ("dropout" not in name and not (name in defaults and _json_text(defaults[name]) == _json_text(value)))
    }


def _without_dtype(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the dtypes of a configuration and of the configurations inside it; in a vocabulary they are numbers."""
    return {
        name: _without_dtype(value) if isinstance(value, Mapping) else value
        for name, value in entries.items()
        if name != "dtype" or isinstance(value, int)
    }


def _json_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def tokenizer_facts(tokenizer: Any, prefix: str = "tokenizer.") -> dict[str, JSON]:
    """List what decides which tokens a text becomes.

    Truncation and padding as a fast tokenizer of transformers stores them are left out: each call sets them anew, so
    they tell which text came last. The settings that cause them belong to the adapter (maximal length) or are here
    (sides). A ``tokenizers.Tokenizer`` by itself obeys them until somebody sets others.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, or a fast or slow tokenizer of transformers.
        prefix: Put before every name, with its dot.

    Returns:
        Facts of normalizer, pre-tokenizer, post-processor, vocabulary, added and special tokens, and sides.
    """
    facts: dict[str, JSON] = {}
    backend = tokenizer if hasattr(tokenizer, "to_str") else getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        for name, value in _serialised_facts(backend.to_str()).items():
            if backend is tokenizer or not name.startswith(("truncation", "padding")):
                facts[prefix + name] = value
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        facts[prefix + "class"] = type(tokenizer).__name__
        facts[prefix + "vocabulary"] = xxhash.xxh3_128_hexdigest(vocabulary.encode())
        flatten(getattr(tokenizer, "init_kwargs", {}), prefix + "settings", facts)
    for name in ("padding_side", "truncation_side", "special_tokens_map"):
        if hasattr(tokenizer, name):
            flatten(getattr(tokenizer, name), prefix + name, facts)
    template = getattr(tokenizer, "chat_template", None)
    if template:
        flatten(template, prefix + "chat_template", facts)
    return facts


def _serialised_facts(serialised: str) -> dict[str, JSON]:
    """List the facts of a serialised tokenizer, which is parsed once: a fill asks again at every commit."""
    digest = xxhash.xxh3_128_hexdigest(serialised.encode())
    if digest not in _KNOWN:
        facts: dict[str, JSON] = {}
        entries = json.loads(serialised)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens", "model"):
            flatten(_digest_vocabulary(entries.get(part)), part, facts)
        for part in ("truncation", "padding"):
            if entries.get(part) is not None:
                flatten(entries[part], part, facts)
        if len(_KNOWN) >= _KEPT:
            _KNOWN.clear()
        _KNOWN[digest] = facts
    return _KNOWN[digest]


def _digest_vocabulary(part: Any) -> Any:
    """Replace the tables of a tokenizer's model, often megabytes, by their digests."""
    if not isinstance(part, Mapping):
        return part
    return {
        key: "xxh3_128:" + xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
        if key in {"vocab", "merges"}
        else value
        for key, value in part.items()
    }
