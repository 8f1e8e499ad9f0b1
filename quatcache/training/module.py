"""The LightningModule that a user subclasses: encoders, a head, a loss, and how to cache."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torchmetrics import Metric

from quatcache.data.batches import Batch
from quatcache.data.samples import read_sample
from quatcache.encoders import Encoder
from quatcache.encoders.deferred import is_loaded, passing_over
from quatcache.errors import ConfigError, LoaderError, ModelDefinitionError, shorten
from quatcache.heads import head_input
from quatcache.servable import ServableModel
from quatcache.training.callback import CacheCallback
from quatcache.training.config import CacheConfig, checked_config
from quatcache.training.encoder_dict import EncoderDict
from quatcache.training.guards import check_encoders, checked_metrics, given_together
from quatcache.training.internals import looks_in_passing
from quatcache.training.lightning import Callback, LightningModule
from quatcache.training.loss_log import LossLog

__all__ = ["TrainableModel"]


class _Assembled(type(LightningModule)):  # type: ignore[misc]
    """Builds the parts of a model when its ``__init__`` has run, so that hooks find every attribute it sets."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        model._assemble()
        return model


class TrainableModel(LightningModule, metaclass=_Assembled):
    """A model of encoders and a head, trained with plain Lightning and cached where its encoders are frozen.

    Override :meth:`configure_encoders`, :meth:`configure_head` and :meth:`configure_loss`; return a config from
    :meth:`configure_caches` to cache. Loaders need nothing but a dataset of samples: the model collates them through
    its encoders, with or without a cache.

    Encoders, head and loss are built when ``__init__`` has returned: the hooks may use every attribute that it sets,
    and ``self.encoders``, ``self.head`` and ``self.loss`` do not exist before.

    Attributes:
        encoders: The encoders by name; a single one is called ``"default"``. Frozen ones stay in eval mode, and their
            weights are in no state dict.
        head: What ``configure_head`` returned.
        loss: What ``configure_loss`` returned.
        cache_callback: The callback that the model brings along; its ``report`` tells what was cached.
        loss_log: Logs the losses of steps.

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> class Classifier(TrainableModel):
        ...     def configure_encoders(self):
        ...         frozen = nn.Linear(8, 4).requires_grad_(False)
        ...         return ModuleEncoder(frozen, torch.stack, embedding_size=4)
        ...     def configure_head(self, input_embedding_size):
        ...         return nn.Linear(input_embedding_size, 3)
        ...     def configure_loss(self):
        ...         return nn.CrossEntropyLoss()
        >>> Classifier().encode([torch.zeros(8), torch.ones(8)]).shape
        torch.Size([2, 3])
    """

    encoders: EncoderDict
    head: nn.Module
    loss: nn.Module

    def __init__(self) -> None:
        """Prepare the module; encoders, head and loss are built after the ``__init__`` of the subclass."""
        super().__init__()
        self.cache_callback = CacheCallback()
        self.cache_callback.brought_by_model = True
        self.loss_log = LossLog()
        self._metrics: list[dict[str, Metric]] = []

    # What a user overrides

    def configure_encoders(self) -> Encoder | Mapping[str, Encoder]:
        """Return one encoder, or several by name; their rows are concatenated in name order."""
        raise ModelDefinitionError(
            f"{type(self).__name__} has no configure_encoders; return an Encoder, or a dict of names to Encoders."
        )

    def configure_head(self, input_embedding_size: int) -> nn.Module:
        """Return the part that is trained.

        Args:
            input_embedding_size: Sum of the embedding sizes of all encoders.
        """
        raise ModelDefinitionError(
            f"{type(self).__name__} has no configure_head; return a torch.nn.Module that takes vectors of size "
            f"{input_embedding_size}, for instance quatcache.heads.LinearHead({input_embedding_size}, ...)."
        )

    def configure_loss(self) -> nn.Module:
        """Return the loss.

        It is called as ``loss(embeddings, groups)``, and for pairs as ``loss(embeddings, pairs, labels, subgroups)``
        with embeddings ``(2B, D)``, pairs ``(B, 2)``, labels ``(B,)`` and subgroups ``(2B,)``.
        """
        raise ModelDefinitionError(
            f"{type(self).__name__} has no configure_loss; return a torch.nn.Module, for instance "
            "torch.nn.CrossEntropyLoss() or quatcache.losses.MultipleNegativesRankingLoss()."
        )

    def configure_caches(self) -> CacheConfig | None:
        """Return how to cache; None: not at all."""
        return None

    def configure_metrics(self) -> Mapping[str, Metric]:
        """Return metrics by name, updated as ``metric.update(embeddings, *targets)``.

        They are logged as ``val_<name>`` and ``test_<name>``. Wrap a retrieval metric of torchmetrics in
        :class:`quatcache.metrics.EmbeddingRetrieval`.
        """
        return {}

    read_sample = staticmethod(read_sample)
    """Takes apart what the dataset returned; override it for samples of your own.

    Turn the sample into a supported kind and return :func:`quatcache.data.read_sample` of that. It runs in the workers
    of a loader: as a static method it travels there alone, as a method it takes the model along.
    """

    def configure_optimizers(self) -> Any:
        """Return AdamW over what is trainable, with the model's ``lr`` attribute if it has one, else 1e-3."""
        with passing_over(self._encoders_so_far()):  # what is not loaded is not trained
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise ModelDefinitionError(
                f"{type(self).__name__} has no trainable parameter; return a head with parameters, or an encoder with "
                "trainable = True."
            )
        return torch.optim.AdamW(trained, lr=getattr(self, "lr", 1e-3))

    # What Lightning calls

    def configure_callbacks(self) -> Sequence[Callback]:
        """Bring the cache along, unless the trainer was given a :class:`CacheCallback` by hand."""
        mine = self.cache_callback
        given = [callback for callback in self.trainer.callbacks if isinstance(callback, CacheCallback)]  # type: ignore[attr-defined]
        if any(not callback.brought_by_model for callback in given):  # one of another model is left from its run
            return []
        found = f"{type(self).__name__}.configure_caches returned"
        mine.config = checked_config(self.configure_caches(), found, ModelDefinitionError)
        return [] if mine in given else [mine]

    def forward(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Turn the inputs of a batch into embeddings.

        Args:
            inputs: For each encoder what it collated, or its rows where it is cached.

        Returns:
            What the head makes of the concatenated rows, ``(B, output size)``; a single encoder may give
            :class:`~quatcache.sequences.PaddedSequences`, which the head gets as they are.
        """
        return self.head(  # type: ignore[no-any-return]
            head_input({name: encoder(inputs[name]) for name, encoder in self.encoders.items()})
        )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Compute and log the loss of a batch."""
        return self._step("train", batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """Compute and log the loss of a batch, and update the metrics."""
        return self._step("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """Compute and log the loss of a batch, and update the metrics."""
        return self._step("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        """Compute the embeddings of a batch."""
        return self(batch.inputs)  # type: ignore[no-any-return]

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Give all modules, and so parameters; encoders that are not loaded are loaded first, unless Lightning asks.

        So an optimizer over ``self.parameters()`` has the same groups in a run that needs no encoder and in one that
        does.
        """
        waiting = [encoder for encoder in self._encoders_so_far() if not is_loaded(encoder)]
        with passing_over(waiting if waiting and looks_in_passing(self) else ()):
            found: list[tuple[str, nn.Module]] = list(super().named_modules(*args, **kwargs))
        return iter(found)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients; what is not loaded has none."""
        with passing_over(self._encoders_so_far()):
            super().zero_grad(set_to_none)

    def _encoders_so_far(self) -> Sequence[Encoder]:
        encoders = getattr(self, "encoders", None)
        return tuple(encoders.real().values()) if isinstance(encoders, EncoderDict) else ()

    # Use without a trainer

    def encode(self, items: Sequence[Any], batch_size: int = 32, show_progress_bar: bool = False) -> torch.Tensor:
        """Embed items with encoders and head.

        Args:
            items: N items.
            batch_size: Items per encoder call.
            show_progress_bar: Show a bar.

        Returns:
            Embeddings ``(N, output size)``.
        """
        return self.servable().encode(items, batch_size=batch_size, show_progress_bar=show_progress_bar)

    def servable(self) -> ServableModel:
        """Give what serves: the real encoders and the head, shared with this model."""
        return ServableModel(self.encoders.at_hand(), self.head)

    def save_servable(self, path: str | os.PathLike[str]) -> None:
        """Write encoders and head as safetensors and JSON; :meth:`ServableModel.load` reads them."""
        self.servable().save(path)

    # Parts

    def _assemble(self) -> None:
        encoders = self.configure_encoders()
        if isinstance(encoders, Encoder):
            encoders = {"default": encoders}
        found = f"{type(self).__name__}.configure_encoders returned"
        check_encoders(encoders, (Mapping,), found, "return an Encoder, or a dict of names to Encoders")
        for encoder in encoders.values():
            encoder.train()  # a frozen one goes to eval mode, with all its parts
        self.encoders = EncoderDict(encoders)
        size = sum(encoder.embedding_size for encoder in encoders.values())
        self.head = self._module("configure_head", size)
        expected = _input_size(self.head) if self._is_plain() else None
        if expected is not None and expected != size:
            raise ConfigError(f"the encoders give {size} values per item, the head takes {expected}; make them agree.")
        self.loss = self._module("configure_loss")

    def _is_plain(self) -> bool:
        """Whether the head is given the rows of all encoders, and nothing else."""
        return all(getattr(type(self), hook) is getattr(TrainableModel, hook) for hook in ("forward", "training_step"))

    def _module(self, hook: str, *args: Any) -> nn.Module:
        module = getattr(self, hook)(*args)
        if not isinstance(module, nn.Module):
            raise ModelDefinitionError(
                f"{type(self).__name__}.{hook} returned {shorten(module)}; return a torch.nn.Module."
            )
        return module

    def _step(self, stage: str, batch: Batch, batch_idx: int, dataloader_idx: int | None = None) -> torch.Tensor:
        if not isinstance(batch, Batch):
            self._refuse(batch, stage)
        embeddings = self(batch.inputs)
        loss = self._loss_of(embeddings, batch.targets)
        if dataloader_idx is None:
            self.loss_log.train(self, loss, len(embeddings), batch_idx)
        else:
            self.loss_log.evaluate(self, stage, loss, len(embeddings), batch_idx)
            for metric in self._metrics_of(dataloader_idx).values():
                metric.update(embeddings.detach(), *batch.targets)
        return loss

    def _refuse(self, batch: Any, stage: str) -> NoReturn:
        """Say why a step did not get a Batch."""
        parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
        kind, number = type(batch).__name__, sum(isinstance(part, Batch) for part in parts)
        if number and stage == "train":
            raise LoaderError(given_together(number, kind))
        if number:
            raise LoaderError(
                f"a {stage} step got a {kind} of {number} Batches, which its loaders give together; combine them in "
                f"mode 'sequential', or override the step to take it."
            )
        raise ModelDefinitionError(
            f"{type(self).__name__} got an object of type {kind} instead of a Batch, so its CacheCallback is not "
            "there; end an overridden configure_callbacks with [*super().configure_callbacks(), ...]."
        )

    def _loss_of(self, embeddings: torch.Tensor, targets: tuple[Any, ...]) -> torch.Tensor:
        try:
            return self.loss(embeddings, *targets)  # type: ignore[no-any-return]
        except TypeError as error:
            if _takes(self.loss, 1 + len(targets)):
                raise
            pairs = len(targets) == len(("pairs", "labels", "subgroups"))
            called = (
                "pairs as loss(embeddings, pairs, labels, subgroups)" if pairs else "groups as loss(embeddings, groups)"
            )
            other = "quatcache.losses.MultipleNegativesRankingLoss()" if pairs else "torch.nn.CrossEntropyLoss()"
            raise ModelDefinitionError(
                f"the loss is called for {called}, which {type(self.loss).__name__} does not take; return one that "
                f"does from configure_loss, such as {other}, or give it samples of the other kind."
            ) from error

    def _metrics_of(self, dataloader_idx: int) -> dict[str, Metric]:
        while len(self._metrics) <= dataloader_idx:
            metrics = checked_metrics(self.configure_metrics())
            self._metrics.append({name: metric.clone().to(self.device) for name, metric in metrics.items()})
        return self._metrics[dataloader_idx]

    def _log_metrics(self, stage: str) -> None:
        several = len(getattr(self.trainer, f"num_{stage}_batches")) > 1  # earlier runs may have had more loaders
        for place, metrics in enumerate(self._metrics):
            suffix = f"/dataloader_idx_{place}" if several else ""
            for name, metric in metrics.items():
                if metric.update_called:
                    self.log(f"{stage}_{name}{suffix}", metric.compute(), prog_bar=True, add_dataloader_idx=False)
                metric.reset()


def _input_size(head: nn.Module) -> int | None:
    """Find out how many values per item a head takes; None: it does not show."""
    first: nn.Module = head
    while isinstance(first, nn.Sequential):
        parts = (part for part in first if not isinstance(part, nn.Dropout | nn.Identity))
        first = next(parts, nn.Identity())
    if isinstance(first, nn.Linear):
        return first.in_features or None  # a lazy one finds out when it is called
    declared = getattr(head, "input_embedding_size", None)
    return declared if isinstance(declared, int) else None


def _takes(module: nn.Module, number: int) -> bool:
    """Whether a module can be called with so many arguments, as far as that shows."""
    try:
        inspect.signature(module.forward).bind(*[None] * number)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True
