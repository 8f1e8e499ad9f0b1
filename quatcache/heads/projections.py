"""Heads made of linear layers: linear, stacked projection, widening.

Activations come from a fixed list. quaterion-models resolves them with ``getattr(torch.nn.functional, name)``; a name
read from a file would then call any function there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quatcache.errors import ConfigError
from quatcache.heads.encoder_head import EncoderHead, check_size, is_number
from quatcache.heads.registry import register_head

__all__ = ["ACTIVATIONS", "LinearHead", "StackedProjectionHead", "WideningHead"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": nn.functional.elu,
    "gelu": nn.functional.gelu,
    "leaky_relu": nn.functional.leaky_relu,
    "mish": nn.functional.mish,
    "relu": nn.functional.relu,
    "selu": nn.functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
}
"""Activation function per name accepted as ``activation_fn``, named as in ``torch.nn.functional``."""


@register_head("linear")
class LinearHead(EncoderHead):
    """One affine map: class scores for a classification loss, or a projection to another width.

    Args:
        input_embedding_size: Width of the input embeddings, at least 1.
        output_size: Width of the output, at least 1; for a classifier the number of classes.
        bias: Whether a learned vector is added.
        dropout: Probability, in [0, 1), of zeroing an input value during training.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> LinearHead(384, 22)(torch.zeros(4, 384)).shape
        torch.Size([4, 22])
    """

    def __init__(self, input_embedding_size: int, output_size: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__(input_embedding_size, dropout)
        self.linear = nn.Linear(self.input_embedding_size, check_size("output_size", output_size), bias=bias)

    @property
    def output_size(self) -> int:
        """Width of the output."""
        return self.linear.out_features

    def transform(self, inputs: Tensor) -> Tensor:
        """Compute ``inputs @ weight.T + bias``: ``(B, input_embedding_size)`` to ``(B, output_size)``."""
        output: Tensor = self.linear(inputs)
        return output

    def config(self) -> dict[str, Any]:
        """Give the constructor arguments as JSON values."""
        return {**super().config(), "output_size": self.output_size, "bias": self.linear.bias is not None}


@register_head("stacked_projection")
class StackedProjectionHead(EncoderHead):
    """Linear layers of the given widths with an activation between them, none after the last.

    From quaterion-models (``StackedProjectionHead``); ``bias`` is an addition.

    Args:
        input_embedding_size: Width of the input embeddings, at least 1.
        output_sizes: Width of each layer, first to last, at least one.
        activation_fn: Name of the activation between the layers, one of ``ACTIVATIONS``.
        dropout: Probability, in [0, 1), of zeroing an input value during training.
        bias: Whether the layers add a learned vector.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> StackedProjectionHead(384, [128, 32], activation_fn="gelu")(torch.zeros(4, 384)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        input_embedding_size: int,
        output_sizes: list[int] | tuple[int, ...],
        activation_fn: str = "relu",
        dropout: float = 0.0,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(input_embedding_size, dropout)
        # What a file holds need not be a sequence, whatever the annotation says.
        if not isinstance(output_sizes, (list, tuple)) or not output_sizes:
            raise ConfigError(f"output_sizes is {output_sizes!r}; give the width of at least one layer, as in [128]")
        sizes = [self.input_embedding_size, *(check_size("output_sizes", size) for size in output_sizes)]
        self._activation = _activation(activation_fn)
        self._activation_fn = activation_fn
        self.layers = nn.ModuleList(nn.Linear(narrow, wide, bias=bias) for narrow, wide in itertools.pairwise(sizes))
        self._output_sizes = sizes[1:]
        self._bias = bias

    @property
    def output_size(self) -> int:
        """Width of the output, that of the last layer."""
        return self._output_sizes[-1]

    def transform(self, inputs: Tensor) -> Tensor:
        """Run the layers: ``(B, input_embedding_size)`` to ``(B, output_size)``."""
        hidden = inputs
        last = len(self.layers) - 1
        for position, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if position < last:
                hidden = self._activation(hidden)
        return hidden

    def config(self) -> dict[str, Any]:
        """Give the constructor arguments as JSON values."""
        return {
            **super().config(),
            "output_sizes": list(self._output_sizes),
            "activation_fn": self._activation_fn,
            "bias": self._bias,
        }


@register_head("widening")
class WideningHead(StackedProjectionHead):
    """Widens the embedding, applies an activation, and narrows it to its width again.

    From quaterion-models (``WideningHead``); ``bias`` is an addition.

    Args:
        input_embedding_size: Width of the embeddings, at least 1.
        expansion_factor: The middle is ``int(input_embedding_size * expansion_factor)`` wide, at least 1.
        activation_fn: Name of the activation in the middle, one of ``ACTIVATIONS``.
        dropout: Probability, in [0, 1), of zeroing an input value during training.
        bias: Whether both layers add a learned vector.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> head = WideningHead(384, expansion_factor=2.0)
        >>> [tuple(parameter.shape) for parameter in head.parameters()]
        [(768, 384), (768,), (384, 768), (384,)]
    """

    def __init__(
        self,
        input_embedding_size: int,
        expansion_factor: float = 4.0,
        activation_fn: str = "relu",
        dropout: float = 0.0,
        *,
        bias: bool = True,
    ) -> None:
        width = check_size("input_embedding_size", input_embedding_size)
        # `not >=` also refuses NaN, and the upper bound refuses infinity.
        if not is_number(expansion_factor) or not 1 <= width * expansion_factor < 2**31:
            raise ConfigError(
                f"expansion_factor {expansion_factor!r} gives no usable middle width for {width} inputs; "
                "4.0 is the usual choice"
            )
        super().__init__(width, [int(width * expansion_factor), width], activation_fn, dropout, bias=bias)
        self._expansion_factor = float(expansion_factor)

    def config(self) -> dict[str, Any]:
        """Give the constructor arguments as JSON values."""
        config = {**super().config(), "expansion_factor": self._expansion_factor}
        del config["output_sizes"]
        return config


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"activation_fn is {name!r}; choose one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
