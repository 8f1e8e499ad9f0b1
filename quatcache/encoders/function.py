"""A batch function as an encoder: a call to an API, a model of another library, whatever gives one row per item."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quatcache.encoders.encoder import Encoder
from quatcache.encoders.sentence_transformer import SentenceTransformerEncoder
from quatcache.encoders.serialised import JSON, to_json
from quatcache.errors import ConfigError, EncoderOutputError, shorten
from quatcache.sequences import PaddedSequences

__all__ = ["FunctionEncoder", "as_encoder"]


class FunctionEncoder(Encoder):
    """Encodes with a function from a list of items to a list of their rows.

    Args:
        function: Called with a list of B items; it returns B rows in their order: a tensor or array ``(B, D)``, or a
            list of vectors. Lists of Python floats become float32.
        identity: What decides what it returns: a name with a version, or JSON values by name. A function has nothing
            else by which its rows could be found again. None: rows are good for this object only.

    Raises:
        ConfigError: ``function`` cannot be called, or ``identity`` is neither.

    Example:
        >>> encoder = FunctionEncoder(lambda texts: [[len(text), 1.0] for text in texts], "length, 1")
        >>> encoder(encoder.collate(["oak", "elms"]))
        tensor([[3., 1.],
                [4., 1.]])
    """

    embedding_size: Any = None  # not known before it was called: its rows have to agree with each other

    def __init__(self, function: Callable[[list[Any]], Any], identity: str | Mapping[str, JSON] | None = None) -> None:
        if not callable(function):
            raise ConfigError(f"function is {shorten(function)}; give a function from a list of items to their rows.")
        super().__init__()
        self._function = function
        self._told = _facts_of(identity)
        self._shape: torch.Size | None = None

    @property
    def name(self) -> str:
        """What messages call the function."""
        return getattr(self._function, "__name__", None) or type(self._function).__name__

    @property
    def is_identified(self) -> bool:
        """Whether its rows can be found again."""
        return bool(self._told)

    def collate(self, items: Sequence[Any]) -> list[Any]:
        """Give the items themselves, as a list."""
        return list(items)

    def forward(self, inputs: list[Any]) -> Tensor | PaddedSequences:
        """Call the function.

        Args:
            inputs: B items.

        Returns:
            Rows ``(B, D)``, or ``(B, *shape)``; or the PaddedSequences that it returned.

        Raises:
            EncoderOutputError: It returned no rows, or rows of another shape than before.
        """
        rows = _as_rows(self._function(inputs), self.name)
        if isinstance(rows, Tensor) and rows.dim() > 1 and len(rows):
            if self._shape is not None and rows.shape[1:] != self._shape:
                raise EncoderOutputError(
                    f"{self.name} returned rows of shape {tuple(rows.shape[1:])} after rows of shape "
                    f"{tuple(self._shape)}; return rows of one shape."
                )
            self._shape = rows.shape[1:]
        return rows

    def facts(self) -> dict[str, JSON]:
        """List what was said of the function; nothing can be found out."""
        return dict(self._told)


def as_encoder(encoder: Any, identity: str | Mapping[str, JSON] | None = None) -> Encoder:
    """Give an encoder for what a user may mean by one.

    Args:
        encoder: An Encoder; a loaded SentenceTransformer, its directory or its hub name; or a batch function, see
            :class:`FunctionEncoder`.
        identity: Of a function, what decides what it returns.

    Raises:
        ConfigError: It is something else, is trainable, or has an identity of its own beside the one that is given.

    Example:
        >>> type(as_encoder(lambda items: [[1.0] for _ in items])).__name__
        'FunctionEncoder'
    """
    if isinstance(encoder, str | PathLike) or _is_sentence_transformer(encoder):
        encoder = SentenceTransformerEncoder(encoder)
    if not isinstance(encoder, Encoder):
        if isinstance(encoder, nn.Module):
            raise ConfigError(
                f"encoder is a {type(encoder).__qualname__}, a module that does not say how items are collated; wrap "
                "it: TransformersEncoder(model, tokenizer) or ModuleEncoder(module, collate, embedding_size)."
            )
        if isinstance(encoder, type) or not callable(encoder):
            raise ConfigError(
                f"encoder is {shorten(encoder)}; pass an Encoder, a SentenceTransformer or its name, or a function "
                "from a list of items to their rows."
            )
        return FunctionEncoder(encoder, identity)
    if identity is not None:
        raise ConfigError(
            f"identity is {shorten(identity)} and the encoder is a {type(encoder).__qualname__}, whose identity is "
            "found out; leave identity to functions, or override Encoder.identity to add to it."
        )
    if encoder.trainable:
        raise ConfigError(
            f"encoder is a {type(encoder).__qualname__} with trainable = True, so its rows change; cache a frozen one."
        )
    return encoder


def _is_sentence_transformer(encoder: Any) -> bool:
    """Whether an object is a SentenceTransformer; who has one has imported its library."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(encoder, library.SentenceTransformer)


def _facts_of(identity: str | Mapping[str, JSON] | None) -> dict[str, JSON]:
    if identity is None:
        return {}
    given = {"": identity} if isinstance(identity, str) and identity else identity
    try:
        if isinstance(given, Mapping) and given and all(isinstance(name, str) for name in given):
            return {f"function.{name}".rstrip("."): to_json(value) for name, value in given.items()}
    except TypeError:  # a value that is not JSON
        pass
    raise ConfigError(
        f"identity is {shorten(identity)}; give a name with a version, such as 'text-embedding-3-small, 2024-01', or a "
        "dict of JSON values by name."
    )


def _as_rows(values: Any, name: str) -> Tensor | PaddedSequences:
    """Give what a function returned as a tensor."""
    if isinstance(values, Tensor | PaddedSequences):
        return values
    try:
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            return torch.from_numpy(values.copy())  # theirs may be read-only, or be written to again
        if isinstance(values, list | tuple) and values:
            if isinstance(values[0], Tensor):
                return torch.stack([value.detach().cpu() for value in values])
            rows = np.stack([np.asarray(value) for value in values])
            if rows.dtype.kind in "biuf":
                plain = not isinstance(values[0], np.ndarray) and rows.dtype == np.float64
                return torch.from_numpy(rows.astype(np.float32) if plain else rows)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # vectors of several lengths or kinds
        pass
    raise EncoderOutputError(
        f"{name} returned {shorten(values)}; return one vector per item, all of one length: a tensor, an "
        "array (B, D) or a list of vectors."
    )
