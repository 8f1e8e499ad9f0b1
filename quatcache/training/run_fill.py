"""The fill of one run: its stores opened, its datasets indexed, what is missing encoded, once among all processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from quatcache.encoders import Encoder, identify
from quatcache.encoders.frozen import FrozenEncoder, prove_fixed
from quatcache.encoders.identity import autocast_of
from quatcache.encoders.weights import to_device
from quatcache.errors import StoreError
from quatcache.store import CacheDirectory, DiskStore, RowStore, TensorStore
from quatcache.training.config import CacheConfig
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.extracted import ExtractedKeys
from quatcache.training.keying import KeyScheme, unkeyable
from quatcache.training.lightning import LightningModule, Trainer
from quatcache.training.opening import canary_for, open_rows
from quatcache.training.progress import fill_progress
from quatcache.training.report import CacheReport

__all__ = ["RunFill"]

logger = logging.getLogger(__name__)


class RunFill:
    """Fills the caches of one run of a trainer, dataset by dataset as they come to be known.

    Args:
        trainer: The trainer of the run.
        module: Its device is where encoders compute.
        config: How to cache.
        real: All encoders of the module, by name.
        names: Those that are cached.
        read_sample: Takes a sample apart.
        report: Told what was done.

    Attributes:
        encoders: The encoders that are cached, once the first dataset was indexed.
        directory: Where rows persist; None: nowhere.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        config: CacheConfig,
        real: Mapping[str, Encoder],
        names: Sequence[str],
        read_sample: Callable[[Any], Any],
        report: CacheReport,
    ) -> None:
        """Name the directory; nothing is read or made."""
        self.encoders: dict[str, EncoderFill] = {}
        self.directory: CacheDirectory | None = None
        if config.save_dir is not None:
            self.directory = CacheDirectory(
                config.save_dir, verify_checksums=config.checksums, memory_map=config.memory_map
            )
        self._trainer = trainer
        self._module = module
        self._config = config
        self._real = real
        self._names = names
        self._read_sample = read_sample
        self.report = report
        self._frozen: dict[str, FrozenEncoder] = {}
        self._kept: list[Any] = []  # datasets stay alive while their ids are keys
        self._known = 0
        self._unwritable: StoreError | None = None

    def fill(self, fresh: Mapping[int, tuple[DataLoader[Any], str]]) -> dict[int, DatasetFill]:
        """Index datasets and encode what is missing of them.

        Args:
            fresh: Loaders of datasets that were not indexed yet, each with what it is for.

        Returns:
            The datasets, under the same keys.

        Raises:
            NotFrozenError: An encoder is not frozen.
            ConfigError: A dataset that cannot be cached.
            StoreError: Rows cannot be written.
        """
        fills = {}
        for key, (loader, name) in fresh.items():
            fills[key] = DatasetFill(name, loader.dataset, self._read_sample, number=self._known)
            self._kept.append(loader.dataset)
            self._known += 1
        if not self.encoders:
            self._open(list(fills.values()))
        for fill in fills.values():
            fill.encoders, fill.targets = tuple(self.encoders.values()), self.report.labels
        context = next(iter(fresh.values()))[0].multiprocessing_context
        if not self._plan(fills) or self.directory is None:
            self._run(fills, context)
            return fills
        shared = {id(encoder.store): encoder.store for encoder in self.encoders.values()}  # encoders may share a store
        stores = [store for store in shared.values() if isinstance(store, DiskStore)]
        with ExitStack() as lock:
            try:
                lock.enter_context(self.directory.filling(stores))
            except StoreError as error:
                if not any(len(store) for store in stores):
                    raise
                self._unwritable = error  # rows that are there can be read; raised if one must be encoded
                self._run(fills, context)
                return fills
            news = [store.refresh() for store in stores]
            if any(news):  # another process filled while this one waited
                self._plan(fills)
            with ExitStack() as kept:  # what was encoded before an error or Ctrl-C is kept
                for store in stores:
                    kept.callback(store.flush)
                self._run(fills, context)
            for store in stores:
                try:
                    store.compact()
                except StoreError as error:  # every row is committed: packing can wait for the next run
                    logger.warning("%s Small shards are left as they are.", error)
            for encoder in self.encoders.values():
                encoder.note_effort()
            for fill in fills.values():
                fill.keep(self.directory)
        return fills

    def _plan(self, fills: Mapping[int, DatasetFill]) -> int:
        return sum(fill.plan(self.directory) for fill in fills.values())

    def _run(self, fills: Mapping[int, DatasetFill], context: Any) -> None:
        for fill in fills.values():
            fill.verify(len(fills))
        for encoder in self.encoders.values():
            encoder.conclude()
        total = sum(fill.to_read for fill in fills.values())
        shown = total > 0 and self._trainer.is_global_zero and self._trainer.progress_bar_callback is not None
        with fill_progress(total, shown) as advance:
            for fill in fills.values():
                fill.run(self._config.batch_size, self._config.num_workers or 0, context, advance)
        self.report.read += total
        for fill in fills.values():
            if fill.targets_reason is not None:
                self.report.labels, self.report.labels_reason = False, fill.targets_reason
        for encoder in self.encoders.values():
            if encoder.extracted is not None:
                encoder.extracted.warn()

    def _open(self, fills: list[DatasetFill]) -> None:
        """Open a store for every encoder to be cached, and decide on labels."""
        self.report.labels, self.report.labels_reason = self._config.decide_labels(self._names, self._real)
        items, device = sum(len(fill.dataset) for fill in fills), self._module.device
        stores: dict[object, RowStore] = {}  # encoders of one identity share their rows
        for name in self._names:
            encoder = self._real[name]
            prove_fixed(name, encoder)
            scheme = KeyScheme.of(name, encoder, self._config.extractor_of(name))
            reason = unkeyable(scheme, [fill.chunk_reader for fill in fills])
            if reason is not None:
                scheme = scheme.by_index()
                logger.warning(
                    "Encoder %r: %s Until then rows are found by index: for this run only, duplicates encoded each.",
                    name,
                    reason,
                )
            if self.directory is None or reason is not None:
                own: object = (id(encoder), scheme.salt)
                stores.setdefault(own, TensorStore(dtype=self._config.storage_dtype, capacity=items))
            else:
                identity = identify(encoder, autocast=autocast_of(str(self._trainer.precision)))
                own = identity.digest
                if own not in stores:
                    stores[own] = open_rows(name, identity, self.directory, self._config.storage_dtype, device)
            self.encoders[name] = EncoderFill(
                name,
                scheme,
                stores[own],
                partial(self._encoder_to_fill, name),
                encoder.length,
                extracted=None if scheme.extractor is None else ExtractedKeys(scheme),
                canary=canary_for(
                    name,
                    stores[own],
                    self._config,
                    partial(self._frozen_encoder, name),
                    {tensor.dtype for tensor in encoder.parameters()},
                    self._trainer,
                    device,
                ),
            )

    def _encoder_to_fill(self, name: str) -> FrozenEncoder:
        if self._unwritable is not None:
            raise self._unwritable
        return self._frozen_encoder(name)

    def _frozen_encoder(self, name: str) -> FrozenEncoder:
        """Make the real encoder ready, the first time that an item must be encoded."""
        if name not in self._frozen:
            precision, device = self._trainer.precision_plugin, self._module.device
            self._frozen[name] = FrozenEncoder(
                name,
                self._real[name],
                place=lambda inputs: to_device(precision.convert_input(inputs), device),
                context=precision.forward_context,
            )
        return self._frozen[name]
