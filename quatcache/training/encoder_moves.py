"""Cached encoders leave the memory of the GPU while nothing must be encoded, and return before anything is.

Their room is worth more to the rows and to the batch size. ``Module.to`` keeps parameters the objects that they are,
so an optimizer, an average of weights or a callback that unfreezes them holds the same ones wherever they lie.

One that had to come back in a step stays until the next dataset is settled or the run ends: whatever lacked one row is
likely to lack another, and moving hundreds of megabytes to and fro for each would cost more than the room is worth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress

import torch
from torch import nn

from quatcache.encoders import Encoder
from quatcache.encoders.deferred import is_loaded, passing_over
from quatcache.encoders.weights import FOREIGN_STATE, package_of
from quatcache.training.lightning import LightningModule, Trainer, pl
from quatcache.training.memory import RESERVE, free_memory
from quatcache.units import readable_size

__all__ = ["EncoderMoves", "has_own_memory", "release"]

logger = logging.getLogger(__name__)

MAIN_MEMORY = torch.device("cpu")
_REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)


def has_own_memory(device: torch.device) -> bool:
    """Say whether what leaves a device makes room there: on MPS, for one, the memory is that of the processor."""
    return device.type == "cuda"


def release() -> None:
    """Give the driver the memory back that PyTorch holds for later: what is free there decides the tier of rows."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class EncoderMoves:
    """Moves the cached encoders of one run out of the way and back, all together.

    An encoder stays if it shares a tensor with a part of the model that computes, if it is spread over devices, if its
    layers are of a library that places them itself, if the strategy shards weights, or if main memory has no room.

    Args:
        trainer: The trainer of the run.
        module: Encoders return to the device where it is then.
        encoders: Those that are cached, by name: the real ones.
        present: The encoders of the module, or what stands in for them.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        encoders: Mapping[str, Encoder],
        present: Mapping[str, nn.Module],
    ) -> None:
        """Move nothing yet."""
        self._trainer = trainer
        self._module = module
        self._encoders = encoders
        self._present = present
        self._away: dict[str, Encoder] = {}
        self._over = False

    @property
    def home(self) -> torch.device | None:
        """Where encoders that are away return to; None: none is away."""
        return self._module.device if self._away else None

    def leave(self) -> None:
        """Bring the encoders into main memory: their rows are all there."""
        home = self._module.device
        if (
            self._over
            or not has_own_memory(home)
            or type(self._trainer.strategy)
            not in (
                pl.strategies.SingleDeviceStrategy,
                pl.strategies.DDPStrategy,
            )
        ):
            return
        leaving = self._free_to_leave(home)
        tensors = {id(tensor): tensor for encoder in leaving.values() for tensor in _tensors(encoder)}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = free_memory() // self._trainer.num_devices - RESERVE  # the other ranks of this machine move theirs
        if not needed:
            return
        if needed > free:
            logger.info(
                "Encoders stay on %s: main memory has %s left for their %s.",
                home,
                readable_size(max(free, 0)),
                readable_size(needed),
            )
            return
        for name, encoder in leaving.items():
            self._away[name] = encoder  # before it moves: Ctrl-C may come in the middle
            try:
                encoder.to(MAIN_MEMORY)
            except _REFUSALS as error:
                logger.info("Encoder %r stays on %s: %s", name, home, error)
                del self._away[name]
                with suppress(*_REFUSALS):
                    encoder.to(home)
        release()

    def recall(self) -> None:
        """Bring the encoders back to the device of the module, before one is asked to encode."""
        while self._away:
            name, encoder = next(iter(self._away.items()))
            encoder.to(self._module.device)
            del self._away[name]

    def end(self) -> None:
        """Bring the encoders back for good."""
        self._over = True
        self.recall()

    def _free_to_leave(self, home: torch.device) -> dict[str, Encoder]:
        leaving = {name: encoder for name, encoder in self._encoders.items() if _is_movable(encoder, home)}
        while True:  # what is tied to one that stays, stays as well
            apart = {id(encoder) for encoder in leaving.values()}
            apart |= {id(self._present[name]) for name in leaving}
            with passing_over(self._encoders.values()):
                staying = {_place(tensor) for tensor in _tensors(self._module, apart)}
            tied = [name for name in leaving if not staying.isdisjoint(map(_place, _tensors(leaving[name])))]
            if not tied:
                return leaving
            for name in tied:
                del leaving[name]


def _is_movable(encoder: Encoder, home: torch.device) -> bool:
    if not is_loaded(encoder):
        return False
    if any(package_of(type(module)) in FOREIGN_STATE for module in encoder.modules()):
        return False
    return all(tensor.device == home for tensor in _tensors(encoder))


def _tensors(module: nn.Module, apart: Set[int] = frozenset()) -> Iterator[torch.Tensor]:
    """Give the parameters and buffers of a module, without those of the modules in it with the ids ``apart``."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for child in module.children():
        if id(child) not in apart:
            yield from _tensors(child, apart)


def _place(tensor: torch.Tensor) -> object:
    """Say which memory a tensor uses: views of one tensor are tied as well."""
    if tensor.layout is torch.strided and tensor.numel() and tensor.device.type != "meta":
        return tensor.device, tensor.untyped_storage().data_ptr()
    return id(tensor)
