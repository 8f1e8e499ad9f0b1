"""What is looked at before and during a cached run, so that no encoder changes behind its rows."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric
from torchmetrics.retrieval.base import RetrievalMetric

from quatcache.encoders import Encoder
from quatcache.encoders.deferred import is_loaded, passing_over
from quatcache.encoders.weights import named_modules, named_tensors, tensor_digest
from quatcache.errors import ConfigError, LoaderError, ModelDefinitionError, NotFrozenError, shorten
from quatcache.training.lightning import LIGHTNING_PACKAGES, LightningModule, Trainer

__all__ = [
    "FrozenGuard",
    "check_encoders",
    "checked_metrics",
    "encoders_of",
    "given_together",
    "leave_to_ranks",
    "refuse_collections",
    "refuse_transfer_hooks",
]

SHARE_OF_TIME = 0.01
"""Of the time of a fit, digesting the weights of encoders on the CPU takes at most so much."""

_requires_grad = attrgetter("requires_grad")


class FrozenGuard:
    """Notices that cached encoders were unfrozen or changed while a model trains.

    What is compared are the values of all tensors, those in plain attributes included, and the classes of all modules.
    A tensor is digested anew if it is another one, was moved, or was written to in a way that autograd sees. A write
    through ``.data`` or numpy leaves no trace: so tensors on the CPU are all digested from time to time as well, as
    often as :data:`SHARE_OF_TIME` allows. On an accelerator that would mean copying, and is left.

    Finding all tensors takes longer than a small step. So a step that encodes only sees whether those that were found
    are still there and were not written to; all are looked for as often as the same share allows.

    Args:
        encoders: The cached encoders by name.
        time_func: Clock in seconds.
    """

    def __init__(self, encoders: Mapping[str, Encoder], time_func: Callable[[], float] = time.monotonic) -> None:
        """Remember nothing yet."""
        self._encoders = encoders
        self._known: dict[str, _Look] = {}
        self._time = time_func
        self._cost = 0.0  # seconds that digesting all tensors took
        self._since = 0.0  # when that was
        self._look_cost = 0.0  # seconds that a look without it took
        self._looked = 0.0  # when the last look of either kind was
        self._marks: list[_Mark] = []  # what that found, without arrays: those are other tensors in each look
        self._parameters: list[nn.Parameter] | None = None  # all there are, while no module anywhere gets another
        self._watching = _call_at_registrations(self, FrozenGuard._look_anew)

    def remember(self) -> None:
        """Take the encoders as they are now for those that made the rows.

        Raises:
            NotFrozenError: Rows were made before, by an encoder that has changed since.
        """
        self.check_unchanged()
        if not self._known:
            started = self._time()
            self._known = {name: _look(encoder, None, thorough=True) for name, encoder in self._encoders.items()}
            self._since = self._time()
            self._cost = self._since - started
            self._note()

    def _note(self) -> None:
        self._looked = self._time()
        marks = (mark for look in self._known.values() for mark in look.marks.values())
        self._marks = [mark for mark in marks if mark.tensor() is not None]

    def unfrozen(self) -> tuple[str, str] | None:
        """Find an encoder that was unfrozen: its rows would stay what they were.

        Returns:
            Its name and that of a parameter that requires a gradient; None: there is none.
        """
        if self._parameters is not None and not any(map(_requires_grad, self._parameters)):
            return None  # this is asked at each step, and a walk through a transformer takes a tenth of a small one
        found = []
        for name, encoder in self._encoders.items():
            with passing_over([encoder]):
                for path, parameter in encoder.named_parameters():
                    if parameter.requires_grad:
                        return name, path
                    found.append(parameter)
        self._parameters = found if self._watching.alive else None
        return None

    def _look_anew(self) -> None:
        self._parameters = None

    def close(self) -> None:
        """Leave the modules alone again."""
        self._watching()
        self._parameters = None

    def check_unchanged(self) -> None:
        """Refuse to go on with an encoder that has other weights or other modules than at the fill.

        Raises:
            NotFrozenError: They have.
        """
        started = self._time()
        thorough = (started - self._since) * SHARE_OF_TIME >= self._cost
        for name, known in self._known.items():
            now = _look(self._encoders[name], known, thorough)
            changed = [f"weight {path!r}" for path in known.digests if now.digests.get(path) != known.digests[path]]
            classes = dict(known.classes)
            if known.loaded:  # else what is new is what was loaded since
                changed += [f"weight {path!r}" for path in now.digests if path not in known.digests]
                classes.update(now.classes)
            changed += [f"module {path!r}" for path in classes
                        if known.classes.get(path) is not now.classes.get(path)]  # fmt: skip
            if changed:
                raise NotFrozenError(
                    f"the weights of encoder {name!r} were changed after its rows were cached ({changed[0]}"
                    f"{f' and {len(changed) - 1} more' if changed[1:] else ''}); change them before the fit, or return "
                    "None from configure_caches()."
                )
            self._known[name] = now  # the same values, but perhaps written or moved, as by loading a checkpoint
        self._note()
        if thorough:
            self._since = self._looked
            self._cost = self._since - started
        else:
            self._look_cost = self._looked - started

    def check_in_step(self) -> None:
        """Look at the tensors that were found last, and at everything if there is something about them, or time for it.

        Raises:
            NotFrozenError: An encoder has other weights or other modules than at the fill.
        """
        spent = (self._time() - self._looked) * SHARE_OF_TIME
        if spent >= self._look_cost or not all(mark.holds() for mark in self._marks):
            self.check_unchanged()


def _call_at_registrations(guard: FrozenGuard, call: Callable[[FrozenGuard], None]) -> weakref.finalize[Any, Any]:
    """Have a method called when any module gets a parameter or a module, until that is ended or the guard is gone."""
    alive = weakref.ref(guard)

    def tell(module: nn.Module, name: str, value: object) -> None:
        guard = alive()
        if guard is not None:
            call(guard)

    handles = (register_module_parameter_registration_hook(tell), register_module_module_registration_hook(tell))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return weakref.finalize(guard, end)


@dataclass(frozen=True)
class _Mark:
    """A tensor and the writes to it, as autograd counts them."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    address: int

    def holds(self) -> bool:
        """Whether the tensor still exists, at the same place, and no write was counted."""
        tensor = self.tensor()
        return tensor is not None and (self.version, self.address) == (tensor._version, tensor.data_ptr())

    def stands(self, tensor: torch.Tensor) -> bool:
        """The same of a tensor that has to be this one."""
        return self.tensor() is tensor and self.holds()


@dataclass(frozen=True)
class _Look:
    """An encoder at one time: by path the digests and marks of its tensors, and the classes of its modules.

    Of one that is not loaded it has what does not need to be.
    """

    digests: dict[str, str]
    marks: dict[str, _Mark]
    classes: dict[str, type]
    loaded: bool


def _look(encoder: Encoder, before: _Look | None, thorough: bool) -> _Look:
    """Digest the tensors of an encoder, except for those that are marked as they were before.

    Args:
        encoder: The encoder.
        before: The look before; None: there is none.
        thorough: Digest tensors on the CPU whatever their marks say.
    """
    digests, marks = {}, {}
    with passing_over([encoder]):
        tensors, modules = named_tensors(encoder), tuple(named_modules(encoder))
    for path, tensor in tensors.items():
        markable = not tensor.is_inference() and tensor.layout is torch.strided
        stands = before is not None and path in before.marks and markable and before.marks[path].stands(tensor)
        if before is not None and stands and not (thorough and _is_cheap(tensor)):
            digests[path] = before.digests[path]
        else:  # tensors of inference mode have no version, which remembering digests on an accelerator needs
            digests[path] = tensor_digest(tensor.cpu() if tensor.is_inference() else tensor)
        if markable:
            marks[path] = _Mark(weakref.ref(tensor), tensor._version, tensor.data_ptr())
    return _Look(digests, marks, {path: type(module) for path, module in modules}, is_loaded(encoder))


def _is_cheap(tensor: torch.Tensor) -> bool:
    """Whether digesting a tensor copies nothing."""
    return tensor.device.type == "cpu"


def encoders_of(module: LightningModule) -> MutableMapping[str, Any]:
    """Give the encoders of a module, which can be replaced in it by name.

    Raises:
        ModelDefinitionError: It has none, or something else.
    """
    encoders: Any = getattr(module, "encoders", None)
    remedy = "make it a torch.nn.ModuleDict of encoder names to Encoder objects"
    check_encoders(encoders, (nn.ModuleDict, MutableMapping), f"{type(module).__name__}.encoders is", remedy)
    return encoders  # type: ignore[no-any-return]


def check_encoders(encoders: Any, kinds: tuple[type[Any], ...], found: str, remedy: str) -> None:
    """Refuse what does not hold encoders by name.

    Args:
        encoders: What was found.
        kinds: What may hold them.
        found: Beginning of the message: where it was found, and a verb.
        remedy: End of the message, for what is of another kind or empty.

    Raises:
        ModelDefinitionError: It is of another kind, is empty, or holds something else.
    """
    if not isinstance(encoders, kinds) or not len(encoders):
        raise ModelDefinitionError(f"{found} {shorten(encoders)}; {remedy}.")
    for name, encoder in encoders.items():
        if not isinstance(encoder, Encoder):
            raise ModelDefinitionError(
                f"{found} a {type(encoders).__name__} whose encoder {name!r} is of type {type(encoder).__name__}; wrap "
                "it in a ModuleEncoder, or subclass Encoder."
            )


def checked_metrics(metrics: Any) -> Mapping[str, Metric]:
    """Give back what ``configure_metrics`` returned.

    Raises:
        ModelDefinitionError: It cannot be updated with embeddings and targets.
    """
    remedy = "return a dict of torchmetrics by name, for instance {'accuracy': MulticlassAccuracy(22)}"
    if not isinstance(metrics, Mapping):
        raise ModelDefinitionError(f"configure_metrics returned {shorten(metrics)}; {remedy}.")
    for name, metric in metrics.items():
        if isinstance(metric, RetrievalMetric):
            kind = type(metric).__name__
            raise ModelDefinitionError(
                f"metric {name!r} is a bare {kind}, which takes scores and query numbers; wrap it: "
                f"quatcache.metrics.EmbeddingRetrieval({kind}())."
            )
        if not isinstance(metric, Metric):
            raise ModelDefinitionError(f"configure_metrics returned {shorten(metric)} as metric {name!r}; {remedy}.")
    return metrics


def refuse_collections(module: LightningModule, loaders: Any) -> None:
    """Refuse several train loaders that are drawn from together, where the step takes a batch of one.

    Args:
        module: The module; a ``training_step`` of its own may take what it likes.
        loaders: A list or dict of train loaders, of which each step gets a batch of each; None: there is one batch.

    Raises:
        LoaderError: The step would be given a list or dict.
    """
    step: Any = vars(module).get("training_step", type(module).training_step)
    if isinstance(loaders, list | tuple | dict) and step.__module__ == f"{__package__}.module":
        raise LoaderError(given_together(len(loaders), type(loaders).__name__))


def given_together(number: int, kind: str) -> str:
    """Say that a step is given batches of several loaders at once, and what to do about it.

    Example:
        >>> given_together(2, "dict")[:69]
        'fit was given 2 train loaders, so a step gets a dict of Batches: conc'
    """
    what = "concatenate the datasets" if number > 1 else "pass the loader itself"
    loaders = f"{number} train loader{'s' if number > 1 else f' in a {kind}'}"
    return f"fit was given {loaders}, so a step gets a {kind} of Batches: {what}, or override training_step to take it."


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

    Every rank has built them, and DDP would broadcast their buffers at each step. One that is loaded after DDP has
    looked is none of its business anyhow.
    """
    with passing_over(encoders.values()):
        ignored = [
            f"encoders.{name}.{tensor}"
            for name, encoder in encoders.items()
            if not encoder.trainable
            for tensor, _ in (*encoder.named_parameters(), *encoder.named_buffers())
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]
