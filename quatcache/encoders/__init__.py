"""Encoders: what turns items into vectors, and what decides which vector an item gets.

The names resolve on first use, so that ``import quatcache.encoders`` loads neither sentence-transformers nor
transformers: a warm run reads its rows from disk and needs the encoder's library only if a row is missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quatcache.encoders.encoder import Encoder
    from quatcache.encoders.identity import Identity, identify
    from quatcache.encoders.lower_layers import LowerLayersEncoder
    from quatcache.encoders.module import ModuleEncoder
    from quatcache.encoders.sentence_transformer import SentenceTransformerEncoder
    from quatcache.encoders.transformer import TransformersEncoder

__all__ = [
    "Encoder",
    "Identity",
    "LowerLayersEncoder",
    "ModuleEncoder",
    "SentenceTransformerEncoder",
    "TransformersEncoder",
    "identify",
]

_HOME = {
    "Encoder": "encoder",
    "Identity": "identity",
    "LowerLayersEncoder": "lower_layers",
    "ModuleEncoder": "module",
    "SentenceTransformerEncoder": "sentence_transformer",
    "TransformersEncoder": "transformer",
    "identify": "identity",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` (PEP 562) and keep the result."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, for completion in a shell."""
    return sorted({*globals(), *__all__})
