"""Reducing the token states of a transformer to one row per text."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from quatcache.errors import ConfigError

__all__ = ["Pooling", "check_pooling", "pool"]

Pooling: TypeAlias = Literal["mean", "cls", "last_token"]
"""The mean over the tokens of a text, its first token, or its last one."""


def check_pooling(pooling: object) -> None:
    """Refuse what is no pooling.

    Raises:
        ConfigError: It is none.
    """
    if pooling not in get_args(Pooling):
        raise ConfigError(f"pooling is {pooling!r}; pass 'mean', 'cls' or 'last_token'")


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Reduce hidden states to rows, as sentence-transformers' ``Pooling`` does.

    Args:
        hidden: (B, T, H).
        mask: (B, T), 0 or false for what is left out; padding may be on either side.
        pooling: One of :data:`Pooling`.

    Returns:
        Rows (B, H) of the same dtype; the mean of half-precision states is accumulated in float32.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
        tensor([[2.]])
    """
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        accumulated = torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype
        total = (hidden * weights).sum(dim=1, dtype=accumulated)
        return (total / weights.sum(dim=1, dtype=accumulated).clamp(min=1e-9)).to(hidden.dtype)
    positions = mask.to(torch.int32)
    index = positions.argmax(dim=1) if pooling == "cls" else mask.shape[1] - 1 - positions.flip(1).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]
