"""The encoders of one run that are cached: their stores opened, and made ready when something must be encoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from quatcache.data.devices import to_device
from quatcache.encoders import Encoder, Identity
from quatcache.encoders.calls import CallPlan
from quatcache.encoders.extracted import ExtractedKeys
from quatcache.encoders.frozen import FrozenEncoder, prove_fixed
from quatcache.encoders.identity import autocast_of
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.encoders.opening import canary_for, open_rows
from quatcache.encoders.recall import Recall
from quatcache.errors import NotFrozenError, StoreError
from quatcache.store import CacheDirectory, RowStore, TensorStore
from quatcache.training.config import CacheConfig
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import ChunkReader, unkeyable
from quatcache.training.lightning import LightningModule, Trainer

__all__ = ["RunEncoders"]

logger = logging.getLogger(__name__)


class RunEncoders:
    """Opens the rows of the encoders of one run.

    Args:
        trainer: The trainer of the run.
        module: Its device is where encoders compute.
        config: How to cache.
        real: All encoders of the module, by name.
        names: Those that are cached.
        directory: Where rows persist; None: nowhere.
        check: Called before items are encoded; sees that encoders are still those that made the rows.
        bring_back: Called before items are encoded; brings encoders to the device of the module.

    Attributes:
        real: All encoders of the module.
        fills: The encoders that are cached, once they were opened.
        unwritable: Why nothing can be written; raised when an item must be encoded in a fill.
        recall: Knows encoders that are not loaded.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        config: CacheConfig,
        real: Mapping[str, Encoder],
        names: Sequence[str],
        directory: CacheDirectory | None,
        check: Callable[[], None],
        bring_back: Callable[[], None] = lambda: None,
    ) -> None:
        """Open nothing yet."""
        self.fills: dict[str, EncoderFill] = {}
        self.unwritable: StoreError | None = None
        self._trainer = trainer
        self._module = module
        self._config = config
        self.real = real
        self._names = names
        self._directory = directory
        self._check = check
        self._bring_back = bring_back
        self._frozen: dict[str, FrozenEncoder] = {}
        self._identities: dict[str, Identity] = {}
        known = None if directory is None or config.save_dir is None else directory.models
        self.recall = Recall(known, autocast_of(str(trainer.precision)))

    def open(self, readers: Iterable[ChunkReader], capacity: int) -> None:
        """Open a store for every encoder to be cached.

        Args:
            readers: The datasets that are known, whose first items show how they can be keyed.
            capacity: Rows to make room for in memory.

        Raises:
            NotFrozenError: An encoder is not frozen.
            FormatError: A store is of a newer version.
            StoreError: A store cannot be read.
        """
        readers = list(readers)
        device = self._module.device
        stores: dict[object, RowStore] = {}  # encoders of one identity share their rows
        for name in self._names:
            encoder = self.real[name]
            prove_fixed(name, encoder)
            scheme = KeyScheme.of(name, encoder, self._config.extractor_of(name))
            reason = unkeyable(scheme, readers)
            if reason is not None:
                scheme = scheme.by_index()
                logger.warning(
                    "Encoder %r: %s Until then rows are found by index: for this run only, duplicates encoded each.",
                    name,
                    reason,
                )
            if self._directory is None or reason is not None:
                own: object = (id(encoder), scheme.salt)
                stores.setdefault(own, TensorStore(dtype=self._config.storage_dtype, capacity=capacity))
            else:
                identity = self._identities[name] = self._identity(name)
                own = identity.digest
                if own not in stores:
                    stores[own] = store = open_rows(name, identity, self._directory, self._config.storage_dtype, device)
                    store.before_commit = self._see_identities
            self.fills[name] = EncoderFill(
                name,
                scheme,
                stores[own],
                partial(self._encoder_to_fill, name),
                CallPlan(name, encoder, device),
                extracted=None if scheme.extractor is None else ExtractedKeys(scheme),
                canary=canary_for(
                    name,
                    stores[own],
                    partial(self._frozen_encoder, name),
                    partial(_dtypes, encoder),
                    device,
                    precision=str(self._trainer.precision),
                    verify=self._config.verify,
                    batch_size=self._config.batch_size,
                ),
                dtype=self._config.storage_dtype,
                max_size=self._config.max_size,  # type: ignore[arg-type]  # a number since it was checked
                on_miss=self._config.on_miss,
                persists=self._config.save_dir is not None,
            )

    def _identity(self, name: str) -> Identity:
        return self.recall.identity(name, self.real[name])

    def _see_identities(self) -> None:
        """See that the encoders still are what their rows are stored under: rows of others must not be.

        Raises:
            NotFrozenError: One was changed.
        """
        for name, identity in self._identities.items():
            now = self._identity(name)
            if now.digest != identity.digest:
                raise NotFrozenError(
                    f"encoder {name!r} was changed while its rows were cached "
                    f"({'; '.join(identity.differences(now))}), so those since the last commit are not kept; change "
                    "it before the run, or return None from configure_caches()."
                )

    def _encoder_to_fill(self, name: str) -> FrozenEncoder:
        if self.unwritable is not None:
            raise self.unwritable
        self._check()
        return self._frozen_encoder(name)

    def _frozen_encoder(self, name: str) -> FrozenEncoder:
        """Make the real encoder ready, the first time that an item must be encoded."""
        self._bring_back()
        if name not in self._frozen:
            precision, device = self._trainer.precision_plugin, self._module.device
            self._frozen[name] = FrozenEncoder(
                name,
                self.real[name],
                place=lambda inputs: to_device(precision.convert_input(inputs), device),
                context=precision.forward_context,
            )
        return self._frozen[name]


def _dtypes(encoder: Encoder) -> set[torch.dtype]:
    return {tensor.dtype for tensor in encoder.parameters()}
