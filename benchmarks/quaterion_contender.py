"""Quaterion 0.1.35 at the work of the other contenders, in an environment of its own: ``make bench-quaterion``.

It asks for Python below 3.11, Lightning below 2 and numpy below 2. It runs on Python 3.11 with Lightning 1.9.5 and
today's numpy and torch all the same, if one name that torch has dropped is put back. Nothing of quatcache's own runs
here, and nothing of this module may be imported by it.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import dataloader, dataset

for module in (dataloader, dataset):
    if not hasattr(module, "T_co"):
        module.T_co = TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]

import pytorch_lightning as pl
from loguru import logger
from quaterion import Quaterion, TrainableModel
from quaterion.dataset import GroupSimilarityDataLoader, SimilarityGroupSample
from quaterion.loss import GroupLoss
from quaterion.train.cache import CacheConfig, CacheType
from quaterion_models.encoders import Encoder
from quaterion_models.heads import EncoderHead

from benchmarks.shapes import CLASSES, LEARNING_RATE, SEED, SHAPES, WIDTH, Shape, check_batches, differences, make_data
from benchmarks.texts import descriptions, minilm_path

__all__ = ["encode", "first_step", "load", "losses_of", "prepare", "seconds_of"]

logger.disable("quaterion")


class Rows(Encoder):
    """Looks rows up in a table."""

    trainable = False
    embedding_size = WIDTH

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def get_collate_fn(self) -> Any:
        """Make positions of the items."""
        return torch.tensor

    def forward(self, batch: Tensor) -> Tensor:
        """Look them up."""
        return self.table[batch]

    def save(self, output_path: str) -> None:
        """Save nothing."""

    @classmethod
    def load(cls, input_path: str) -> Encoder:
        """Load nothing."""
        raise NotImplementedError


class MiniLM(Encoder):
    """all-MiniLM-L6-v2 as Quaterion's users wrap it."""

    trainable = False
    embedding_size = WIDTH

    def __init__(self) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(minilm_path(), device="cpu").eval().requires_grad_(False)

    def get_collate_fn(self) -> Any:
        """Tokenize."""
        return self.model.preprocess

    def forward(self, batch: Any) -> Tensor:
        """Encode."""
        with torch.no_grad():
            vectors: Tensor = self.model(batch)["sentence_embedding"]
        return vectors

    save, load = Rows.save, Rows.load


class Head(EncoderHead):
    """The head of a shape."""

    output_size = CLASSES

    def __init__(self, shape: Shape) -> None:
        super().__init__(WIDTH)
        self.layers = shape.head()

    def transform(self, input_vectors: Tensor) -> Tensor:
        """Apply it."""
        return self.layers(input_vectors)


class CrossEntropy(GroupLoss):
    """The loss of the other contenders."""

    def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
        """Compute it."""
        return nn.functional.cross_entropy(embeddings, groups)


class Model(TrainableModel):
    """A head behind a cached encoder."""

    def __init__(self, encoder: Encoder, shape: Shape, save_dir: str | None, batch_size: int) -> None:
        self.given = (encoder, shape)  # a tuple: modules cannot be set before super().__init__()
        self.caching = CacheConfig(CacheType.CPU, batch_size=batch_size, save_dir=save_dir)
        super().__init__()

    def configure_encoders(self) -> Encoder:
        """Return the encoder."""
        return self.given[0]

    def configure_head(self, input_embedding_size: int) -> EncoderHead:
        """Return the head."""
        return Head(self.given[1])

    def configure_loss(self) -> GroupLoss:
        """Return the loss."""
        return CrossEntropy()

    def configure_caches(self) -> CacheConfig:
        """Return the config."""
        return self.caching

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return what the others use."""
        return torch.optim.AdamW(self.model.head.parameters(), lr=LEARNING_RATE)


class Notes(pl.Callback):
    """When the first step began and each epoch ended, and the loss of every step if asked for."""

    def __init__(self, generator: torch.Generator | None = None, losses: bool = False) -> None:
        self.generator, self.wanted = generator, losses
        self.first, self.ends, self.losses = 0.0, [], []  # type: ignore[var-annotated]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the order anew: the fill has drawn from the loader's generator."""
        if self.generator is not None:
            self.generator.manual_seed(SEED)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the time, once."""
        self.first = self.first or time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss."""
        if self.wanted:
            self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def fit(model: Model, loader: Any, epochs: int, *callbacks: pl.Callback, steps: int = -1) -> None:
    """Fit with everything off that is not training."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, max_steps=steps, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    Quaterion.fit(model, trainer, loader)


def train(shape: Shape, rows: int, epochs: int, losses: bool) -> Notes:
    """Train on the same rows in the same order as the other contenders."""
    data, generator = make_data(rows), torch.Generator()
    samples = [SimilarityGroupSample(obj=i, group=label) for i, label in enumerate(data.labels.tolist())]
    loader = GroupSimilarityDataLoader(samples, batch_size=shape.batch_size, shuffle=True, generator=generator)
    notes = Notes(generator, losses)
    fit(Model(Rows(data.rows), shape, None, 4096), loader, epochs, notes)
    return notes


def seconds_of(contender: str, shapes: dict[str, int], rows: int) -> dict[str, list[float]]:
    """Time epochs; see ``benchmarks.epochs``."""
    return {name: differences(train(SHAPES[name], rows, epochs, losses=False).ends) for name, epochs in shapes.items()}


def losses_of(contender: str, shapes: list[str], rows: int, epochs: int) -> dict[str, list[float]]:
    """Give the loss of every step; see ``benchmarks.epochs``."""
    return {name: train(SHAPES[name], rows, epochs, losses=True).losses for name in shapes}


class Loading(pl.Callback):
    """Times the loader and the look-up, before the first step: only together do they bring rows."""

    def __init__(self, data: Any, epochs: int) -> None:
        self.data, self.epochs = data, epochs
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Model) -> None:
        """Check one epoch, time the others, and end the fit."""
        loader, (encoder,) = trainer.train_dataloader.loaders, pl_module.model.encoders.values()
        for epoch in range(self.epochs):
            kept, started = [], time.perf_counter()
            for features, targets in loader:
                (keys,) = features["data"].values()
                rows = encoder(keys)
                if not epoch:
                    kept.append((rows, targets["groups"]))
            if epoch:
                self.seconds.append(time.perf_counter() - started)
            else:
                check_batches(kept, self.data)
        trainer.should_stop = True


def load(contender: str, rows: int, epochs: int) -> list[float]:
    """Time the loading of an epoch; see ``benchmarks.loading``."""
    data, shape = make_data(rows), SHAPES["mlp"]
    samples = [SimilarityGroupSample(obj=i, group=label) for i, label in enumerate(data.labels.tolist())]
    timer = Loading(data, epochs)
    loader = GroupSimilarityDataLoader(samples, batch_size=shape.batch_size, shuffle=True)
    fit(Model(Rows(data.rows), shape, None, 4096), loader, 1, timer)
    return timer.seconds


def encode(contender: str, count: int, target: str) -> dict[str, float]:
    """Fill a cache with MiniLM and persist it; the vectors go to a file. See ``benchmarks.fill_contenders``."""
    import numpy as np

    encoder, kept = MiniLM(), list[Tensor]()

    class Vectors(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Model, batch: Any, batch_idx: int) -> None:
            (keys,) = batch[0]["data"].values()
            (cached,) = pl_module.model.encoders.values()
            kept.append(cached(keys))

    def fill(texts: list[str], folder: str) -> float:
        samples, notes = [SimilarityGroupSample(obj=text, group=0) for text in texts], Notes()
        started = time.perf_counter()
        loader = GroupSimilarityDataLoader(samples, batch_size=256)
        fit(Model(encoder, SHAPES["linear"], folder, 32), loader, 1, notes, Vectors())
        return notes.first - started

    texts = descriptions(count)
    fill(texts[:8], f"{target}.cache/warm-up")
    kept.clear()
    seconds = fill(texts, f"{target}.cache/work")
    np.save(target, torch.cat(kept).numpy())
    return {"seconds": seconds}


def prepare(folder: str, rows: int) -> None:
    """Persist a cache of so many rows, which no encoder need compute."""
    data = make_data(rows)
    loader = GroupSimilarityDataLoader(
        [SimilarityGroupSample(obj=i, group=i % 2) for i in range(rows)], batch_size=256, shuffle=True
    )
    fit(Model(Rows(data.rows), SHAPES["linear"], folder, 4096), loader, 1, Notes(), steps=1)


def first_step(folder: str, rows: int) -> dict[str, float]:
    """Start warm from that cache, MiniLM declared; see ``benchmarks.warm``. It takes the rows of whatever filled it."""
    from benchmarks.anonymous import Peak

    samples = [SimilarityGroupSample(obj=f"item {i}", group=i % 2) for i in range(rows)]
    notes = Notes()
    with Peak() as memory:
        started = time.perf_counter()
        loader = GroupSimilarityDataLoader(samples, batch_size=256, shuffle=True)
        fit(Model(MiniLM(), SHAPES["linear"], folder, 32), loader, 1, notes, steps=3)
    return {"first_step_seconds": notes.first - started, "anonymous_left": memory.left}
