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

from quatcache.data.samples import read_sample
from quatcache.encoders import Encoder
from quatcache.encoders.cached import CachedEncoder
from quatcache.encoders.deferred import is_loaded
from quatcache.errors import NotFrozenError
from quatcache.store.transfer import fetches
from quatcache.training.averaging import keep_frozen
from quatcache.training.config import CacheConfig, CacheType
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.encoder_moves import EncoderMoves
from quatcache.training.extent import takes_little
from quatcache.training.gathering import RowGatherer
from quatcache.training.gathering_loaders import MemoryLoader
from quatcache.training.guards import (
    FrozenGuard,
    encoders_of,
    leave_to_ranks,
    refuse_collections,
    refuse_transfer_hooks,
)
from quatcache.training.internals import pass_profiler_by, restore_profiler, try_to_share_out
from quatcache.training.lightning import LightningModule, Trainer, isolate_rng
from quatcache.training.loaders import checked_loader, convert_loader, replace_rows
from quatcache.training.placement import Placement, place_rows, where_rows_come
from quatcache.training.receipt import Receipt
from quatcache.training.report import CacheReport
from quatcache.training.run_datasets import RunDatasets
from quatcache.training.run_fill import RunFill
from quatcache.training.sources import LoaderSources
from quatcache.training.views import Views

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
        cached = {name: self._real[name] for name in self._cached}
        self._moves = EncoderMoves(trainer, module, cached, self._encoders)
        back = self._moves.recall
        self._fill = RunFill(
            trainer, module, self._config, self._real, self._cached, self._reader, self.report, self._check, back
        )
        self._datasets = RunDatasets(trainer, self._fill, self._config.batch_size, self._place_and_tell)
        self._handed_out: set[tuple[int, str]] = set()
        self._placed: dict[str, Placement] = {}
        self._finished = False
        if self._cached:
            refuse_transfer_hooks(module, trainer)
        for name in self._real.keys() - set(self._cached):  # these are needed
            self._real[name].ensure_loaded()
        leave_to_ranks(module, self._real)
        self._waiting = {
            name: deferred for name in self._cached if (deferred := self._real[name]._deferred) is not None
        }
        for name, deferred in self._waiting.items():
            deferred.listeners.append(partial(self._see_loaded, name))
        self._quiet: list[Any] = []
        self._gather = RowGatherer(self.look, self._datasets.meetings.answer)
        self.receipt = Receipt(trainer, self.report, self._gather, self._seconds_of_kept)
        self.guard = FrozenGuard(cached)
        self.sources = LoaderSources(trainer, self._convert)  # last: nothing is exchanged before an error
        pass_profiler_by(trainer)

    @property
    def _reader(self) -> Callable[[Any], Any]:
        return getattr(self._module, "read_sample", read_sample)

    def prepare(self) -> None:
        """Fill for all loaders of a fit in one pass; the loops get them converted when they ask."""
        loaders = [(checked_loader(loader, name), name) for loader, name in self.sources.request()]
        refuse_collections(self._module, self.sources.given_together())
        if self._cached:
            self._index(loaders)

    def _convert(self, loader: Any, name: str) -> DataLoader[Any]:
        """Give the loader that takes the place of one of the user's."""
        checked = checked_loader(loader, name)
        if not self._cached or self._gather.aside:
            return convert_loader(checked, self._collates(self._real), self._reader, None, None)
        key = id(checked.dataset)
        if (key, name) in self._handed_out:
            self._datasets.forget_if_edited(key)
        self._index([(checked, name)])
        self._handed_out.add((key, name))
        others = self._collates([name for name in self._real if name not in self._cached])
        plain = partial(self._collates, self._real)
        columns, meeting = self._datasets.known(checked)
        views = self._datasets.views(key, name)
        converted = convert_loader(checked, others, self._reader, columns, self._gather, plain, meeting, views)
        if isinstance(converted, MemoryLoader):  # Lightning advises workers for it; it reads nothing they could read
            warnings.filterwarnings("ignore", message=f".*'{name.split()[0]}_dataloader' does not have many workers")
            self._quiet.append(warnings.filters[0])
        return converted

    def _collates(self, names: Iterable[str]) -> dict[str, Callable[[Sequence[Any]], Any]]:
        return {name: self._real[name].collate_fn() for name in names}

    def _see_loaded(self, name: str) -> None:
        """See that an encoder which is loaded only now is the one whose rows are used."""
        leave_to_ranks(self._module, self._real)
        self._fill.check_loaded(name)
        self.guard.check_unchanged()

    def _check(self) -> None:
        self.guard.check_in_step()

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
        self._datasets.choose_views()
        if self._gather.aside:
            replace_rows(batch, self._trainer)  # some of Lightning's fetchers are a batch ahead
            return
        unfrozen = self.guard.unfrozen()
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
        self._fill.flush()  # while the encoder is what it was
        self._let_go()
        self._put_back()
        replace_rows(batch, self._trainer)

    def _index(self, loaders: list[tuple[DataLoader[Any], str]]) -> None:
        """Index the datasets that are not yet, encode what is missing, and put the rows where training wants them.

        Streams have no index, and of what is used in small part only that part is encoded: their rows are cached as
        they are met.
        """
        fresh: dict[int, list[tuple[DataLoader[Any], str]]] = {}
        streams = False
        for loader, name in loaders:
            if isinstance(loader.dataset, IterableDataset):
                streams = True
                continue
            if id(loader.dataset) not in self._datasets.columns:
                fresh.setdefault(id(loader.dataset), []).append((loader, name))
        if not fresh and (self._fill.encoders or not streams):
            return
        self.guard.check_unchanged()  # a reload hook may bring data after weights were changed
        started = time.monotonic()
        with isolate_rng():  # a fill must leave training the random numbers that it would have drawn
            for loader, _ in (each for group in fresh.values() for each in group):
                try_to_share_out(self._trainer, loader)
            datasets = {key: (loaders[0][0].dataset, loaders[0][1]) for key, loaders in fresh.items()}
            whole, parts = self._fill.add(datasets, lambda key, fill: self._is_ahead(fresh[key], fill))
            if parts or streams:
                self._fill.meet(parts)
                self.report.met = True
            if streams and not fresh and not self._datasets.columns:
                self.report.labels, self.report.labels_reason = False, "a stream gives them in each epoch"
            if whole:
                self._fill.fill(whole, fresh[next(iter(whole))][0][0].multiprocessing_context)
            self._datasets.meet(parts)
        self._datasets.settle(whole)
        self._place()
        self._fill.note()
        self.guard.remember()
        self._swap()
        self.report.fill_seconds += time.monotonic() - started
        logger.info(self.report.line())

    def _is_ahead(self, loaders: Sequence[tuple[DataLoader[Any], str]], fill: DatasetFill) -> bool:
        """Say whether a dataset is filled before the run."""
        if self._config.on_miss == "error":
            return True
        views = fill.dataset.count if isinstance(fill.dataset, Views) else 1
        little = all(takes_little(self._trainer, loader, name, views) for loader, name in loaders)
        return self._config.fill == "eager" and not little

    def _place_and_tell(self) -> None:
        self._place()
        logger.info(self.report.line())

    def _place(self) -> None:
        """Put the rows where training wants them."""
        stay = self._datasets.rows_are_coming or self._finished
        device, ranks = self._module.device, self._trainer.num_devices
        self._gather.device = device if fetches(device) else None
        if not self._finished and self._datasets.rows_are_complete:
            self._moves.leave()  # before rows are placed: they may take the room
        placed: dict[tuple[int, CacheType], Placement] = {}  # encoders may share a store
        for name, encoder in self._fill.encoders.items():
            asked = self._config.tier_of(name)
            place = id(encoder.store), asked
            if place not in placed:
                memory_map = self._config.memory_map
                placed[place] = (
                    where_rows_come(encoder.store)
                    if stay or encoder.declines
                    else place_rows(name, encoder.store, asked, device, memory_map=memory_map, ranks=ranks)
                )
            self._gather.stores[name] = placed[place].store
            self._placed[name] = placed[place]
        self.tell()

    def _seconds_of_kept(self) -> float:
        return sum(encoder.fill_seconds for encoder in self._fill.encoders.values())

    def tell(self) -> None:
        """Bring the report up to date."""
        for name, placement in self._placed.items():
            self.report.encoders[name] = self._fill.encoders[name].report(placement)
            self.report.encoders[name].loaded = is_loaded(self._real[name])

    def _swap(self) -> None:
        for name in self._cached:
            if not isinstance(self._encoders[name], CachedEncoder):
                self._encoders[name] = CachedEncoder(self._real[name], self._moves)

    def keep_frozen(self) -> None:
        """Have averages of the weights keep frozen encoders as they are."""
        keep_frozen(self._trainer, self._real)

    def finish(self) -> None:
        """Commit the rows that were cached as they were met, and bring the report up to date."""
        self._finished = True
        self._datasets.settle_met()
        self._fill.close()
        self.tell()

    def is_running_elsewhere(self, trainer: Trainer) -> bool:
        """Say whether another trainer is in the middle of the run that this session belongs to."""
        return self._trainer is not trainer and self._trainer.state.status == "running"

    def restore(self) -> None:
        """Put encoders and loader sources back, on the device where the module is now."""
        self.guard.close()
        self.sources.restore()
        restore_profiler(self._trainer)
        for entry in self._quiet:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
        self._let_go()
        for deferred in self._waiting.values():
            deferred.listeners.clear()
        self._put_back()
        self.finish()
        self._fill.leave()

    def _let_go(self) -> None:
        """Give the memory of placed rows back, which the encoders may need."""
        self._gather.let_go()
        for name, placement in self._placed.items():
            self._placed[name] = placement._replace(store=self._fill.encoders[name].store)

    def _put_back(self) -> None:
        self._moves.end()
        for name in self._cached:
            if isinstance(self._encoders[name], CachedEncoder):
                self._encoders[name] = self._real[name].to(self._module.device)
