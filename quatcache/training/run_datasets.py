"""What is known of the datasets of one run: indexed whole before it, or as their samples are met.

A dataset is known by its identity as an object: two loaders over the same one share what is known, and a dataset that
a hook makes anew is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from quatcache.data.batches import CachedColumns
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.lightning import Trainer, isolate_rng
from quatcache.training.loaders import Meeting
from quatcache.training.meeting import Meetings, MetSamples
from quatcache.training.run_fill import RunFill
from quatcache.training.views import ViewChoice, Views

__all__ = ["RunDatasets"]


class RunDatasets:
    """Knows which rows belong to the samples of each dataset of a run.

    Args:
        trainer: The trainer of the run.
        fill: Its fill, which keeps the datasets alive: their ids are the keys here.
        batch_size: Items per encoder call, at most, where samples are met.
        settled: Called when all samples of a dataset have been met.

    Attributes:
        columns: What is cached of each dataset, by id.
        meetings: Answers for the samples that batches meet.
    """

    def __init__(self, trainer: Trainer, fill: RunFill, batch_size: int, settled: Callable[[], None]) -> None:
        """Know nothing yet."""
        self._trainer = trainer
        self._fill = fill
        self._settled = settled
        self.columns: dict[int, CachedColumns] = {}
        self.meetings = Meetings(fill.encoders, batch_size)
        self._fills: dict[int, DatasetFill] = {}
        self._met: dict[int, MetSamples] = {}
        self._choices: list[ViewChoice] = []

    @property
    def rows_are_coming(self) -> bool:
        """Whether rows come while a model trains: of samples that were not met yet, or of streams."""
        return bool(self._met) or not self.columns

    @property
    def rows_are_complete(self) -> bool:
        """Whether every sample has a row, so that no encoder is needed."""
        return not self.rows_are_coming and all(columns.complete for columns in self.columns.values())

    def settle(self, fills: Mapping[int, DatasetFill]) -> None:
        """Take over what is known of datasets that are indexed whole."""
        self._fills.update(fills)
        for key, fill in fills.items():
            self.columns[key] = fill.columns()

    def meet(self, fills: Mapping[int, DatasetFill]) -> None:
        """Index datasets as their samples are met; it may be that all were met in earlier runs."""
        self._fills.update(fills)
        for key, fill in fills.items():
            met = MetSamples(fill)
            self.columns[key] = met.columns
            self._met[key] = self.meetings.met[fill.number] = met

    def settle_met(self) -> None:
        """Keep what was met of every dataset whose samples were all met."""
        for key in list(self._met):
            self._settle_if_met(key)

    def _settle_if_met(self, key: int) -> None:
        met = self._met.get(key)
        if met is not None and met.complete:
            self._forget_met(key)
            self._fill.settle(met)
            self.columns[key] = met.fill.columns()
            self._settled()

    def _forget_met(self, key: int) -> None:
        del self.meetings.met[self._met.pop(key).fill.number]

    def forget_if_edited(self, key: int) -> None:
        """Look again at a dataset that is asked for anew: a reload hook may have edited it in place."""
        if key not in self.columns:
            return
        self._settle_if_met(key)
        with isolate_rng():
            if key not in self._met and self._fills[key].still_holds():
                return
        del self.columns[key]
        if key in self._met:
            self._forget_met(key)

    def known(self, loader: DataLoader[Any]) -> tuple[CachedColumns | None, Meeting | None]:
        """Say what is cached of the dataset of a loader, and how what is not comes to be."""
        if isinstance(loader.dataset, IterableDataset):
            return None, Meeting(self._fill.stream_reader())
        key = id(loader.dataset)
        columns, met = self.columns[key], self._met.get(key)
        if met is None and columns.complete:
            return columns, None
        if met is not None and loader.num_workers:
            met.share()
        return columns, Meeting(self._fills[key].chunk_reader, partial(self._columns_now, key))

    def _columns_now(self, key: int) -> CachedColumns:
        """Give what is known of a dataset at the start of an epoch."""
        if key in self._met and self._trainer.world_size > 1:  # other ranks have met other samples
            self._fill.refresh()
        self._settle_if_met(key)
        return self._met[key].columns if key in self._met else self.columns[key]

    def views(self, key: int, name: str) -> tuple[Views, ViewChoice] | None:
        """Choose among the views of a dataset: in training by epoch, else always the same.

        Args:
            key: The id of the dataset.
            name: What its loader is for.

        Returns:
            The dataset in views, and what chooses them; None: it gives the same items each time.
        """
        views = self._fills[key].dataset if key in self._fills else None
        if not isinstance(views, Views):
            return None
        choice = ViewChoice(views.count)
        if name.split()[0] == "train":
            self._choices.append(choice)
        return views, choice

    def choose_views(self) -> None:
        """Let training go on with the views of its epoch."""
        for choice in self._choices:
            # as Lightning tells samplers; after a resume current_epoch lags behind when loaders are asked for iterators
            choice.begin(self._trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
