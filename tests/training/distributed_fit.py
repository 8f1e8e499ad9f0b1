"""One fit on several ranks: as a script that a launcher starts once for each rank, and as a job for each of them."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import IterableDataset

from quatcache import CacheConfig, SimilarityPairSample
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.training import distributed, encoder_fill
from tests.fits import Model, Texts, head_of, loader, texts, trainer
from tests.training.killed_fit import LoggingEncoder, Messages, samples, small_commits

COUNT = 41
"""Distinct texts of the script's fit."""


def result_of(model):
    report = model.cache_callback.report
    return {
        "train": model.train_losses,
        "val": model.val_losses,
        "head": {name: value.tolist() for name, value in head_of(model).items()},
        "encoded": report.encoded,
        "asked": sum(encoder.asked for encoder in report.encoders.values()),
        "hits": report.hits,
        "duplicates": report.duplicates,
        "read": report.read,
        "labels": report.labels,
    }


def main(out, save_dir, cached, nodes=1, devices=2):
    workers = {"num_workers": 1, "labels": True} if cached == "with workers" else {}
    cache = CacheConfig(save_dir=save_dir or None, **workers) if cached != "uncached" else None
    pl.seed_everything(0, verbose=False)
    model = Model(cache=cache)
    train = loader(Texts(texts(COUNT)), shuffle=True, num_workers=int(cached == "with workers"))
    run = trainer(devices=int(devices), num_nodes=int(nodes), strategy="ddp", max_epochs=2)
    run.fit(model, train, loader(Texts(texts(10))))
    Path(out, f"rank{run.global_rank}.json").write_text(json.dumps(result_of(model)))


class Failing(Texts):
    """Texts of which one cannot be read, on some ranks."""

    def __getitem__(self, index):
        if index == len(self) // 2:
            raise RuntimeError(f"item {index} cannot be read")
        return super().__getitem__(index)


class Stream(IterableDataset):
    """The samples of a dataset without an index."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter([self.samples[index] for index in range(len(self.samples))])


def first_letters(item):
    return item[:3]


def whole_text(item):
    return item


def be_rank(rank, size, port):
    """Say to Lightning which of the processes this one is, as torchrun does."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0",
        WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip


def fit_rank(
    rank,
    size,
    port,
    *,
    save_dir,
    log,
    count,
    cache=True,
    batch_size=8,
    extractor=None,
    labels="auto",
    own_data=False,
    fails=False,
    timeout=None,
    message_seconds=None,
    happens=None,
    said=None,
    survive=False,
    fill=None,
    lazy=False,
    stream=False,
    shared_seconds=0.0,
    **commits,
):
    """Fit as one of several ranks.

    Args:
        rank: Which.
        size: How many there are; 1: no process group.
        port: Where rank 0 listens.
        save_dir: Where rows persist; None: nowhere.
        log: File in which texts that were encoded are logged, with the number of the rank.
        count: How many samples.
        cache: Whether there is one.
        batch_size: Of the fill.
        extractor: Key extractor.
        labels: As in the config.
        own_data: Whether each rank has samples of its own.
        fails: Whether a sample cannot be read.
        timeout: Of the process group, in seconds.
        message_seconds: How long a rank waits before it says so.
        happens: Called with the number of each encoder call of the fill.
        said: Called with each message for the user.
        survive: Return the message of an error.
        fill: Called instead of what sets up the ranks, for what a test breaks on purpose.
        lazy: Whether rows are cached as batches meet them.
        stream: Whether each rank reads all samples, one after the other.
        shared_seconds: What the misses of a step must take at least to be shared.
        commits: See :func:`small_commits`.
    """
    if size > 1:
        be_rank(rank, size, port)
    small_commits(**commits)
    encoder_fill.SHARED_SECONDS = shared_seconds
    if message_seconds is not None:
        distributed.SECONDS_BETWEEN_MESSAGES = message_seconds
    if fill is not None:
        fill()
    log = (os.fspath(log), rank)
    logging.getLogger("quatcache").addHandler(Messages(log, said))
    train, val, _ = samples(count)
    if own_data:
        train = Texts([f"{text} of rank {rank}" for text in train.texts])
    if fails:
        train = Failing(train.texts)
    encoder = LoggingEncoder()
    encoder._log, encoder._happens = log, happens
    config = CacheConfig(
        save_dir=save_dir, batch_size=batch_size, labels=labels, key_extractors=extractor or {},
        fill="lazy" if lazy else "eager",
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    model = Model({"default": encoder}, config if cache else None)
    settings = {}
    if size > 1:
        limit = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        settings = {"devices": size, "strategy": DDPStrategy(process_group_backend="gloo", **limit)}
    try:
        train = loader(Stream(train), batch_size=32) if stream else loader(train, shuffle=True, batch_size=32)
        trainer(**settings).fit(model, train, loader(val, batch_size=32))
    except Exception as error:
        if not survive:
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    return result_of(model)


class Unkeyed:
    """An item without canonical bytes."""

    def __init__(self, text):
        self.text = text


class UnkeyedEncoder(LoggingEncoder):
    """Takes such items."""

    def collate(self, items):
        return super().collate([item.text for item in items])

    def length(self, item):
        return len(item.text)


def pairs(count):
    """Pairs whose texts recur, within a pair and between them."""
    both = zip(texts(count, count // 2), texts(count, count // 3)[::-1], strict=True)
    return [SimilarityPairSample(a, b, score=float(i % 4 > 0), subgroup=i % 2) for i, (a, b) in enumerate(both)]


def by_length(item):
    return len(item)


def two_encoders():
    return {"b": LoggingEncoder(1), "a": LoggingEncoder(2)}


class LossOfWords(nn.Module):
    """Takes targets of which no tensor can be made."""

    def forward(self, rows, words):
        return nn.functional.cross_entropy(rows, torch.tensor([len(word) for word in words]))


def words_as_targets(count):
    return Texts(texts(count), ["x" * (i % 5) for i in range(count)])


BUDGET = 20
"""Rows of 16 floats that fit."""

VARIANTS = {
    "pairs, two encoders": {"train": pairs, "encoders": two_encoders},
    "pairs, extracted keys, two encoders": {
        "train": pairs, "encoders": two_encoders, "config": {"key_extractors": {"a": by_length}, "labels": True},
    },
    "encoders of one identity": {"encoders": lambda: {"b": LoggingEncoder(1), "a": LoggingEncoder(1)}},
    "no targets": {
        "train": words_as_targets, "val": lambda count: words_as_targets(20), "loss": LossOfWords,
    },
    "data that grows in the second epoch": {"reloads": lambda count, epoch: Texts(texts(count + 20 * epoch))},
    "fewer samples than ranks": {"train": lambda count: Texts(texts(1)), "val": lambda count: Texts(texts(1))},
    "budget": {"config": {"max_size": 64 * BUDGET}},
    "items without keys": {
        "train": lambda count: Texts([Unkeyed(text) for text in texts(count)], [i % 5 for i in range(count)]),
        "val": lambda count: Texts([Unkeyed(text) for text in texts(20)], [i % 5 for i in range(20)]),
        "encoders": lambda: {"default": UnkeyedEncoder()},
    },
}  # fmt: skip


def fit_variant(rank, size, port, *, save_dir, log, count, variant, cache=True, fill="eager"):
    """Fit other data, or with other settings, as one of several ranks."""
    chosen = VARIANTS[variant]
    encoder_fill.SHARED_SECONDS = 0.0
    if size > 1:
        be_rank(rank, size, port)
    train = chosen.get("train", lambda count: Texts(texts(count, count * 3 // 4)))(count)
    val = chosen["val"](count) if "val" in chosen else train[:20] if isinstance(train, list) else Texts(texts(20))
    encoders = chosen.get("encoders", lambda: {"default": LoggingEncoder()})()
    for encoder in encoders.values():
        encoder._log = (os.fspath(log), rank)
    config = CacheConfig(save_dir=save_dir, batch_size=4, fill=fill, **chosen.get("config", {})) if cache else None
    pl.seed_everything(0, verbose=False)
    loss = chosen["loss"]() if "loss" in chosen else MultipleNegativesRankingLoss() if isinstance(train, list) else None
    model = Model(encoders, config, loss)
    settings = {"devices": size, "strategy": DDPStrategy(process_group_backend="gloo")} if size > 1 else {}
    if "reloads" in chosen:
        model.train_dataloader = lambda: loader(chosen["reloads"](count, model.current_epoch), shuffle=True)
        trainer(reload_dataloaders_every_n_epochs=1, **settings).fit(model, val_dataloaders=loader(val))
    else:
        trainer(**settings).fit(model, loader(train, shuffle=True), loader(val))
    return result_of(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
