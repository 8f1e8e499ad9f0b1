"""The fill of one run: its stores opened, its datasets indexed, what is missing encoded, once among all processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

from quatcache.encoders import Encoder
from quatcache.errors import NotFrozenError, StoreError
from quatcache.progress import FillProgress, fill_progress
from quatcache.store import CacheDirectory, DiskStore
from quatcache.training.config import CacheConfig
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.distributed import Ranks
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import ChunkReader
from quatcache.training.lightning import LightningModule, Trainer
from quatcache.training.meeting import MetSamples
from quatcache.training.report import CacheReport
from quatcache.training.run_encoders import RunEncoders
from quatcache.training.shared_steps import SharedSteps
from quatcache.training.sharing import SharedFill
from quatcache.training.view_cost import tell_cost
from quatcache.training.views import as_views

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
        check: Called before items are encoded; sees that encoders are still those that made the rows.
        bring_back: Called before items are encoded; brings encoders to the device of the module.

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
        check: Callable[[], None],
        bring_back: Callable[[], None] = lambda: None,
    ) -> None:
        """Name the directory; nothing is read or made."""
        self.directory: CacheDirectory | None = None
        self._ranks = Ranks.of(trainer, config) if names else Ranks()
        path = self._ranks.temporary if config.save_dir is None else config.save_dir
        if path is not None:
            self.directory = CacheDirectory(path, verify_checksums=config.checksums, memory_map=config.memory_map)
        self._opened = RunEncoders(trainer, module, config, real, names, self.directory, check, bring_back)
        self.encoders: dict[str, EncoderFill] = self._opened.fills
        self._trainer = trainer
        self._module = module
        self._shared: SharedSteps | None = None
        self._config = config
        self._labels = config.decide_labels(names, real)
        self._read_sample = read_sample
        self.report = report
        self._kept: list[Any] = []  # datasets stay alive while their ids are keys
        self._known = 0
        self._met = False

    def add(
        self, datasets: Mapping[int, tuple[Any, str]], ahead: Callable[[int, DatasetFill], bool]
    ) -> tuple[dict[int, DatasetFill], dict[int, DatasetFill]]:
        """Take in datasets, and open the stores with the first of them.

        Args:
            datasets: Map-style datasets that were not indexed yet, each with what it is for.
            ahead: Says which are to be filled before the run.

        Returns:
            Those that are, and those whose rows are cached as they are met, under the same keys.

        Raises:
            NotFrozenError: An encoder is not frozen.
            ConfigError: A dataset that cannot be cached.
        """
        fills = {}
        for key, (dataset, name) in datasets.items():
            self._known += 1  # 0 is for streams
            seen = as_views(dataset, self._read_sample, self._config.num_views)
            fills[key] = DatasetFill(name, seen, self._read_sample, number=self._known)
            self._kept.append(dataset)
        whole = {key: fill for key, fill in fills.items() if ahead(key, fill)}
        if not self.encoders:
            # a budget, or a run that takes little, is there because not everything has room
            limited = self._config.max_size is not None or len(whole) < len(fills)
            capacity = 0 if limited else sum(len(fill.dataset) for fill in fills.values())
            self.report.labels, self.report.labels_reason = self._labels
            self._opened.open((fill.chunk_reader for fill in fills.values()), capacity)
        for fill in fills.values():
            fill.encoders, fill.targets = tuple(self.encoders.values()), self.report.labels
        return whole, {key: fill for key, fill in fills.items() if key not in whole}

    def stream_reader(self) -> ChunkReader:
        """Key the samples of an iterable dataset."""
        schemes = [replace(encoder.scheme, salt=None) for encoder in self.encoders.values()]  # it has no index
        return ChunkReader((), self._read_sample, schemes)

    def meet(self, fills: Mapping[int, DatasetFill]) -> None:
        """Find out what is known of datasets whose rows are cached as their samples are met.

        Raises:
            StaleRowsError: Stored rows are not what an encoder gives now.
        """
        if not self._met:
            self._met = True
            together = self._ranks.in_steps(self.directory)
            self._shared = None if together is None else SharedSteps(together, self._module.device)
            for encoder in self.encoders.values():
                encoder.shared = self._shared
        self._plan(fills)
        self._verify(fills)
        for fill in fills.values():
            fill.count_known()
        for encoder in self.encoders.values():
            if encoder.canary is not None and not fills:  # a stream shows its samples when they are met
                encoder.canary.begin(1)
        stores = self._disk_stores()
        if self.directory is not None and stores and self._opened.unwritable is None:
            try:
                self.directory.check_writable(stores)
            except StoreError as error:  # what is there can be read, and the rest be encoded in each step
                for encoder in self.encoders.values():
                    encoder.decline(error)

    def close(self) -> None:
        """Commit what was put while batches were met, and pack it; what cannot be kept is told, and is no error."""
        if not self._met:
            return
        try:
            self.flush()
            for store in self._disk_stores():
                store.compact()
            for encoder in self.encoders.values():
                encoder.note_effort()
                encoder.conclude()
        except (StoreError, NotFrozenError) as error:
            logger.warning("%s", error)
        self._warn_of_keys()

    def check_loaded(self, name: str) -> None:
        """Hold an encoder that was just loaded against what its rows were found by.

        Raises:
            StaleRowsError: It is another one.
        """
        self._opened.recall.check(name, self._opened.real[name])

    def note(self) -> None:
        """Note what was found out about models, for runs that need not load them."""
        if self._opened.unwritable is None:
            self._opened.recall.note()

    def flush(self) -> None:
        """Commit what was put.

        Raises:
            StoreError: The directory cannot be written.
            NotFrozenError: An encoder is not what it was.
        """
        for store in self._disk_stores():
            if store.pending:
                store.flush()

    def refresh(self) -> None:
        """Commit what was put, and take in what other processes have put."""
        for store in self._disk_stores():
            if any(encoder.declines for encoder in self.encoders.values()):
                return
            try:
                store.refresh()
            except StoreError as error:  # a full disk: what was committed is kept, and the rest stays in memory
                for encoder in self.encoders.values():
                    encoder.decline(error)

    def _warn_of_keys(self) -> None:
        for encoder in self.encoders.values():
            if encoder.extracted is not None:
                encoder.extracted.warn()

    def leave(self) -> None:
        """Let go of what the ranks of this run share for the time of it."""
        if self._shared is not None:
            self._shared.leave()
        self._ranks.close()

    def settle(self, met: MetSamples) -> None:
        """Keep the index table of a dataset whose samples were all met; that it cannot be kept is no error."""
        met.settle()
        if met.fill.targets_reason is not None:
            self.report.labels, self.report.labels_reason = False, met.fill.targets_reason
        if self.directory is not None and not any(encoder.declines for encoder in self.encoders.values()):
            try:
                self.flush()
                for store in self._disk_stores():
                    store.compact()
                met.fill.keep(self.directory)
            except StoreError as error:
                for encoder in self.encoders.values():
                    encoder.decline(error)

    def _disk_stores(self) -> list[DiskStore]:
        shared = {id(encoder.store): encoder.store for encoder in self.encoders.values()}  # encoders may share a store
        return [store for store in shared.values() if isinstance(store, DiskStore)]

    def fill(self, fills: Mapping[int, DatasetFill], context: Any) -> None:
        """Index datasets and encode what is missing of them.

        Args:
            fills: What :meth:`add` gave.
            context: How the workers of a fill are started; None: as the platform does.

        Raises:
            ConfigError: A dataset that cannot be cached.
            StoreError: Rows cannot be written.
            StaleRowsError: Stored rows are not what an encoder gives now.
        """
        with self._ranks.together(self.directory) as together:
            shared = None
            if together is not None:
                workers = self._config.num_workers or 0
                shared = SharedFill(together, tuple(fills.values()), self._config.batch_size, workers, context)
            self._fill(fills, context, shared)

    def _fill(self, fills: Mapping[int, DatasetFill], context: Any, shared: SharedFill | None) -> None:
        needed, helped = self._plan(fills), False
        if self._trainer.is_global_zero:
            tell_cost(fills.values())
        if needed and shared is not None and not shared.together.leads:
            self._verify(fills)
            self._share(shared, shared.help)
            needed, helped = self._plan(fills), True
        if not needed or self.directory is None:
            self._run(fills, context, verify=not helped)
            return
        stores = self._disk_stores()
        with ExitStack() as lock:
            try:
                lock.enter_context(self.directory.filling(stores))
            except StoreError as error:
                if not any(len(store) for store in stores):
                    raise
                self._opened.unwritable = error  # rows that are there can be read; raised if one must be encoded
                self._run(fills, context)
                return
            news = [store.refresh() for store in stores]
            if any(news):  # another process filled while this one waited
                self._plan(fills)
            with ExitStack() as kept:  # what was encoded before an error or Ctrl-C is kept
                for store in stores:
                    kept.callback(store.flush)
                if shared is not None and shared.together.leads and shared.total:
                    self._verify(fills)
                    self._share(shared, shared.lead)
                    helped = True
                self._run(fills, context, verify=not helped)
            for store in stores:
                try:
                    store.compact()
                except StoreError as error:  # every row is committed: packing can wait for the next run
                    logger.warning("%s Small shards are left as they are.", error)
            for encoder in self.encoders.values():
                encoder.note_effort()
            for fill in fills.values():
                fill.keep(self.directory)
            if shared is not None and shared.together.leads:
                shared.conclude()

    def _share(self, shared: SharedFill, work: Callable[[FillProgress], None]) -> None:
        """Do the share of this rank."""
        with ExitStack() as kept, self._progress(shared.total // shared.together.folder.size) as advance:
            for store in self._disk_stores():
                kept.callback(store.flush)
            work(advance)
        self.report.read += shared.read

    def _progress(self, total: int) -> AbstractContextManager[FillProgress]:
        shown = total > 0 and self._trainer.is_global_zero and self._trainer.progress_bar_callback is not None
        return fill_progress(total, shown)

    def _plan(self, fills: Mapping[int, DatasetFill]) -> int:
        return sum(fill.plan(self.directory) for fill in fills.values())

    def _verify(self, fills: Mapping[int, DatasetFill]) -> None:
        for fill in fills.values():
            fill.verify(len(fills))
        for encoder in self.encoders.values():
            encoder.conclude()

    def _run(self, fills: Mapping[int, DatasetFill], context: Any, *, verify: bool = True) -> None:
        if verify:
            self._verify(fills)
        total = sum(fill.to_read for fill in fills.values())
        with self._progress(total) as advance:
            for fill in fills.values():
                fill.run(self._config.batch_size, self._config.num_workers or 0, context, advance)
        self.report.read += total
        for fill in fills.values():
            if fill.targets_reason is not None:
                self.report.labels, self.report.labels_reason = False, fill.targets_reason
        self._warn_of_keys()
