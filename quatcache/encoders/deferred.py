"""A model that is loaded when something needs it, and what has to be known of it before.

A run that finds all of its rows needs neither the model nor its library: for a model of several gigabytes that is
minutes, and its memory. So a frozen encoder that was given a name keeps the folder instead, and every way to the model
(its attribute, its parameters, its state) loads it first. Whoever walks through modules in passing says so with
:func:`passing_over`. The rejected alternative, tensors on "meta" that stand for the weights, would have to be exchanged
in every optimizer, checkpoint and average that got hold of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from torch import nn

from quatcache.encoders.layouts import ModelFiles
from quatcache.encoders.serialised import JSON
from quatcache.errors import ModelDefinitionError

__all__ = [
    "Deferred",
    "as_if_alone",
    "deciding_versions",
    "device_of",
    "is_loaded",
    "load_or_defer",
    "passing_over",
]

_DECIDE = (
    *("quatcache", "torch", "torchvision", "torchaudio", "transformers", "tokenizers", "sentencepiece", "tiktoken"),
    *("sentence-transformers", "safetensors", "huggingface-hub", "peft", "accelerate", "bitsandbytes", "optimum"),
    *("torchao", "timm", "pillow", "numpy", "protobuf"),
)


@dataclass
class Deferred:
    """A model that is not loaded yet.

    Attributes:
        folders: Where its files are: those of the model, and of a tokenizer that lies elsewhere.
        embedding_size: Size of its embeddings, as its files say.
        load: Loads it, on the CPU; it pickles with the encoder.
        default_dtype: The default dtype of torch when the encoder was made: loading goes by it.
        device: Where the model belongs once it is loaded.
        casts: What its weights were cast to since, one after the other, for each rounds.
        held: How many walks are under way that pass over it.
        listeners: Called when it was loaded. Copies, and encoders that were sent to another process, have none.
    """

    folders: tuple[Path, ...]
    embedding_size: int
    load: Callable[[], nn.Module]
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    device: torch.device | None = None
    casts: tuple[torch.dtype, ...] = ()
    held: int = 0
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def note(self, move: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Take note of what ``to``, ``half`` and their like would do to the weights.

        Args:
            move: What they do to one tensor.

        Returns:
            Whether that is known: a move to a device, and a cast or none.
        """
        single, half = (move(torch.zeros(1, dtype=dtype)) for dtype in (torch.float32, torch.float16))
        keeps = (single.dtype, half.dtype) == (torch.float32, torch.float16)
        if single.device.type == "meta" or not (keeps or single.dtype == half.dtype):
            return False
        self.device = single.device
        if not keeps and self.casts[-1:] != (single.dtype,):
            self.casts += (single.dtype,)
        return True

    def load_into(self, encoder: Any) -> None:
        """Load the model into the encoder that waits for it, and tell the listeners; see ``Encoder.ensure_loaded``."""
        size, folder = encoder.embedding_size, self.folders[0]
        encoder._deferred = None
        try:
            with as_if_alone(self.default_dtype):
                encoder._modules["model"] = self._placed(self.load()).train(encoder.training)
            if encoder.embedding_size != size:
                raise ModelDefinitionError(
                    f"the files in {folder} tell of embeddings of size {size}, the model itself gives "
                    f"{encoder.embedding_size}; pass the loaded model instead of its name"
                )
        except BaseException as error:
            encoder._modules["model"], encoder._deferred = None, self
            if isinstance(error, AttributeError):  # a property that raises it looks like an attribute that is not there
                raise ModelDefinitionError(f"{folder} cannot be loaded: {error}") from error
            raise
        for listener in tuple(self.listeners):
            listener()

    def _placed(self, model: nn.Module) -> nn.Module:
        """Freeze a model that was just loaded, and do to it what was noted."""
        model.requires_grad_(False).eval()
        for dtype in self.casts:
            model.to(dtype)
        return model if self.device is None else model.to(self.device)

    def facts(self) -> dict[str, JSON]:
        """List what decides the model beside the content of its files."""
        return {"default_dtype": str(self.default_dtype), "casts": [str(dtype) for dtype in self.casts]}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out who waits for this one."""
        return {**self.__dict__, "held": 0, "listeners": []}


def is_loaded(encoder: Any) -> bool:
    """Whether an encoder's model is in memory; only frozen adapters that were given a name put off loading it."""
    return bool(encoder._deferred is None or encoder._modules.get("model") is not None)


def load_or_defer(encoder: Any, load: Callable[[], nn.Module], files: ModelFiles | None) -> None:
    """Give an adapter its model: now, or, where its files tell enough, when something needs it.

    Args:
        encoder: The adapter; it knows whether it is trainable, and what its model is loaded with.
        load: Loads the model; see :class:`Deferred`.
        files: Those of the model; None: it is loaded now.
    """
    encoder._modules["model"] = None  # the first of the modules, whenever it is loaded
    if files is not None:
        encoder._deferred = Deferred(*files, load)
    else:
        with as_if_alone(torch.get_default_dtype()):
            model = load()
        encoder._modules["model"] = model if encoder.trainable else model.requires_grad_(False)
    if not encoder.trainable:
        encoder.eval()


@contextmanager
def passing_over(encoders: Iterable[Any]) -> Iterator[None]:
    """Walk through modules without loading what is not loaded.

    Args:
        encoders: Their models are passed over, as if they had none, unless they are loaded.
    """
    waiting = [encoder._deferred for encoder in encoders if encoder._deferred is not None]
    for deferred in waiting:
        deferred.held += 1
    try:
        yield
    finally:
        for deferred in waiting:
            deferred.held -= 1


@contextmanager
def as_if_alone(dtype: torch.dtype) -> Iterator[None]:
    """Load a model as at the start of a program, in whatever step that happens.

    Random numbers are left as they are found: training must draw the same whether and when a model is loaded. Weights
    that are made in inference mode could never be trained.

    Args:
        dtype: Default dtype of torch; mixed precision changes it in a step.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    drawn, drawn_by_numpy, before = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(list(devices)))
        stack.enter_context(torch.inference_mode(False))
        stack.callback(torch.set_default_dtype, before)
        stack.callback(np.random.set_state, drawn_by_numpy)
        stack.callback(random.setstate, drawn)
        torch.set_default_dtype(dtype)
        yield


def deciding_versions() -> dict[str, JSON]:
    """Give the versions of all that decides what facts are found of a model, by name.

    Example:
        >>> {"python", "torch", "transformers"} <= deciding_versions().keys()
        True
    """
    known: dict[str, JSON] = {"python": python_version()}
    for name in _DECIDE:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def device_of(encoder: Any) -> torch.device:
    """Say where an encoder computes: where its tensors are, or where they will be once it is loaded."""
    if not is_loaded(encoder):
        return encoder._deferred.device or torch.device("cpu")
    return next((tensor.device for tensor in (*encoder.parameters(), *encoder.buffers())), torch.device("cpu"))
