"""Values as rows that a directory can hold, and back: numbers in arrays and tensors as they are, other values as JSON.

Nothing here can run code: JSON and numbers are all that is read. What would not come back as the value that it was,
such as a tuple, is refused when it is to be stored, and not given back as something else one day.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from quatcache.errors import BatchFunctionError, shorten
from quatcache.memoize.results import Kind
from quatcache.sequences import PaddedSequences
from quatcache.store import DTYPES

__all__ = ["CODECS", "Codec", "codec_of"]


class Codec(NamedTuple):
    """One way to store values.

    Attributes:
        name: Of the way, in the identity of the stored values.
        kind: What a function returns whose values are stored so: a list, an array or a tensor.
        encode: From n values to n rows or sequences.
        decode: From n rows or sequences to n values.
        most: Values to encode or decode at once: sequences are padded to the longest of them.
    """

    name: str
    kind: Kind
    encode: Callable[[Sequence[Any]], Any]
    decode: Callable[[Any], list[Any]]
    most: int = 1 << 20

    def parts(self, count: int) -> list[slice]:
        """Split so many values into those that are handled at once."""
        return [slice(start, start + self.most) for start in range(0, count, self.most)]


def _rows_of_arrays(values: Sequence[Any]) -> torch.Tensor:
    _check_alike(values, np.ndarray)
    return _storable(torch.from_numpy(np.stack(values)))


def _rows_of_tensors(values: Sequence[Any]) -> torch.Tensor:
    _check_alike(values, torch.Tensor)
    if any(value.device.type != "cpu" for value in values):  # they would come back from the CPU
        raise ValueError(f"it is on {values[0].device}; return it with .cpu()")
    return _storable(torch.stack(list(values)))


def _check_alike(values: Sequence[Any], kind: type) -> None:
    """Refuse what stacking would turn into something else."""
    others = [type(value) for value in values if not isinstance(value, kind)]
    if others:
        raise TypeError(f"beside it is a {others[0].__name__}; return only such values")
    dtypes = sorted({str(value.dtype) for value in values})
    if len(dtypes) > 1:
        raise TypeError(f"such values have dtypes {', '.join(dtypes)}; return one dtype")


def _storable(rows: torch.Tensor) -> torch.Tensor:
    if str(rows.dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"its dtype is {rows.dtype}; return one of {', '.join(DTYPES)}")
    return rows


def _arrays(rows: torch.Tensor) -> list[Any]:
    return list(rows.numpy())


def _tensors(rows: torch.Tensor) -> list[Any]:
    return list(rows)


def _texts(values: Sequence[Any]) -> PaddedSequences:
    for value in values:
        _check_json(value, value)
    encoded = [json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in values]
    parts = [np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in encoded]
    lengths = torch.tensor([len(part) for part in parts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.uint8)
    padded[mask] = torch.from_numpy(np.concatenate(parts))
    return PaddedSequences(padded, mask)


def _values(sequences: PaddedSequences) -> list[Any]:
    whole, lengths = sequences.values.numpy(), sequences.lengths.tolist()
    return [
        json.loads(row[:length].tobytes().decode("utf-8", "surrogatepass"))
        for row, length in zip(whole, lengths, strict=True)
    ]


def _check_json(part: Any, whole: Any) -> None:
    """Refuse what JSON would give back as something else."""
    kind = type(part)
    if kind is list:
        for one in part:
            _check_json(one, whole)
    elif kind is dict and all(type(key) is str for key in part):
        for one in part.values():
            _check_json(one, whole)
    elif kind not in (str, int, float, bool, type(None)):
        raise BatchFunctionError(
            f"{shorten(whole)} holds a {kind.__name__}, which JSON would not give back as it is; return arrays, "
            "tensors, or what is made of texts, numbers, lists and dicts with texts as keys."
        )


CODECS = {
    codec.name: codec
    for codec in (
        Codec("list of json", list, _texts, _values, most=32),
        Codec("list of arrays", list, _rows_of_arrays, _arrays),
        Codec("list of tensors", list, _rows_of_tensors, _tensors),
        Codec("array", np.ndarray, _rows_of_arrays, _arrays),
        Codec("tensor", torch.Tensor, _rows_of_tensors, _tensors),
    )
}
"""The ways to store values, by name."""


def codec_of(kind: Kind, values: Sequence[Any]) -> Codec:
    """Choose how to store values, at least one.

    Args:
        kind: What the function returned them in.
        values: The values.

    Example:
        >>> codec_of(list, [{"label": "oak"}]).name, codec_of(list, [np.zeros(3)]).name
        ('list of json', 'list of arrays')
    """
    if kind is not list:
        return CODECS["array" if kind is np.ndarray else "tensor"]
    for name, element in (("list of arrays", np.ndarray), ("list of tensors", torch.Tensor)):
        if isinstance(values[0], element):
            return CODECS[name]
    return CODECS["list of json"]
