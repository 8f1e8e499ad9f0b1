"""The stand-in for a cached encoder while a model trains.

The loader gathers the rows, so what reaches :meth:`CachedEncoder.forward` are the vectors themselves. The real encoder
is kept aside, out of reach of ``parameters()``, ``to()`` and ``train()``, but not out of ``state_dict()``: a model
saves and loads the same tensors whether its encoders are cached or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from quatcache.encoders.encoder import Encoder

__all__ = ["CachedEncoder"]


class CachedEncoder(nn.Module):
    """Passes on the rows that a loader gathered, in place of the encoder that made them.

    Args:
        encoder: The real encoder; it is neither registered as a submodule nor changed.

    Attributes:
        trainable: Always false.

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> real = ModuleEncoder(nn.Identity(), torch.stack, embedding_size=2)
        >>> CachedEncoder(real)(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    trainable = False

    def __init__(self, encoder: Encoder) -> None:
        """Keep the encoder aside."""
        super().__init__()
        self._aside = (encoder,)  # in a tuple: nn.Module registers modules, but does not look into tuples

    @property
    def encoder(self) -> Encoder:
        """The real encoder."""
        return self._aside[0]

    @property
    def embedding_size(self) -> int:
        """Size of the last dimension of a row."""
        return self.encoder.embedding_size

    def collate(self, items: Sequence[Any]) -> Any:
        """Collate as the real encoder does."""
        return self.encoder.collate(items)

    def collate_fn(self) -> Callable[[Sequence[Any]], Any]:
        """Give the real encoder's collate function."""
        return self.encoder.collate_fn()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Pass on rows ``(B, *row_shape)``."""
        return rows

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the real encoder's tensors."""
        return self.encoder.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        result = self.encoder.load_state_dict(own, strict=False)
        missing.extend(prefix + key for key in result.missing_keys)
        unexpected.extend(prefix + key for key in result.unexpected_keys)
