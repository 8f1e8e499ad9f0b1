"""What is looked at before and during a cached run, so that no encoder changes behind its rows."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quatcache.encoders import Encoder
from quatcache.encoders.weights import tensor_digest
from quatcache.errors import ConfigError, ModelDefinitionError, NotFrozenError, shorten
from quatcache.training.lightning import LIGHTNING_PACKAGES, LightningModule, Trainer

__all__ = ["FrozenGuard", "encoders_of", "leave_to_ranks", "refuse_transfer_hooks"]


class FrozenGuard:
    """Notices that cached encoders were unfrozen or written to while a model trains.

    Args:
        encoders: The cached encoders by name.
    """

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        """Remember nothing yet."""
        self._encoders = encoders
        self._known: dict[str, tuple[int, tuple[str, ...]]] = {}

    def remember(self) -> None:
        """Take the encoders as they are now for those that made the rows."""
        self._known = {name: (_writes(encoder), _digests(encoder)) for name, encoder in self._encoders.items()}

    def unfrozen(self) -> tuple[str, str] | None:
        """Find an encoder that was unfrozen: its rows would stay what they were.

        Returns:
            Its name and that of a parameter that requires a gradient; None: there is none.
        """
        for name, encoder in self._encoders.items():
            for path, parameter in encoder.named_parameters():
                if parameter.requires_grad:
                    return name, path
        return None

    def check_unchanged(self) -> None:
        """Refuse to go on with an encoder whose weights have other values than at the fill.

        Raises:
            NotFrozenError: They have.
        """
        for name, (writes, digests) in self._known.items():
            encoder = self._encoders[name]
            now = _writes(encoder)
            if now == writes:
                continue
            if _digests(encoder) != digests:
                raise NotFrozenError(
                    f"the weights of encoder {name!r} were changed after its rows were cached; change them before the "
                    "fit, or return None from configure_caches()."
                )
            self._known[name] = now, digests  # written with the same values, as by loading a checkpoint


def _writes(encoder: Encoder) -> int:
    """Count the writes to an encoder's tensors, as autograd does: it costs nothing to ask."""
    return sum(tensor._version for tensor in _tensors(encoder) if not tensor.is_inference())


def _digests(encoder: Encoder) -> tuple[str, ...]:
    return tuple(tensor_digest(tensor) for tensor in _tensors(encoder))


def _tensors(encoder: Encoder) -> tuple[torch.Tensor, ...]:
    return (*encoder.parameters(), *encoder.buffers())


def encoders_of(module: LightningModule) -> MutableMapping[str, Any]:
    """Give the encoders of a module, which can be replaced in it by name.

    Raises:
        ModelDefinitionError: It has none, or something else.
    """
    encoders = getattr(module, "encoders", None)
    if not isinstance(encoders, nn.ModuleDict | MutableMapping) or not len(encoders):
        raise ModelDefinitionError(
            f"{type(module).__name__}.encoders is {shorten(encoders)}; make it a torch.nn.ModuleDict of encoder "
            "names to Encoder objects."
        )
    for name, encoder in encoders.items():
        if not isinstance(encoder, Encoder):
            raise ModelDefinitionError(
                f"encoder {name!r} of {type(module).__name__} is a {type(encoder).__name__}; wrap it in a "
                "ModuleEncoder, or subclass Encoder."
            )
    return encoders  # type: ignore[return-value]


def refuse_transfer_hooks(module: LightningModule, trainer: Trainer) -> None:
    """Refuse hooks that change batches on their way: they would be given rows where they expect inputs.

    Raises:
        ConfigError: The module or its datamodule overrides one.
    """
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        for owner in (module, trainer.datamodule):  # type: ignore[attr-defined]
            if owner is not None and not getattr(type(owner), hook).__module__.startswith(LIGHTNING_PACKAGES):
                raise ConfigError(
                    f"{type(owner).__name__}.{hook} would be given cached rows instead of the encoders' inputs; do "
                    "its work in the dataset or in collate, or return None from configure_caches()."
                )


def leave_to_ranks(module: LightningModule, encoders: Mapping[str, Encoder]) -> None:
    """Keep frozen encoders out of what DDP sends around.

    Every rank has built them, and DDP would broadcast their buffers at each step.
    """
    ignored = [
        f"encoders.{name}.{tensor}"
        for name, encoder in encoders.items()
        if not encoder.trainable
        for tensor, _ in (*encoder.named_parameters(), *encoder.named_buffers())
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]
