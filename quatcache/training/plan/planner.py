"""What caching would cost and save, found out before anything is filled.

Keys are counted, a sample of items is encoded, and the rest is arithmetic. Nothing is written, and model, loaders and
random states are left as they were found: a fit after a plan is the fit that it would have been without.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from quatcache.data.samples import read_sample
from quatcache.encoders import Encoder, identify
from quatcache.encoders.calls import CallPlan
from quatcache.encoders.extracted import ExtractedKeys
from quatcache.encoders.frozen import prove_fixed
from quatcache.encoders.identity import autocast_of
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import ConfigError
from quatcache.store import CacheDirectory, DatasetTable, DiskStore, RowStore, TensorStore
from quatcache.training.command_line import command_line
from quatcache.training.config import CacheConfig, CacheType
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.guards import encoders_of
from quatcache.training.keying import unkeyable
from quatcache.training.lightning import LightningDataModule, LightningModule, Trainer, isolate_rng
from quatcache.training.memory import free_memory
from quatcache.training.placement import pick_tier
from quatcache.training.plan.counting import KeysOf, Rows, count, epoch_of, read_keys
from quatcache.training.plan.forecast import CachePlan, EncoderPlan
from quatcache.training.plan.rehearsal import (
    config_of,
    encoder_as_in,
    frozen_as_in,
    loaders_of,
    trainer_without_settings,
)
from quatcache.training.plan.trial import Timed, read_sample_chunks, time_encoder
from quatcache.training.views import as_views

__all__ = ["plan", "plan_from_config"]

SAMPLE = 256


def plan(
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    config: CacheConfig | None = None,
    sample: int = SAMPLE,
    epochs: int | None = None,
    trainer: Trainer | None = None,
    show_progress_bar: bool = True,
    time_func: Callable[[], float] = time.perf_counter,
) -> CachePlan:
    """Find out what caching the frozen encoders of a model would cost and save.

    Args:
        model: A :class:`~quatcache.TrainableModel`, or any LightningModule with ``encoders``.
        train_dataloaders: As ``Trainer.fit`` takes them; None: those of the data module or of the model's hooks.
        val_dataloaders: Likewise.
        datamodule: Where loaders come from; prepared and set up as a fit does it, in a copy.
        config: How it would be cached; None: as the model or the trainer's ``CacheCallback`` says.
        sample: Samples to encode, at least 1: a few seconds' worth make a good measure.
        epochs: How long a training to compare in the summary.
        trainer: The trainer of the fit to come, for its device and precision; None: one without settings.
        show_progress_bar: Show a bar where there is a terminal; it vanishes at the end.
        time_func: Clock in seconds, for tests.

    Returns:
        The plan.

    Raises:
        ConfigError: Nothing would be cached, or ``config`` does not fit the model.
        LoaderError: There are no loaders, or loaders whose batches could not be reproduced.

    Example:
        >>> from quatcache import TrainableModel
        >>> from quatcache.encoders import ModuleEncoder
        >>> class Classifier(TrainableModel):
        ...     def configure_encoders(self):
        ...         return ModuleEncoder(torch.nn.Linear(8, 4), torch.stack, embedding_size=4)
        ...     def configure_head(self, input_embedding_size):
        ...         return torch.nn.Linear(input_embedding_size, 3)
        ...     def configure_loss(self):
        ...         return torch.nn.CrossEntropyLoss()
        >>> samples = [(torch.eye(8)[i % 8], i % 3) for i in range(20)]
        >>> planned = plan(Classifier(), DataLoader(samples, batch_size=5), config=CacheConfig())
        >>> planned.encoders[0].items, planned.encoders[0].distinct, planned.total_bytes
        (20, 8, 128)
    """
    if sample < 1:
        raise ConfigError(f"sample is {sample}; give the number of samples to encode, at least 1.")
    trainer = trainer or trainer_without_settings()
    config = config or config_of(model, trainer)
    encoders = encoders_of(model)
    config.check_against({name: encoder.trainable for name, encoder in encoders.items()})
    names = [
        name
        for name, encoder in sorted(encoders.items())
        if not encoder.trainable and config.tier_of(name) is not CacheType.NONE
    ]
    if not names:
        raise ConfigError(
            f"none of the encoders of {type(model).__name__} would be cached: they are trainable or on tier NONE; set "
            "trainable = False on one, and give it another tier."
        )
    with isolate_rng(), ExitStack() as stack:
        loaders = stack.enter_context(loaders_of(model, train_dataloaders, val_dataloaders, datamodule, trainer))
        ready = {name: stack.enter_context(encoder_as_in(trainer, encoders[name])) for name in names}
        planner = _Planner(ready, loaders, getattr(model, "read_sample", read_sample), config, trainer, time_func)
        return planner.plan(sample, epochs, show_progress_bar)


def plan_from_config(arguments: Sequence[str]) -> CachePlan:
    """Plan for the model and the data that a YAML file configures, as ``quatcache fit`` would train them.

    Args:
        arguments: What ``quatcache fit`` takes, for instance ``["--config", "configs/icd10.yaml"]``.

    Returns:
        The plan, for as many epochs as the trainer is configured for.

    Raises:
        MissingDependencyError: jsonargparse is not installed.
        SystemExit: The arguments cannot be parsed, or help was asked for.
    """
    with isolate_rng():
        built = command_line(arguments, run=False)
        epochs = built.trainer.max_epochs
        return plan(
            built.model,
            datamodule=built.datamodule,
            config=config_of(built.model, built.trainer, "set cache in the configuration"),
            trainer=built.trainer,
            epochs=epochs if epochs and epochs > 0 else None,
        )


class _Unmarked(CacheDirectory):
    """A directory that takes no note of what was of use: a plan uses nothing."""

    def mark_used(self, table: DatasetTable) -> None:
        """Do nothing."""


@dataclass
class _Planner:
    """One plan being made.

    Attributes:
        encoders: Those that would be cached, on the device and in the dtype of a fit.
        loaders: All loaders of a fit, each with what it is for.
        reader: Takes a sample apart.
        config: How to cache.
        trainer: Of the fit to come.
        time_func: Clock in seconds.
    """

    encoders: Mapping[str, Encoder]
    loaders: Sequence[tuple[DataLoader[Any], str]]
    reader: Callable[[Any], Any]
    config: CacheConfig
    trainer: Trainer
    time_func: Callable[[], float]

    def plan(self, sample: int, epochs: int | None, show_progress_bar: bool) -> CachePlan:
        """Count, read and encode."""
        config, directory = self.config, None
        if config.save_dir is not None:
            directory = _Unmarked(config.save_dir, verify_checksums=config.checksums, memory_map=config.memory_map)
        datasets = self._datasets()
        encoders = self._encoders(datasets, directory)
        for data in datasets:
            data.fill.encoders = encoders
            data.fill.plan(directory)

        total = min(sample, sum(len(data.fill.dataset) for data in datasets))
        with _progress(show_progress_bar) as bar:
            reading = bar.add_task("Reading keys", total=sum(data.unknown for data in datasets))
            encoding = bar.add_task("Encoding a sample", total=None)
            read_keys(datasets, partial(bar.advance, reading), self.time_func)
            started = self.time_func()
            chunks = read_sample_chunks(datasets, total, config.batch_size)
            read_seconds = (self.time_func() - started) / total * sum(data.fill.to_read for data in datasets)
            bar.update(encoding, total=2 * len(encoders) * sum(len(chunk.items) for chunk, _ in chunks))
            advance = partial(bar.advance, encoding)
            timed = [
                time_encoder(fill, chunks, config.batch_size, config.storage_dtype, advance, self.time_func)
                for fill in encoders
            ]

        rows: dict[int, Rows] = {}
        parts = []
        for fill, seconds in zip(encoders, timed, strict=True):
            shared = rows.setdefault(id(fill.store), Rows(fill.store))
            parts.append(self._part(fill, datasets, shared, seconds))
            for data in datasets:
                shared.plan(data.in_table(fill.name))
                shared.plan(data.sampled(fill.name))
        return CachePlan(
            tuple(parts),
            total,
            config.batch_size,
            read_seconds,
            None if directory is None else str(directory.path),
            None if directory is None else _disk_free(directory.path),
            free_memory(),
            epochs,
        )

    def _datasets(self) -> list[KeysOf]:
        """Give each dataset once: loaders may share one."""
        of: dict[int, list[tuple[DataLoader[Any], str]]] = {}
        for loader, name in self.loaders:
            of.setdefault(id(loader.dataset), []).append((loader, name))
        return [
            KeysOf(
                DatasetFill(
                    loaders[0][1],
                    as_views(loaders[0][0].dataset, self.reader, self.config.num_views),
                    self.reader,
                    number=number,
                ),
                [epoch_of(loader, self.config.batch_size) for loader, _ in loaders],
            )
            for number, loaders in enumerate(of.values())
        ]

    def _encoders(self, datasets: Sequence[KeysOf], directory: CacheDirectory | None) -> list[EncoderFill]:
        """Open what is stored of each encoder."""
        fills = []
        stores: dict[object, RowStore] = {}
        for name, encoder in self.encoders.items():
            prove_fixed(name, encoder)
            scheme = KeyScheme.of(name, encoder, self.config.extractor_of(name))
            if unkeyable(scheme, [data.fill.chunk_reader for data in datasets]) is not None:
                scheme = scheme.by_index()
            own: object = (id(encoder), scheme.salt)
            if directory is None or scheme.salt is not None:
                stores.setdefault(own, TensorStore())
            else:
                identity = identify(encoder, autocast=autocast_of(str(self.trainer.precision)))
                own = identity.digest
                if own not in stores:
                    stores[own] = directory.store(identity.digest, identity.facts, self.config.storage_dtype)
            fills.append(
                EncoderFill(
                    name,
                    scheme,
                    stores[own],
                    partial(frozen_as_in, self.trainer, name, encoder),
                    CallPlan(name, encoder, self.trainer.strategy.root_device),
                    extracted=None if scheme.extractor is None else ExtractedKeys(scheme),
                )
            )
        return fills

    def _part(self, fill: EncoderFill, datasets: Sequence[KeysOf], rows: Rows, timed: Timed) -> EncoderPlan:
        """Put together what was found out about one encoder."""
        together, new = count(fill.name, datasets, fill.name, rows)
        values = timed.values
        row_bytes = values * timed.stored_dtype.itemsize
        others = {timed.given_dtype, torch.float16, torch.bfloat16} if timed.given_dtype.is_floating_point else set()
        tier, reason = self.config.tier_of(fill.name), ""
        if tier is CacheType.AUTO:
            disk = isinstance(fill.store, DiskStore) and self.config.memory_map
            placed = fill.store.nbytes + together.to_encode * row_bytes  # rows of other datasets come along
            tier, reason = pick_tier(placed, self.trainer.strategy.root_device, disk=disk)
        items = sum(data.items_per_epoch for data in datasets)
        return EncoderPlan(
            **vars(together),
            datasets=tuple(count(data.fill.name, [data], fill.name, rows)[0] for data in datasets),
            row_shape=timed.row_shape,
            dtype=_name(timed.stored_dtype),
            row_bytes=row_bytes,
            total_bytes=new * row_bytes,
            bytes_by_dtype={_name(dtype): new * values * dtype.itemsize for dtype in sorted(others, key=_name)},
            tier=tier.name,
            tier_reason=reason,
            source=str(fill.store.directory) if isinstance(fill.store, DiskStore) else None,
            fill_seconds=together.to_encode * timed.fill,
            epoch_seconds=items * timed.uncached,
            cached_epoch_seconds=items * timed.cached,
        )


def _progress(shown: bool) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    )
    bar.disable = not (shown and bar.console.is_terminal)
    return bar


def _disk_free(path: Path) -> int:
    """Count the bytes free where a directory is, or will be."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
