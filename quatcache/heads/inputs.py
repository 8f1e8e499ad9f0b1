"""From what the encoders of a model give to what its head takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quatcache.errors import EncoderOutputError
from quatcache.sequences import PaddedSequences

__all__ = ["head_input"]


def head_input(encoded: Mapping[str, Any]) -> Any:
    """Put together what a head takes.

    Args:
        encoded: What each encoder gave for the same B items, by name.

    Returns:
        The rows of all encoders concatenated in the order of the sorted names; what a single encoder gave as it is.

    Raises:
        EncoderOutputError: One of several encoders gave sequences.

    Example:
        >>> head_input({"b": torch.zeros(2, 1), "a": torch.ones(2, 3)}).shape
        torch.Size([2, 4])
    """
    if len(encoded) == 1:
        return next(iter(encoded.values()))
    rows = [encoded[name] for name in sorted(encoded)]
    ragged = sorted(name for name, value in encoded.items() if isinstance(value, PaddedSequences))
    if ragged:
        raise EncoderOutputError(
            f"encoder {ragged[0]!r} gives sequences, which cannot be concatenated with what other encoders give; use a "
            "single encoder, or override forward."
        )
    return torch.cat(rows, dim=-1)
