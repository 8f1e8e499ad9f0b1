"""The encoders of a model, whose frozen weights stay out of checkpoints.

A frozen encoder is hundreds of megabytes that every checkpoint would repeat, and that anyone who builds the model has
already. So a state dict leaves frozen encoders out, and loading one, strictly, does not miss them. One that was
unfrozen in the course of a fit is saved from then on: its weights are nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from quatcache.encoders import Encoder
from quatcache.encoders.cached import CachedEncoder
from quatcache.encoders.deferred import is_loaded, passing_over
from quatcache.training.internals import is_bookkeeping

__all__ = ["EncoderDict"]


class EncoderDict(nn.ModuleDict):
    """A ``ModuleDict`` of encoders that saves the trainable ones only.

    Args:
        encoders: The encoders by name.

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> frozen = ModuleEncoder(nn.Linear(2, 2), list, embedding_size=2)
        >>> EncoderDict({"default": frozen}).state_dict()
        OrderedDict()
    """

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        """Register the encoders."""
        super().__init__(dict(encoders))

    def real(self) -> dict[str, Encoder]:
        """Give the encoders themselves, also while some are cached."""
        return {
            name: module.encoder if isinstance(module, CachedEncoder) else cast(Encoder, module)
            for name, module in self.items()
        }

    def at_hand(self) -> dict[str, Encoder]:
        """Give the encoders themselves on the device of the model, to encode with them."""
        for module in self.values():
            if isinstance(module, CachedEncoder):
                module.at_hand()
        return self.real()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Give all modules; what is not loaded is loaded first, but for bookkeeping."""
        with passing_over(self.real().values() if is_bookkeeping() else ()):
            found: list[tuple[str, nn.Module]] = list(super().named_modules(*args, **kwargs))
        return iter(found)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Collect what modules do, and take the frozen encoders out again."""
        prefix = kwargs.get("prefix", "")
        with passing_over(self.real().values()):
            collected = super().state_dict(*args, **kwargs)
            for name, encoder in self.real().items():
                if not encoder.trainable and not any(parameter.requires_grad for parameter in encoder.parameters()):
                    for key in [key for key in collected if key.startswith(f"{prefix}{name}.")]:
                        del collected[key]
        return collected

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, encoder in self.real().items():
            if not encoder.trainable and is_loaded(encoder):  # else it is loaded if it is given weights
                for key, value in encoder.state_dict().items():
                    state_dict.setdefault(f"{prefix}{name}.{key}", value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
