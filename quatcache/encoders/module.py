"""Any ``nn.Module`` as an encoder, with a collate function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from quatcache.encoders.encoder import Encoder
from quatcache.encoders.facts import describe, module_facts
from quatcache.encoders.serialised import JSON
from quatcache.errors import ConfigError, EncoderOutputError
from quatcache.sequences import PaddedSequences

__all__ = ["ModuleEncoder"]


class ModuleEncoder(Encoder):
    """An encoder made of a module and a collate function.

    Args:
        module: Takes what ``collate`` returns and gives a tensor of shape (B, D) or (B, *shape), or PaddedSequences.
        collate: Turns a list of items into the input of the module. It must pickle if loaders use spawned workers, so
            a function at module level or an object, not a lambda.
        embedding_size: Size of the last dimension of the module's output, at least 1.
        trainable: Whether training may change the module. A frozen module is put into eval mode and its parameters
            stop requiring gradients, at once.

    Raises:
        ConfigError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> encoder = ModuleEncoder(nn.EmbeddingBag(10, 4), torch.tensor, 4)
        >>> encoder(encoder.collate([[1, 2], [3, 4]])).shape
        torch.Size([2, 4])
    """

    trainable: bool
    embedding_size: int

    def __init__(
        self,
        module: nn.Module,
        collate: Callable[[Sequence[Any]], Any],
        embedding_size: int,
        *,
        trainable: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ConfigError(f"module is a {type(module).__qualname__}; pass a torch.nn.Module")
        if not callable(collate):
            raise ConfigError(f"collate is a {type(collate).__qualname__}; pass a function that takes a list of items")
        if isinstance(embedding_size, bool) or not isinstance(embedding_size, int) or embedding_size < 1:
            raise ConfigError(f"embedding_size is {embedding_size!r}; pass the size of the module's output, at least 1")
        super().__init__()
        self.module = module
        self._collate = collate
        self.embedding_size = embedding_size
        self.trainable = trainable
        if not trainable:
            module.requires_grad_(False)
            self.eval()

    def collate(self, items: Sequence[Any]) -> Any:
        """Collate with the function that was given."""
        return self._collate(items)

    def collate_fn(self) -> Callable[[Sequence[Any]], Any]:
        """Give the function itself: a worker needs nothing of the module; of a subclass, its own ``collate``."""
        if type(self).collate is not ModuleEncoder.collate:
            return self.collate
        return self._collate

    def forward(self, inputs: Any) -> Tensor | PaddedSequences:
        """Run the module on a collated batch.

        Args:
            inputs: What ``collate`` returned for B items.

        Returns:
            Rows of shape (B, D) or (B, *shape), or PaddedSequences.

        Raises:
            EncoderOutputError: If the module returned something else.
        """
        rows = self.module(inputs)
        if not isinstance(rows, Tensor | PaddedSequences):
            raise EncoderOutputError(
                f"{type(self.module).__qualname__} returned a {type(rows).__qualname__}; wrap it in a module that "
                "returns a tensor of shape (B, D)"
            )
        return rows

    def facts(self) -> dict[str, JSON]:
        """List the module's facts and those of the collate function, its closure and defaults included."""
        facts = module_facts(self)
        describe(self._collate, "collate", facts)
        return facts
