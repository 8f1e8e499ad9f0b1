"""Real fits, small enough for every test: models whose steps can be compared, and what runs them."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from quatcache import CacheConfig, Encoder, TrainableModel

WORDS = ["alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow"]


class HashingEncoder(Encoder):
    """Bag of letters through a fixed random matrix: batch-independent, and it records what it was asked."""

    embedding_size = 16

    def __init__(self, seed=0):
        self.register_buffer("matrix", torch.randn(128, 16, generator=torch.Generator().manual_seed(seed)))
        self._collated = []
        self._rows = 0

    def collate(self, items):
        self._collated.extend(items)
        return torch.stack(
            [torch.bincount(torch.tensor([ord(c) % 128 for c in text]), minlength=128) for text in items]
        )

    def forward(self, inputs):
        self._rows += len(inputs)
        # summed row by row: a matrix product may sum in another order for another batch size
        return torch.stack([(row.to(self.matrix.dtype)[:, None] * self.matrix).sum(0) for row in inputs])

    def length(self, item):
        return len(item)


class TrainableHashing(HashingEncoder):
    """The same with a matrix that training changes."""

    trainable = True

    def __init__(self, seed=1):
        matrix = torch.randn(128, 16, generator=torch.Generator().manual_seed(seed))
        self.matrix = nn.Parameter(matrix)
        self._collated, self._rows = [], 0


class Model(TrainableModel):
    """A model that keeps every loss; the head has dropout, so that stolen random numbers show."""

    def __init__(self, encoders=None, cache=None, loss=None, head=None, metrics=None):
        super().__init__()
        self.lr = 0.05
        self.encoders_given = encoders or {"default": HashingEncoder()}
        self.cache = cache
        self.loss_given = loss or nn.CrossEntropyLoss()
        self.head_given = head
        self.metrics_given = metrics or {}
        self.train_losses = []
        self.val_losses = []

    def configure_encoders(self):
        return self.__dict__.pop("encoders_given")

    def configure_head(self, input_embedding_size):
        torch.manual_seed(11)  # every model starts from the same head
        return self.head_given or nn.Sequential(nn.Dropout(0.2), nn.Linear(input_embedding_size, 5))

    def configure_loss(self):
        return self.loss_given

    def configure_metrics(self):
        return self.metrics_given

    def configure_caches(self):
        return self.cache

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.train_losses.append(outputs["loss"].item())

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.val_losses.append(outputs.item())


class Texts(Dataset):
    """A dataset of (text, group) that counts how often it is read, in this process."""

    def __init__(self, texts, groups=None):
        self.texts = list(texts)
        self.groups = list(groups) if groups is not None else [len(text) % 5 for text in self.texts]
        self.reads = 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        self.reads += 1
        return self.texts[index], self.groups[index]


def texts(count=60, distinct=None):
    """Texts of mixed lengths; with ``distinct`` they repeat."""
    distinct = distinct or count
    return [
        " ".join(WORDS[(i + j) % 12] for j in range(1 + i % 4)) + f" {i}" for i in (n % distinct for n in range(count))
    ]


def trainer(**settings):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **settings})


def fit(model, train, val=None, seed=0, **settings):
    """Seed, fit, and give the trainer; the loaders may be functions, so that generators are made after the seed."""
    pl.seed_everything(seed, verbose=False)
    run = trainer(**settings)
    train, val = (loader() if callable(loader) else loader for loader in (train, val))
    run.fit(model, train, val)
    return run


def head_of(model):
    return {name: value.clone() for name, value in model.head.state_dict().items()}


def same_run(one, other):
    """Whether two fitted models saw the same batches: every loss and the final head equal bit for bit."""
    heads = head_of(one), head_of(other)
    return (
        one.train_losses == other.train_losses
        and one.val_losses == other.val_losses
        and len(one.train_losses) > 0
        and all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    )


class Failing(Callback):
    """Raises in the middle of a fit."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise self.error


def loader(dataset, **settings):
    return DataLoader(dataset, **{"batch_size": 8, **settings})


def cached(**settings):
    return CacheConfig(**settings)
