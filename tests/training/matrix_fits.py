"""Fits for the matrix of law 3: every way to bring loaders, with every way to sample them, cached or not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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


SAMPLERS: dict[str, Callable[[object], DataLoader]] = {
    "shuffle": lambda data: loader(data, shuffle=True),
    "weighted": lambda data: loader(data, sampler=WeightedRandomSampler([1 + i % 3 for i in range(SIZE)], 40)),
    "drop last, seeded": lambda data: loader(
        data, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3)
    ),
    "batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 9, False)),
    "own batches": lambda data: DataLoader(data, batch_sampler=Drawing()),
    "workers": lambda data: loader(data, shuffle=True, num_workers=1, persistent_workers=True),
}


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


CLASSES = {"hook": OwnLoaders, "list": SeveralLoaders, "hugging face": Mapped}
SOURCES = ["passed", "datamodule", "hook", "list", "reloaded", "hugging face", "stream", "beside a trainable encoder"]


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


def fit(way, cached, rank=0, size=1, save_dir=None):
    """Fit one model, and give what shows how it was trained."""
    pl.seed_everything(5, verbose=False)
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
    if way.source == "beside a trainable encoder":
        model = Model({**dict(Model().encoders), "moving": TrainableHashing()}, config, loss)
    model.make_train, model.make_val = make_train, make_val
    settings = {"reload_dataloaders_every_n_epochs": 1} if way.source == "reloaded" else {}
    if size > 1:
        settings.update(devices=size, strategy="ddp")
    run = trainer(**settings)
    if way.source == "datamodule":
        run.fit(model, datamodule=Module(make_train, make_val))
    elif way.source in ("hook", "reloaded"):
        run.fit(model) if way.source == "hook" else run.fit(model, datamodule=Module(make_train, make_val))
    else:
        run.fit(model, make_train(), make_val())
    head = {name: value.tolist() for name, value in head_of(model).items()}
    return {
        "train": model.train_losses,
        "val": model.val_losses,
        "head": head,
        "encoded": model.cache_callback.report.encoded,
    }


def differs(way, rank=0, size=1, shared=None):
    """Fit without a cache, and twice with one; say what is not as it should be, or nothing."""
    with tempfile.TemporaryDirectory() as own:
        plain, cold, warm = (fit(way, cached, rank, size, shared or own) for cached in (False, True, True))
    if not plain["train"]:
        return "nothing was trained"
    for name, run in (("the cold run", cold), ("the warm run", warm)):
        for part in ("train", "val", "head"):
            if run[part] != plain[part]:
                return f"{part} of {name}"
    return "the warm run encoded" if warm["encoded"] else None


def differing(rank, size, port, folder, cells):
    """Fit several ways as one of several ranks, and list those that are not as they should be."""
    be_rank(rank, size, port)
    found = []
    for place, cell in enumerate(cells):
        trouble = differs(Way(*cell), rank, size, f"{folder}/{place}")
        if trouble:
            found.append([cell, trouble])
    return found
