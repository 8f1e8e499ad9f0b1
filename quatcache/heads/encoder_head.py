"""The interface of a head, and the checks of its arguments that all heads share."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn
from typing_extensions import Self

from quatcache.errors import ConfigError, ModelDefinitionError

__all__ = ["EncoderHead", "check_size", "dropout_layer", "is_number"]


class EncoderHead(nn.Module):
    """Base of the heads: drops inputs out, then applies :meth:`transform`.

    A subclass defines :attr:`output_size` and :meth:`transform`; one with further constructor arguments also extends
    :meth:`config`, and ``register_head`` makes models with it savable.

    Args:
        input_embedding_size: Width of the (concatenated) embeddings of the encoders, at least 1.
        dropout: Probability, in [0, 1), of zeroing an input value during training.

    Raises:
        ConfigError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> class DoublingHead(EncoderHead):
        ...     @property
        ...     def output_size(self) -> int:
        ...         return 2 * self.input_embedding_size
        ...
        ...     def transform(self, inputs):
        ...         return torch.cat([inputs, inputs], dim=1)
        >>> DoublingHead(3)(torch.ones(5, 3)).shape
        torch.Size([5, 6])
    """

    def __init__(self, input_embedding_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_embedding_size = check_size("input_embedding_size", input_embedding_size)
        self.dropout = dropout_layer("dropout", dropout)

    @property
    def output_size(self) -> int:
        """Width of the embeddings that the head returns."""
        raise ModelDefinitionError(f"{type(self).__qualname__} has no output_size; define the property")

    def transform(self, inputs: Tensor) -> Tensor:
        """Compute the embeddings: ``(B, input_embedding_size)`` to ``(B, output_size)``; subclasses define it."""
        raise ModelDefinitionError(f"{type(self).__qualname__} has no transform; define transform(self, inputs)")

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the head.

        Args:
            inputs: Embeddings of the encoders, floating point, ``(B, input_embedding_size)``.

        Returns:
            Embeddings ``(B, output_size)``, of the dtype and on the device of the inputs and weights.

        Raises:
            ConfigError: If the inputs have another width.
        """
        # EmptyHead would pass any width on, and gates would broadcast over rows of one value: both silently.
        if inputs.shape[-1] != self.input_embedding_size:
            raise ConfigError(
                f"{type(self).__qualname__} got rows of {inputs.shape[-1]} values but was made for "
                f"{self.input_embedding_size}; pass the input_embedding_size that configure_head is given"
            )
        return self.transform(self.dropout(inputs))

    def config(self) -> dict[str, Any]:
        """Give the constructor arguments as JSON values; :meth:`from_config` takes them back.

        Example:
            >>> from quatcache.heads import GatedHead
            >>> GatedHead(8, dropout=0.1).config()
            {'input_embedding_size': 8, 'dropout': 0.1}
        """
        return {"input_embedding_size": self.input_embedding_size, "dropout": self.dropout.p}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the head with fresh weights from what :meth:`config` gave.

        Raises:
            ConfigError: If a value is out of its range.
            TypeError: If an argument is missing or unknown.
        """
        return cls(**config)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        return f"input_embedding_size={self.input_embedding_size}, output_size={self.output_size}"


def check_size(name: str, value: Any) -> int:
    """Return ``value``, a width, as an int.

    Raises:
        ConfigError: If it is not a whole number, at least 1; the message calls it ``name``.
    """
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if isinstance(value, bool) or size < 1:
        raise ConfigError(f"{name} is {value!r}; give a whole number, at least 1")
    return size


def is_number(value: object) -> TypeGuard[float]:
    """Tell whether ``value`` is an int or a float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def dropout_layer(name: str, probability: object) -> nn.Dropout:
    """Make the layer that zeroes values with a probability in [0, 1).

    Raises:
        ConfigError: If ``probability`` is something else; the message calls it ``name``.
    """
    if not is_number(probability) or not 0 <= probability < 1:
        raise ConfigError(f"{name} is {probability!r}; give a probability, at least 0 and below 1")
    return nn.Dropout(float(probability))
