"""Heads that keep the width of the embedding and start at or near the encoder's own: empty, gated, skip-connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quatcache.heads.encoder_head import EncoderHead, dropout_layer
from quatcache.heads.registry import register_head

__all__ = ["EmptyHead", "GatedHead", "SkipConnectionHead"]


@register_head("empty")
class EmptyHead(EncoderHead):
    """Returns its input: the head of a model whose encoders are trained, or merely evaluated.

    From quaterion-models (``EmptyHead``).

    Args:
        input_embedding_size: Width of the embeddings, at least 1.
        dropout: Probability, in [0, 1), of zeroing an input value during training.

    Example:
        >>> EmptyHead(2)(torch.tensor([[1.0, -2.0]]))
        tensor([[ 1., -2.]])
    """

    @property
    def output_size(self) -> int:
        """Width of the output, that of the input."""
        return self.input_embedding_size

    def transform(self, inputs: Tensor) -> Tensor:
        """Return ``inputs`` itself, ``(B, input_embedding_size)``."""
        return inputs


@register_head("gated")
class GatedHead(EncoderHead):
    """Scales every component by a learned gate: ``inputs * tanh(gates)``.

    From quaterion-models (``GatedHead``). With one parameter per component it suits very small training sets. The
    gates start at 2.0, where tanh is 0.96: at first nearly everything passes.

    Args:
        input_embedding_size: Width of the embeddings, at least 1.
        dropout: Probability, in [0, 1), of zeroing an input value during training.

    Example:
        >>> GatedHead(2)(torch.tensor([[1.0, -2.0]]))
        tensor([[ 0.9640, -1.9281]], grad_fn=<MulBackward0>)
    """

    def __init__(self, input_embedding_size: int, dropout: float = 0.0) -> None:
        super().__init__(input_embedding_size, dropout)
        self.gates = nn.Parameter(torch.empty(self.input_embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Open all gates."""
        nn.init.constant_(self.gates, 2.0)

    @property
    def output_size(self) -> int:
        """Width of the output, that of the input."""
        return self.input_embedding_size

    def transform(self, inputs: Tensor) -> Tensor:
        """Scale the components: ``(B, input_embedding_size)`` to the same shape."""
        return inputs * torch.tanh(self.gates)


@register_head("skip_connection")
class SkipConnectionHead(EncoderHead):
    """Adds a gated correction to the embedding: ``inputs + fc(skip_dropout(inputs)) * sigmoid(gates)``.

    From quaterion-models (``SkipConnectionHead``). The gates start at -4.0, where the sigmoid is 0.018: training
    begins at the encoder's own embedding and departs from it only where that pays.

    Args:
        input_embedding_size: Width of the embeddings, at least 1.
        dropout: Probability, in [0, 1), of zeroing an input value during training, in both branches.
        skip_dropout: The same for the learned branch alone, so that the original embedding stays intact.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> embeddings = torch.randn(4, 16)
        >>> drift = SkipConnectionHead(16)(embeddings) - embeddings
        >>> bool(drift.abs().max() < 0.1)
        True
    """

    def __init__(self, input_embedding_size: int, dropout: float = 0.0, skip_dropout: float = 0.0) -> None:
        super().__init__(input_embedding_size, dropout)
        self.skip_dropout = dropout_layer("skip_dropout", skip_dropout)
        self.fc = nn.Linear(self.input_embedding_size, self.input_embedding_size)
        self.gates = nn.Parameter(torch.empty(self.input_embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Close all gates and draw the weights of the learned branch anew."""
        nn.init.constant_(self.gates, -4.0)
        self.fc.reset_parameters()

    @property
    def output_size(self) -> int:
        """Width of the output, that of the input."""
        return self.input_embedding_size

    def transform(self, inputs: Tensor) -> Tensor:
        """Add the gated branch: ``(B, input_embedding_size)`` to the same shape."""
        output: Tensor = inputs + self.fc(self.skip_dropout(inputs)) * torch.sigmoid(self.gates)
        return output

    def config(self) -> dict[str, Any]:
        """Give the constructor arguments as JSON values."""
        return {**super().config(), "skip_dropout": self.skip_dropout.p}
