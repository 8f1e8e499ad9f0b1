"""Writes the golden cache directory of each format version: ``python -m tests.store.golden.make``.

What it holds is the same each time; the names of shards and the time of the fill are not. So it is written once for
each format version and kept: a later quatcache must read what this one wrote. It leaves alone what exists.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from quatcache import CacheConfig, Encoder, PaddedSequences, SimilarityPairSample, TrainableModel
from quatcache.keys import content_keys
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.store import DiskStore

HERE = Path(__file__).parent
TEXTS = ["alder", "birch", "Größe", "naïve 東京", "elm"]
ITEMS = [("alder", 3), {"text": "birch", "year": -7}, b"\x00\xff", 2.5, True, None]
LABELS = [0, 2, 1, 2, 0]
PAIRS = [("alder", "birch", 1.0, 4), ("elm", "alder", 0.5, 5), ("naïve 東京", "elm", 0.0, 4)]
ENVIRONMENT = {"hardware": "none", "torch": "0.0"}


def letters(text):
    """Give what stands for a text in all golden stores: length, first and last code point."""
    return [float(len(text)), float(ord(text[0])), float(ord(text[-1]))]


class Letters(Encoder):
    """Length, first and last code point of a text, each multiplied by a weight."""

    embedding_size = 3

    def __init__(self):
        self.weights = torch.tensor([0.5, 0.25, 0.125])

    def collate(self, items):
        return torch.tensor([letters(item) for item in items])

    def forward(self, inputs):
        return inputs * self.weights


class Golden(TrainableModel):
    """Trains a line on letters."""

    def __init__(self, cache, loss):
        super().__init__()
        self.cache, self.loss_given = cache, loss

    def configure_encoders(self):
        return Letters()

    def configure_head(self, input_embedding_size):
        return nn.Linear(input_embedding_size, 3)

    def configure_loss(self):
        return self.loss_given

    def configure_caches(self):
        return self.cache


def groups():
    return list(zip(TEXTS, LABELS, strict=True))


def pairs():
    return [SimilarityPairSample(*pair) for pair in PAIRS]


def first_letter(text):
    return text[0], len(text)


def fit(save_dir, samples, loss, **settings):
    """Fit one epoch on samples in their order, and give what the cache did."""
    model = Golden(CacheConfig(save_dir=save_dir, **settings), loss)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(samples, batch_size=2))
    return model.cache_callback.report


def fits(save_dir):
    """Fit on groups, on pairs, with extracted keys, and with rows stored in half the bytes."""
    return [
        fit(save_dir, groups(), nn.CrossEntropyLoss()),
        fit(save_dir, pairs(), MultipleNegativesRankingLoss()),
        fit(save_dir, groups(), nn.CrossEntropyLoss(), key_extractors=first_letter, labels=True),
        fit(save_dir, groups(), nn.CrossEntropyLoss(), dtype="float16", labels=False),
    ]


def put(save_dir, digest, items, rows, *, shards=1):
    """Write rows with the store alone, for what no encoder above gives."""
    facts = {"class": "golden", "prompt": "Größe: ", "layers": [1, 2], "scale": 0.5, "none": None}
    store = DiskStore(save_dir / "encoders" / digest, digest, facts=facts, environment=ENVIRONMENT)
    size = len(items) // shards
    for start in range(0, len(items), size):
        part = slice(start, start + size)
        store.put_many(content_keys(items[part]), rows[part])
        store.flush()
    store.compact()


def write(save_dir):
    fits(save_dir)
    values = torch.tensor([letters(text) for text in TEXTS])
    put(save_dir, "b" * 32, TEXTS, (values / 3).to(torch.bfloat16))
    put(save_dir, "1" * 32, TEXTS, values.long() * -(2**40))
    put(save_dir, "2" * 32, ITEMS, torch.arange(36.0).reshape(6, 2, 3) / 7)
    put(save_dir, "8" * 32, [str(number) for number in range(8)], torch.arange(8.0)[:, None] / 7, shards=8)
    DiskStore(save_dir / "encoders" / ("b" * 32), "b" * 32).mark_verified({**ENVIRONMENT, "torch": "0.1"})
    for left in (*save_dir.rglob(".*.lock"), *save_dir.rglob(".last-used")):
        left.unlink()


def spelled():
    """Give the texts as sequences: of each letter its code point and its place, divided by 8; one text is empty."""
    spelt = [[[ord(letter) / 8, place / 8] for place, letter in enumerate(text)] for text in [*TEXTS, ""]]
    values, mask = torch.full((len(spelt), 9, 2), 9.0), torch.zeros(len(spelt), 9, dtype=torch.bool)
    for row, letters_of in enumerate(spelt):
        mask[row, : len(letters_of)] = True
        if letters_of:
            values[row, : len(letters_of)] = torch.tensor(letters_of)
    return PaddedSequences(values, mask)


def write_sequences(save_dir):
    """Write what version 2 adds, with the store alone."""
    sequences = spelled()
    put(save_dir, "5" * 32, [*TEXTS, ""], sequences)
    put(save_dir, "6" * 32, [*TEXTS, ""], sequences.to(torch.bfloat16))
    lengths = PaddedSequences(sequences.mask.long(), sequences.mask)  # elements without a shape
    put(save_dir, "7" * 32, [*TEXTS, ""], lengths)
    many = PaddedSequences(torch.arange(32.0).reshape(8, 4, 1) / 7, torch.ones(8, 4).tril() > 0)
    put(save_dir, "9" * 32, [str(number) for number in range(8)], many, shards=8)
    for left in (*save_dir.rglob(".*.lock"), *save_dir.rglob(".last-used")):
        left.unlink()


WRITERS = {"version-1": write, "version-2": write_sequences}

if __name__ == "__main__":
    fresh = [name for name in WRITERS if not (HERE / name).exists()]
    for name in fresh:
        WRITERS[name](HERE / name)
    if not fresh:
        sys.exit("all of them exist, and what they are for is to stay as they are")
