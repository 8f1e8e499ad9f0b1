"""Fits for the matrix of law 3: every way to bring loaders, with every way to sample them, cached or not."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)

from quatcache import CacheConfig, SimilarityPairSample
from quatcache.data import read_sample
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.training import encoder_fill
from tests.fits import Model, Texts, TrainableHashing, head_of, loader, texts, trainer
from tests.training.distributed_fit import be_rank

SIZE, DISTINCT = 44, 30


class Way(NamedTuple):
    """One cell of the matrix."""

    source: str
    sampler: str
    kind: str
    tier: str
    labels: object
    fill: str = "eager"

    @property
    def name(self):
        return "-".join(str(part) for part in self)


def group_samples():
    return Texts(texts(SIZE, DISTINCT))


def pair_samples():
    sides = zip(texts(SIZE, DISTINCT), texts(SIZE, 40)[::-1], strict=True)
    return [SimilarityPairSample(a, b, float(i % 4 > 0), i % 2) for i, (a, b) in enumerate(sides)]


class Stream(IterableDataset):
    """Samples shared out among workers and ranks."""

    def __init__(self, samples, rank, size):
        self.samples, self.rank, self.size = samples, rank, size

    def __iter__(self):
        worker = get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.samples[i] for i in range(self.rank + start * self.size, SIZE, step * self.size))


class Drawing(Sampler):
    """Batches drawn from the global generator, with repetitions."""

    def __len__(self):
        return 5

    def __iter__(self):
        return (torch.randint(SIZE, (7,)).tolist() for _ in range(5))


def weighted():
    return WeightedRandomSampler([1 + i % 3 for i in range(SIZE)], 40)


class LastFirst(BatchSampler):
    """Batches in the other order."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


SAMPLERS: dict[str, Callable[[object], DataLoader]] = {
    "shuffle": lambda data: loader(data, shuffle=True),
    "weighted": lambda data: loader(data, sampler=weighted()),
    "drop last, seeded": lambda data: loader(
        data, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3)
    ),
    "batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 9, False)),
    "own batches": lambda data: DataLoader(data, batch_sampler=Drawing()),
    "workers": lambda data: loader(data, shuffle=True, num_workers=1, persistent_workers=True),
}


ALIKE = {
    "shuffled": (
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 9, False)),
        lambda data: loader(data, batch_size=9, shuffle=True),
    ),
    "weighted": (
        lambda data: DataLoader(data, batch_sampler=BatchSampler(weighted(), 9, True)),
        lambda data: loader(data, batch_size=9, drop_last=True, sampler=weighted()),
    ),
    "a class of its own": (lambda data: DataLoader(data, batch_sampler=LastFirst(RandomSampler(data), 9, False)),),
}
"""A batch sampler of torch, and a loader that makes the same of a sampler; and one of which Lightning makes another."""


class SeveralLoaders(Model):
    """Gets a list of batches, one from each loader."""

    def training_step(self, batch, batch_idx):
        return sum(super(SeveralLoaders, self).training_step(part, batch_idx) for part in batch)


class OwnLoaders(Model):
    """A model with loaders of its own."""

    def train_dataloader(self):
        return self.make_train()

    def val_dataloader(self):
        return self.make_val()


class Module(pl.LightningDataModule):
    """The same loaders from a datamodule."""

    def __init__(self, make_train, make_val):
        super().__init__()
        self.make_train, self.make_val = make_train, make_val

    def train_dataloader(self):
        return self.make_train()

    def val_dataloader(self):
        return [self.make_val(), self.make_val()]


class Mapped(Model):
    """Reads the rows of a Hugging Face dataset."""

    @staticmethod
    def read_sample(sample):
        if "other" in sample:
            return read_sample(SimilarityPairSample(sample["text"], sample["other"], sample["score"], sample["part"]))
        return read_sample((sample["text"], sample["label"]))


def hugging_face(samples):
    if isinstance(samples, list):
        columns = {"text": "obj_a", "other": "obj_b", "score": "score", "part": "subgroup"}
        return HuggingFaceDataset.from_dict({name: [getattr(s, c) for s in samples] for name, c in columns.items()})
    return HuggingFaceDataset.from_dict({"text": samples.texts, "label": samples.groups})


TWO_ENCODERS = "beside a trainable encoder"
CLASSES = {"hook": OwnLoaders, "list": SeveralLoaders, "hugging face": Mapped}
SOURCES = ["passed", "datamodule", "hook", "list", "reloaded", "hugging face", "stream", TWO_ENCODERS]


def ways(labels=("auto", False), tiers=("cpu", "disk"), fills=("eager", "lazy")):
    """The whole cross; a stream has no sampler."""
    return [
        Way(source, sampler, kind, tier, label, fill)
        for source in SOURCES
        for sampler in (SAMPLERS if source != "stream" else ["workers", "batches"])
        for kind in ("group", "pair")
        for tier in tiers
        for label in labels
        for fill in (fills if source != "stream" else fills[:1])
    ]


def fit(way, cached, rank=0, size=1, save_dir=None, **settings):
    """Fit one model, and give what shows how it was trained, and how it was cached."""
    own_batches = way.sampler == "own batches"
    pl.seed_everything(5 + (rank if own_batches else 0), verbose=False)  # else ranks would draw the same batches
    samples = group_samples() if way.kind == "group" else pair_samples()
    validated = samples
    if way.source == "hugging face":
        samples = validated = hugging_face(samples)

    def make_train():
        if way.source == "stream":
            return loader(Stream(samples, rank, size), num_workers=int(way.sampler == "workers"))
        if way.source == "list":
            return [SAMPLERS[way.sampler](samples), loader(samples, shuffle=True, batch_size=6)]
        return SAMPLERS[way.sampler](samples)

    def make_val():
        return loader(validated)

    config = CacheConfig(way.tier, labels=way.labels, fill=way.fill, save_dir=save_dir) if cached else None
    loss = MultipleNegativesRankingLoss() if way.kind == "pair" else None
    model = CLASSES.get(way.source, Model)(cache=config, loss=loss)
    if way.source == TWO_ENCODERS:
        model = Model({**dict(Model().encoders), "moving": TrainableHashing()}, config, loss)
    model.make_train, model.make_val = make_train, make_val
    if way.source == "reloaded":
        settings["reload_dataloaders_every_n_epochs"] = 1
    if size > 1:
        settings = {"devices": size, "strategy": "ddp", "use_distributed_sampler": not own_batches, **settings}
    run = trainer(**settings)
    if way.source in ("datamodule", "reloaded"):
        run.fit(model, datamodule=Module(make_train, make_val))
    elif way.source == "hook":
        run.fit(model)
    else:
        run.fit(model, make_train(), make_val())
    report = model.cache_callback.report
    head = {f"head {name}": value.flatten().tolist() for name, value in head_of(model).items()}
    return {
        "trained": {"train losses": model.train_losses, "val losses": model.val_losses, **head},
        "encoded": report.encoded,
        "cached": {"tier": [one.tier.lower() for one in report.encoders.values()], "labels": report.labels},
    }


@cache
def uncached(way, rank, size):
    """Fit without a cache, once for all cells that differ in how to cache."""
    return fit(way, False, rank, size)["trained"]


def differs(way, rank=0, size=1, save_dir=None):
    """Fit without a cache, and twice with one; say what is not as it should be, or nothing."""
    plain = uncached(way._replace(tier="cpu", labels=False, fill="eager"), rank, size)
    if not plain["train losses"]:
        return "nothing was trained"
    with tempfile.TemporaryDirectory() as own:
        cold, warm = (fit(way, True, rank, size, save_dir or own) for _ in range(2))
    for name, run in (("cold", cold), ("warm", warm)):
        for part, values in plain.items():
            if run["trained"][part] != values:
                return f"{part} of the {name} run: {first_difference(run['trained'][part], values)}"
        if way.source != "stream" and way.fill == "eager":
            labels = way.labels == "auto" and way.source != TWO_ENCODERS
            if run["cached"] != (asked := {"tier": [way.tier], "labels": labels}):
                return f"the {name} run cached {run['cached']} instead of {asked}"
    return f"the warm run encoded {warm['encoded']} items" if warm["encoded"] else None


def first_difference(values, expected):
    """Say where two lists differ."""
    if len(values) != len(expected):
        return f"there are {len(values)} instead of {len(expected)}"
    place = next(place for place, pair in enumerate(zip(values, expected, strict=True)) if pair[0] != pair[1])
    return f"number {place} is {values[place]} instead of {expected[place]}"


def differing(rank, size, port, folder, cells):
    """Fit several ways as one of several ranks, and list those that are not as they should be.

    A cell that raises is the last one, for the ranks are out of step then. The file ``<rank>.at`` names the cell under
    way, so that one that never ends is known.
    """
    be_rank(rank, size, port)
    encoder_fill.SHARED_SECONDS = 0.0  # what is encoded in steps goes from rank to rank
    found = []
    for place, cell in enumerate(cells):
        way = Way(*cell)
        Path(folder, f"{rank}.at").write_text(way.name)
        try:
            trouble = differs(way, rank, size, f"{folder}/{place}")
        except Exception:
            return [*found, f"{way.name} on rank {rank}: {traceback.format_exc(limit=-5)}"]
        if trouble:
            found.append(f"{way.name} on rank {rank}: {trouble}")
    return found


def sampled_alike(rank, size, port):
    """Fit with loaders that sample alike as one of several ranks, without a cache and with one, and give the losses."""
    be_rank(rank, size, port)
    losses = {}
    for name, makers in ALIKE.items():
        losses[name] = []
        for SAMPLERS["alike"] in makers:
            for cached in (False, True):
                run = fit(Way("passed", "alike", "group", "cpu", "auto"), cached, rank, size)
                losses[name].append(run["trained"]["train losses"])
    return losses


def refusals(rank, size, port, way, **settings):
    """Fit as one of several ranks, without a cache and with one, and give the messages of the errors."""
    be_rank(rank, size, port)
    messages = []
    for cached in (False, True):
        try:
            fit(Way(*way), cached, rank, size, **settings)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages
