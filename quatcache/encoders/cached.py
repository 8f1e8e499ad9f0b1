"""The stand-in for a cached encoder while a model trains.

The loader gathers the rows, so what reaches :meth:`CachedEncoder.forward` are the vectors themselves. Everything else
that can be seen of the encoder stays as it is: parameters, buffers and submodules are those of the real one, under the
same names. So averages of weights, checkpoints, devices, and a callback that unfreezes the encoder work on the encoder,
and a copy of the model has the encoder itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from typing_extensions import Self

from quatcache.encoders.encoder import Encoder

__all__ = ["CachedEncoder"]


class Moves(Protocol):
    """Where the real encoder is while it stands aside."""

    @property
    def home(self) -> torch.device | None:
        """Where it returns to; None: it is there."""
        ...

    def recall(self) -> None:
        """Bring it back."""
        ...


class CachedEncoder(nn.Module):
    """Passes on the rows that a loader gathered, in place of the encoder that made them.

    Args:
        encoder: The real encoder; it is not changed.
        moves: Knows where it is; None: it stays where it is.

    Attributes:
        trainable: Always false.

    Example:
        >>> import torch
        >>> from quatcache.encoders import ModuleEncoder
        >>> real = ModuleEncoder(nn.Identity(), torch.stack, embedding_size=2)
        >>> CachedEncoder(real)(torch.ones(1, 2))
        tensor([[1., 1.]])
    """

    trainable = False

    def __init__(self, encoder: Encoder, moves: Moves | None = None) -> None:
        """Share the tensors and submodules of the encoder."""
        super().__init__()
        self._aside = (encoder,)  # in a tuple: nn.Module registers modules, but does not look into tuples
        self._moves = moves
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, shared, getattr(encoder, shared))
        self.training = encoder.training

    @property
    def encoder(self) -> Encoder:
        """The real encoder, wherever its weights are."""
        return self._aside[0]

    def at_hand(self) -> Encoder:
        """Give the real encoder on the device of the model, to encode with it."""
        if self._moves is not None:
            self._moves.recall()
        return self.encoder

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

    def forward(self, rows: Any) -> Any:
        """Pass on rows ``(B, *row_shape)``, or :class:`~quatcache.sequences.PaddedSequences`."""
        return rows

    def train(self, mode: bool = True) -> Self:
        """Do as the real encoder does: a frozen one stays in eval mode."""
        self.encoder.train(mode)
        self.training = self.encoder.training
        return self

    # A real encoder that is not loaded is loaded for whoever looks inside, as if it were in its place

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Give the modules of the real encoder."""
        self.encoder._reveal()
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        """Give the modules directly inside the real encoder."""
        self.encoder._reveal()
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Collect the weights of the real encoder."""
        self.encoder._reveal()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.encoder._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        self.encoder._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        """Give a module of the real encoder."""
        if name in self.__dict__.get("_modules", ()):
            self.encoder._reveal()
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        """Copy the real encoder, to where the model is: a copy of a model is not in its run."""
        copied: Encoder = copy.deepcopy(self.encoder, memo)
        home = None if self._moves is None else self._moves.home
        return copied if home is None else copied.to(home)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the real encoder to another process."""
        return _itself, (self.encoder,)


def _itself(encoder: Encoder) -> Encoder:
    return encoder
