"""Canonical bytes: equal content has equal bytes in every process, unlike content has other bytes.

Each value is a tag for its type, and a length before each part that varies; so no two values can run into each other.
The bytes are part of the format of a cache: changing them for a type makes every stored key of that type unknown.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.errors import KeyTypeError, shorten

__all__ = ["PLAIN_KEY_TYPES", "canonical_bytes", "plain_bytes", "text_bytes"]

PLAIN_KEY_TYPES = "str, bytes, int, float, bool, None or tuples of these"


def text_bytes(text: str) -> bytes:
    """Encode a text; lone surrogates, as broken files give them, have bytes too.

    Example:
        >>> text_bytes("a gloss")
        b'a gloss'
    """
    return text.encode("utf-8", "surrogatepass")


def canonical_bytes(item: Any) -> bytes:
    """Give the canonical bytes of an item.

    Args:
        item: A str, bytes, number, tensor, array, PIL image, or a tuple, list, mapping or dataclass of these.

    Raises:
        KeyTypeError: It holds something else, or is nested within itself.

    Example:
        >>> canonical_bytes([1, 2]) == canonical_bytes([1, 2]), canonical_bytes([1, 2]) == canonical_bytes([1, 2.0])
        (True, False)
    """
    parts: list[bytes] = []
    try:
        _write(parts, item)
    except RecursionError:
        raise KeyTypeError(
            f"an item is a {type(item).__name__} nested too deeply, or within itself, so it has no canonical bytes; "
            "give a key extractor, CacheConfig(key_extractors=...) or EmbeddingCache(key_extractor=...), that returns "
            f"{PLAIN_KEY_TYPES}."
        ) from None
    return b"".join(parts)


def plain_bytes(value: Any) -> bytes:
    """Give the canonical bytes of what a key extractor returned.

    Args:
        value: A str, bytes, int, float, bool, None or tuple of these.

    Raises:
        KeyTypeError: It is something else.

    Example:
        >>> plain_bytes((1, "a")) == plain_bytes((1, b"a"))
        False
    """
    parts: list[bytes] = []
    _write_extracted(parts, value, value)
    return b"".join(parts)


def _sized(tag: bytes, payload: bytes) -> bytes:
    return tag + struct.pack("<Q", len(payload)) + payload


def _write_plain(parts: list[bytes], item: Any) -> bool:
    """Append the canonical bytes of a plain value; say whether it was one."""
    if item is None:
        parts.append(b"N")
    elif isinstance(item, bool):
        parts.append(b"T" if item else b"F")
    elif isinstance(item, str):
        parts.append(_sized(b"S", text_bytes(item)))
    elif isinstance(item, bytes | bytearray | memoryview):
        parts.append(_sized(b"B", bytes(item)))
    elif isinstance(item, int):
        parts.append(_sized(b"I", f"{int(item):x}".encode()))  # str refuses more than 4,300 digits
    elif isinstance(item, float):
        parts.append(b"D" + struct.pack("<d", item))
    else:
        return False
    return True


def _write_extracted(parts: list[bytes], value: Any, whole: Any) -> None:
    if isinstance(value, tuple):
        parts.append(b"(" + struct.pack("<Q", len(value)))
        for element in value:
            _write_extracted(parts, element, whole)
    elif isinstance(value, np.generic | memoryview | bytearray) or not _write_plain(parts, value):
        raise KeyTypeError(
            f"the key extractor returned {shorten(whole)}, which holds a {type(value).__name__}; "
            f"return {PLAIN_KEY_TYPES}."
        )


def _write(parts: list[bytes], item: Any) -> None:
    """Append the canonical bytes of one item: a tag for the type, sizes where lengths vary, then the payload."""
    if isinstance(item, np.generic) and not isinstance(item, str | bytes):
        item = np.asarray(item)
    if _write_plain(parts, item):
        return
    if isinstance(item, torch.Tensor):
        parts.append(b"X")
        _write_tensor(parts, item)
    elif isinstance(item, np.ndarray):
        parts.append(b"A")
        _write_array(parts, item)
    elif isinstance(item, complex):
        parts.append(b"J" + struct.pack("<dd", item.real, item.imag))
    elif isinstance(item, tuple | list):
        parts.append((b"(" if isinstance(item, tuple) else b"[") + struct.pack("<Q", len(item)))
        for element in item:
            _write(parts, element)
    elif isinstance(item, Mapping):
        _write_mapping(parts, b"{", item)
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        fields.update(getattr(item, "__dict__", {}))  # attributes that are no fields reach an encoder as well
        _write_mapping(parts, _sized(b"C", text_bytes(type(item).__qualname__)), fields)
    elif _is_image(item):
        head = f"{item.mode} {item.size[0]} {item.size[1]} {_image_extras(item)}"
        parts.append(_sized(b"P", head.encode()) + item.tobytes())
    else:
        raise KeyTypeError(
            f"an item holds {shorten(item)}, a {type(item).__name__} that has no canonical bytes; "
            "give a key extractor, CacheConfig(key_extractors=...) or EmbeddingCache(key_extractor=...), that returns "
            f"{PLAIN_KEY_TYPES}."
        )


def _write_mapping(parts: list[bytes], tag: bytes, mapping: Mapping[Any, Any]) -> None:
    parts.append(tag + struct.pack("<Q", len(mapping)))
    for name, value in mapping.items():  # in their order: an encoder can see it
        _write(parts, name)
        _write(parts, value)


def _write_array(parts: list[bytes], array: npt.NDArray[Any]) -> None:
    if array.dtype.hasobject:
        raise KeyTypeError(
            f"an item holds an array of dtype {array.dtype}, which has no canonical bytes; use a numeric dtype."
        )
    dtype = array.dtype.descr if array.dtype.names else array.dtype.str  # the str of a record hides its fields
    head = f"{dtype} {array.shape}"
    parts.append(_sized(b"", head.encode()) + array.tobytes())


def _write_tensor(parts: list[bytes], tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise KeyTypeError(f"an item holds a {kind} tensor, which has no canonical bytes; make it a dense tensor.")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)}"
    flat = plain.as_strided((plain.numel(),), (1,))  # a single element may be contiguous with any stride
    parts.append(_sized(b"", head.encode()) + flat.view(torch.uint8).numpy().tobytes())


def _is_image(item: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # who has an image has imported Pillow; nobody else needs to
    return pillow is not None and isinstance(item, pillow.Image)


def _image_extras(image: Any) -> tuple[Any, ...]:
    """Give what decides the look of an image beside its pixels: palette, transparent colour, orientation."""
    palette = image.palette.mode if image.palette else None, image.getpalette(None)
    return *palette, image.info.get("transparency"), image.getexif().get(0x0112)
