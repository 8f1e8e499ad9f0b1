"""The head made of any layers in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from quatcache.errors import ConfigError, ModelDefinitionError
from quatcache.heads.encoder_head import EncoderHead, check_size
from quatcache.heads.registry import layer_from_config, layer_to_config, register_head

__all__ = ["SequentialHead"]


@register_head("sequential")
class SequentialHead(EncoderHead):
    """Any layers in a row, as ``torch.nn.Sequential``, with a declared output width.

    From quaterion-models (``SequentialHead``). Heads and the layers of ``torch.nn`` that one puts in a head (linear,
    normalisation, dropout, activations, nested ``Sequential``) can be saved; another module trains, but saving it
    raises.

    Args:
        *layers: Modules that each take the output of the one before, at least one.
        output_size: Width of the last module's output; losses with one weight per component ask for it.
        input_embedding_size: Width of the input; None reads it off the layers, where the first one that is not
            elementwise is a head, a linear or a normalising layer.
        dropout: Probability, in [0, 1), of zeroing an input value during training.

    Raises:
        ConfigError: If an argument is out of its range, or the output is of another width than declared.
        ModelDefinitionError: If a layer is not a module.

    Example:
        >>> import torch
        >>> head = SequentialHead(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 30), output_size=30)
        >>> head(torch.zeros(4, 10)).shape
        torch.Size([4, 30])
        >>> len(head), head[1]
        (3, ReLU())
    """

    def __init__(
        self,
        *layers: nn.Module,
        output_size: int,
        input_embedding_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        if not layers:
            raise ConfigError("SequentialHead got 0 layers; pass at least one module, or use EmptyHead")
        for position, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise ModelDefinitionError(
                    f"layer {position} of SequentialHead is {layer!r}, not a torch.nn.Module; pass instances, as in "
                    "torch.nn.ReLU()"
                )
        output_size = check_size("output_size", output_size)
        if input_embedding_size is None:
            input_embedding_size = _input_width(layers, output_size)
        if input_embedding_size is None:
            raise ConfigError(
                f"the input width of SequentialHead does not show in {type(layers[0]).__qualname__}; pass "
                "input_embedding_size, too"
            )
        super().__init__(input_embedding_size, dropout)
        self.layers = nn.Sequential(*layers)
        self._output_size = output_size

    @property
    def output_size(self) -> int:
        """Width of the output, as declared."""
        return self._output_size

    def transform(self, inputs: Tensor) -> Tensor:
        """Run the layers: ``(B, D)`` to ``(B, output_size)``."""
        output: Tensor = self.layers(inputs)
        if output.shape[-1] != self._output_size:
            raise ConfigError(
                f"SequentialHead declares output_size={self._output_size} but its layers give {output.shape[-1]}; "
                "make them agree"
            )
        return output

    def __len__(self) -> int:
        """Count the layers."""
        return len(self.layers)

    def __getitem__(self, position: int) -> nn.Module:
        """Give one layer."""
        return self.layers[position]

    def __iter__(self) -> Iterator[nn.Module]:
        """Go through the layers in order."""
        return iter(self.layers)

    def config(self) -> dict[str, Any]:
        """Give the layers and the constructor arguments as JSON values.

        Raises:
            ModelDefinitionError: If a layer has no registered kind.
        """
        layers = [layer_to_config(layer) for layer in self.layers]
        return {**super().config(), "layers": layers, "output_size": self._output_size}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the head and its layers with fresh weights from what :meth:`config` gave."""
        arguments = dict(config)
        layers = arguments.pop("layers", None)
        if not isinstance(layers, list):
            raise ConfigError(f"a sequential head has layers {layers!r}; the config needs a list of kinds and configs")
        return cls(*(layer_from_config(layer) for layer in layers), **arguments)


_ELEMENTWISE = (
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softmax,
    nn.Tanh,
)


def _input_width(layers: Iterable[nn.Module], output_size: int) -> int | None:
    """Give the width of the rows that ``layers`` take, or None where they do not tell."""
    for layer in _unnested(layers):
        if isinstance(layer, EncoderHead):
            return layer.input_embedding_size
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1]
        if isinstance(layer, nn.BatchNorm1d):
            return layer.num_features
        if not isinstance(layer, _ELEMENTWISE):
            return None
    return output_size  # elementwise throughout: the width stays


def _unnested(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _unnested(layer)
        else:
            yield layer
