"""The loading of a model that was named, by its library: from a directory, or from the hub.

Code that lies beside a model is never run. A model comes to the CPU: the trainer moves it where it belongs.
"""

from __future__ import annotations

import copy
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError
from torch import nn

from quatcache.encoders.layouts import absolute
from quatcache.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_sentence_transformer", "load_sentence_transformer", "load_transformer", "prepare_tokenizer"]


def check_sentence_transformer(model: Any) -> str | SentenceTransformer:
    """Give the name of a model that is to be loaded, absolute if it is a directory; a loaded one passes through.

    Raises:
        ConfigError: It is neither, or there is no such directory.
    """
    if not isinstance(model, str | PathLike):
        from sentence_transformers import SentenceTransformer

        if isinstance(model, SentenceTransformer):
            return model
        raise ConfigError(
            f"model is of type {type(model).__qualname__}; pass a directory, a hub name or a loaded SentenceTransformer"
        )
    name = os.fspath(model)
    if (isinstance(model, PathLike) or _is_path(name)) and not Path(name).is_dir():
        raise _unloadable(name, "there is no such directory")
    return str(absolute(name))


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a directory: on the hub names are "model" or "owner/model"."""
    parts = name.replace(os.sep, "/").split("/")
    return len(parts) > 2 or parts[0] in {"", ".", "..", "~"} or parts[-1] == ""


def _unloadable(name: str, reason: str) -> ConfigError:
    return ConfigError(f"encoder {name!r} cannot be loaded ({reason}); pass a directory or a name on the hub.")


def load_sentence_transformer(model: str | SentenceTransformer) -> SentenceTransformer:
    """Load a sentence-transformers model that is named; a loaded one passes through.

    Raises:
        ConfigError: The name leads nowhere, or to a model that is damaged.
    """
    if not isinstance(model, str):
        return model
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(model, device="cpu", trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # of a name that leads nowhere, of damage
        raise _unloadable(model, "".join(str(error).strip().splitlines()[:1])) from error


def load_transformer(
    model: str | PathLike[str] | PreTrainedModel,
    tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformers model and its tokenizer where they are named; an object passes through.

    Args:
        model: A directory, a name on the hub, or a model.
        tokenizer: The same of a tokenizer; None: the one beside the model.

    Raises:
        ConfigError: The model is neither, is no directory, or is an object that came without a tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer

    if not isinstance(model, str | PathLike | nn.Module):
        raise ConfigError(f"model is a {type(model).__qualname__}; pass a directory, a hub name or a loaded model")
    if isinstance(model, PathLike) and not Path(model).is_dir():
        raise ConfigError(f"{os.fspath(model)} is not a directory; pass the folder of a model, or a hub name as str")
    if tokenizer is None:
        if isinstance(model, nn.Module):
            raise ConfigError(f"{type(model).__qualname__} came without a tokenizer; pass tokenizer=")
        tokenizer = model
    if isinstance(tokenizer, str | PathLike):
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(tokenizer), trust_remote_code=False)
    if isinstance(model, str | PathLike):
        return AutoModel.from_pretrained(os.fspath(model), trust_remote_code=False), tokenizer
    return model, tokenizer


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, truncation_side: Literal["left", "right"] | None
) -> PreTrainedTokenizerBase:
    """Give a tokenizer that pads, and that cuts long texts at the end that was asked for.

    Args:
        tokenizer: Any tokenizer; it is not changed.
        truncation_side: That end; None: the one that it cuts.

    Raises:
        ConfigError: It has no token for padding.
    """
    if truncation_side is not None and tokenizer.truncation_side != truncation_side:
        tokenizer = copy.deepcopy(tokenizer)  # it may be the caller's, for other uses
        tokenizer.truncation_side = truncation_side
    if tokenizer.pad_token is None:
        raise ConfigError(
            "the tokenizer has no pad_token, so texts of different lengths cannot be batched; set "
            "tokenizer.pad_token = tokenizer.eos_token and pass the tokenizer"
        )
    return tokenizer
