"""One run of a trainer with cached encoders: from the fill to the moment everything is as it was.

The session owns what a run needs and nothing of it outlives the run: the stores, the datasets it has indexed, the
converted loader sources, and the encoders that stand aside.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from quatcache.data.batches import BatchReader, CachedColumns
from quatcache.data.samples import read_sample
from quatcache.encoders import Encoder
from quatcache.encoders.cached import CachedEncoder
from quatcache.errors import LoaderError, NotFrozenError
from quatcache.training.config import CacheConfig, CacheType
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.gathering import RowGatherer
from quatcache.training.guards import FrozenGuard, encoders_of, leave_to_ranks, refuse_transfer_hooks
from quatcache.training.lightning import LightningModule, Trainer, isolate_rng
from quatcache.training.loaders import MemoryLoader, checked_loader, convert_loader, replace_rows
from quatcache.training.placement import Placement, place_rows
from quatcache.training.receipt import Receipt
from quatcache.training.report import CacheReport
from quatcache.training.run_fill import RunFill
from quatcache.training.sources import LoaderSources

__all__ = ["CacheSession"]

logger = logging.getLogger(__name__)


class CacheSession:
    """Caches the frozen encoders of a model for one run of a trainer.

    Args:
        trainer: The trainer, in ``setup`` or later.
        module: A LightningModule with ``encoders``: a mapping of names to encoders.
        config: How to cache; None: not at all, the loaders then only collate through the encoders.

    Attributes:
        report: What was done.

    Raises:
        ModelDefinitionError: The module has no encoders.
        ConfigError: The config does not fit the model or the machine.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, config: CacheConfig | None) -> None:
        """Check everything that can be checked before data is read, and put converting sources in place."""
        self.report = CacheReport()
        self._trainer = trainer
        self._module = module
        self._config = config or CacheConfig(CacheType.NONE)
        self._encoders = encoders_of(module)
        self._real: dict[str, Encoder] = dict(self._encoders)
        self._config.check_against({name: encoder.trainable for name, encoder in self._real.items()})
        self._cached = [
            name
            for name, encoder in sorted(self._real.items())
            if not encoder.trainable and self._config.tier_of(name) is not CacheType.NONE
        ]
        self._fill = RunFill(trainer, module, self._config, self._real, self._cached, self._reader, self.report)
        self._columns: dict[int, CachedColumns] = {}
        self._datasets: dict[int, DatasetFill] = {}
        self._handed_out: set[int] = set()
        self.sources = LoaderSources(trainer, self._convert)
        leave_to_ranks(module, self._real)
        self._quiet: list[Any] = []
        self._gather = RowGatherer(self.look)
        self.receipt = Receipt(trainer, self.report, self._gather)
        self.guard = FrozenGuard({name: self._real[name] for name in self._cached})
        if self._cached:
            refuse_transfer_hooks(module, trainer)

    @property
    def _reader(self) -> Callable[[Any], Any]:
        return getattr(self._module, "read_sample", read_sample)

    def prepare(self) -> None:
        """Fill for all loaders of a fit in one pass; the loops get them converted when they ask."""
        loaders = [(checked_loader(loader, name), name) for loader, name in self.sources.request()]
        if self._cached:
            self._index(loaders)

    def _convert(self, loader: Any, name: str) -> DataLoader[Any]:
        """Give the loader that takes the place of one of the user's."""
        checked = checked_loader(loader, name)
        if not self._cached or self._gather.aside:
            return convert_loader(checked, self._collates(self._real), self._reader, None, None)
        key = id(checked.dataset)
        if key in self._handed_out and not self._datasets[key].still_holds():
            del self._columns[key]  # a reload hook edited the dataset in place
        self._index([(checked, name)])
        self._handed_out.add(key)
        others = self._collates([name for name in self._real if name not in self._cached])
        plain = partial(self._plain_reader, checked.dataset)
        converted = convert_loader(checked, others, self._reader, self._columns[key], self._gather, plain)
        if isinstance(converted, MemoryLoader):  # Lightning advises workers for it; it reads nothing they could read
            warnings.filterwarnings("ignore", message=f".*'{name.split()[0]}_dataloader' does not have many workers")
            self._quiet.append(warnings.filters[0])
        return converted

    def _collates(self, names: Iterable[str]) -> dict[str, Callable[[Sequence[Any]], Any]]:
        return {name: self._real[name].collate_fn() for name in names}

    def _plain_reader(self, dataset: Any) -> BatchReader:
        return BatchReader(dataset, self._collates(self._real), self._reader)

    def begin_epoch(self) -> None:
        """See that the encoders are still those that filled the cache, and note when a training epoch starts.

        Raises:
            NotFrozenError: The weights of one were changed.
        """
        if not self._gather.aside:
            self.guard.check_unchanged()
            self.receipt.begin_epoch()

    def look(self, batch: Any = None) -> None:
        """Step aside if an encoder was unfrozen since the last look.

        Args:
            batch: What the loaders gave for the step that follows; it gets what the real encoders take.

        Raises:
            NotFrozenError: An encoder was unfrozen under DDP, which was told to leave frozen encoders alone.
        """
        unfrozen = None if self._gather.aside else self.guard.unfrozen()
        if unfrozen is None:
            return
        name, parameter = unfrozen
        if self._trainer.world_size > 1:
            raise NotFrozenError(
                f"encoder {name!r} was unfrozen in the middle of a cached run on {self._trainer.world_size} processes "
                f"(parameter {parameter!r}), which would not agree on its gradients; train the last epochs in a fit of "
                "their own, with trainable = True."
            )
        logger.warning(
            "Encoder %r was unfrozen (parameter %r): the cache steps aside, and training goes on with the encoder "
            "itself and the samples that it reads.",
            name,
            parameter,
        )
        self._gather.aside = True
        self._put_back()
        if batch is None:
            return
        replace_rows(batch, self.sources.train_loaders(), self._trainer)

    def _index(self, loaders: list[tuple[DataLoader[Any], str]]) -> None:
        """Index the datasets that are not yet, encode what is missing, and put the rows where training wants them."""
        fresh: dict[int, tuple[DataLoader[Any], str]] = {}
        for loader, name in loaders:
            if isinstance(loader.dataset, IterableDataset):
                raise LoaderError(
                    f"the {name} loader reads an IterableDataset ({type(loader.dataset).__name__}), which has no index "
                    "to find rows by; use a map-style dataset, or return None from configure_caches()."
                )
            if id(loader.dataset) not in self._columns:
                fresh.setdefault(id(loader.dataset), (loader, name))
        if not fresh:
            return
        self.guard.check_unchanged()  # a reload hook may bring data after weights were changed
        started = time.monotonic()
        with isolate_rng():  # a fill must leave training the random numbers that it would have drawn
            fills = self._fill.fill(fresh)
        placed: dict[tuple[int, CacheType], Placement] = {}  # encoders may share a store
        for name, encoder in self._fill.encoders.items():
            asked = self._config.tier_of(name)
            place = id(encoder.store), asked
            if place not in placed:
                placed[place] = place_rows(
                    name, encoder.store, asked, self._module.device, memory_map=self._config.memory_map
                )
            self._gather.stores[name] = placed[place].store
            self.report.encoders[name] = encoder.report(placed[place])
        self._datasets.update(fills)
        self._columns.update({key: fill.columns() for key, fill in fills.items()})
        self.guard.remember()
        self._swap()
        self.report.fill_seconds += time.monotonic() - started
        logger.info(self.report.line())

    def _swap(self) -> None:
        for name in self._cached:
            if not isinstance(self._encoders[name], CachedEncoder):
                self._encoders[name] = CachedEncoder(self._real[name])

    def is_running_elsewhere(self, trainer: Trainer) -> bool:
        """Say whether another trainer is in the middle of the run that this session belongs to."""
        return self._trainer is not trainer and self._trainer.state.status == "running"

    def restore(self) -> None:
        """Put encoders and loader sources back, on the device where the module is now."""
        self.sources.restore()
        for entry in self._quiet:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
        self._put_back()

    def _put_back(self) -> None:
        for name in self._cached:
            if isinstance(self._encoders[name], CachedEncoder):
                self._encoders[name] = self._real[name].to(self._module.device)
