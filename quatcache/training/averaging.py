"""Averages of weights, as callbacks of Lightning keep them, in which a frozen encoder stays what it is.

Such a callback has a copy of the whole model. It averages a frozen encoder with itself, puts the average in the place
of the weights for each validation, and for good in the end. But ``0.9 * w + 0.1 * w`` is not ``w`` in floating point:
the encoder would become another one by rounding alone. A validation that must encode would be refused for changed
weights, and the next run would find no row of that encoder. So before an average is used, it gets the encoder as it is.

What is trained, and what was unfrozen, is averaged as the callback has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch

from quatcache.encoders import Encoder
from quatcache.encoders.deferred import is_loaded
from quatcache.training.guards import encoders_of
from quatcache.training.internals import averages_of
from quatcache.training.lightning import Trainer

__all__ = ["keep_frozen"]


def keep_frozen(trainer: Trainer, encoders: Mapping[str, Encoder]) -> None:
    """Give the averages of a model its frozen encoders as they are.

    Args:
        trainer: Its callbacks may keep averages.
        encoders: The encoders of the model that trains, by name: the real ones.
    """
    for average in averages_of(trainer):
        copies = encoders_of(average)
        for name, encoder in encoders.items():
            copied = copies[name]
            if encoder.trainable or not (is_loaded(encoder) and is_loaded(copied)):
                continue
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                for averaged, own in zip(_tensors(copied), _tensors(encoder), strict=True):
                    averaged.data.copy_(own)


def _tensors(encoder: Encoder) -> chain[torch.Tensor]:
    return chain(encoder.parameters(), encoder.buffers())
