"""The encoding of texts for the first time, written in several ways; each contender in a process of its own.

MiniLM on descriptions of packages, and static embeddings on glosses:

* ``encode``: ``SentenceTransformer.encode(batch_size=32)``, which sorts all texts by their characters; kept nowhere;
* ``dataset-order``: fixed batches of 32 as they come, what a loader gives to a model; kept nowhere;
* ``datasets.map``: ``encode`` inside ``datasets.Dataset.map``, which keeps an Arrow file;
* ``langchain``: ``encode`` inside ``CacheBackedEmbeddings``, which keeps a file of JSON for each text;
* ``quatcache``: a fit with a ``save_dir``, from its begin to its first step;
* ``quaterion``: the same there, see ``benchmarks.quaterion_contender``.

Each does its work on eight texts first, to warm up: a first fit of a process imports more. Loading the encoder is in
nobody's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.texts import descriptions, glosses, minilm_path, static_encoder, with_duplicates
from quatcache import CacheConfig, CacheType, Encoder, TrainableModel
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.training.lightning import Callback, LightningModule, Trainer

__all__ = ["CONTENDERS", "TEXTS", "duplicates", "encode", "grown"]


def minilm() -> Any:
    """Load all-MiniLM-L6-v2."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm_path(), device="cpu").eval()


TEXTS: dict[str, tuple[Callable[[int], list[str]], Callable[[], Any]]] = {
    "minilm": (descriptions, minilm),
    "static": (glosses, static_encoder),
}
"""Texts and what encodes them."""


def run_encode(model: Any, texts: list[str], folder: Path) -> tuple[float, Any]:
    """Encode in one call."""
    started = time.perf_counter()
    vectors = model.encode(texts, batch_size=32, show_progress_bar=False)
    return time.perf_counter() - started, vectors


def run_dataset_order(model: Any, texts: list[str], folder: Path) -> tuple[float, Any]:
    """Encode batches as they come."""
    prepare = getattr(model, "preprocess", None) or model.tokenize
    started = time.perf_counter()
    with torch.no_grad():
        vectors = [
            model(prepare(texts[start : start + 32]))["sentence_embedding"] for start in range(0, len(texts), 32)
        ]
    rows = torch.cat(vectors)
    return time.perf_counter() - started, rows.numpy()


def run_datasets(model: Any, texts: list[str], folder: Path) -> tuple[float, Any]:
    """Encode in ``Dataset.map``, with its cache file."""
    import datasets

    datasets.disable_progress_bars()

    def batch(samples: dict[str, list[str]]) -> dict[str, Any]:
        return {"vector": model.encode(samples["text"], batch_size=32, show_progress_bar=False)}

    given = datasets.Dataset.from_dict({"text": texts})
    started = time.perf_counter()
    done = given.map(batch, batched=True, cache_file_name=str(folder / "map.arrow"))
    seconds = time.perf_counter() - started
    return seconds, np.asarray(done.with_format("numpy")["vector"][:], np.float32)


def run_langchain(model: Any, texts: list[str], folder: Path) -> tuple[float, Any]:
    """Encode in LangChain's cache, in files."""
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_classic.storage import LocalFileStore
    from langchain_core.embeddings import Embeddings

    class Encoding(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            vectors: list[list[float]] = model.encode(texts, batch_size=32, show_progress_bar=False).tolist()
            return vectors

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    cached = CacheBackedEmbeddings.from_bytes_store(
        Encoding(), LocalFileStore(folder / "langchain"), namespace="minilm", key_encoder="blake2b"
    )
    started = time.perf_counter()
    vectors = cached.embed_documents(texts)
    return time.perf_counter() - started, np.asarray(vectors, np.float32)


class TextModel(TrainableModel):
    """A linear head on a cached text encoder."""

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__()
        self.given, self.folder = (model,), folder  # a tuple: the encoder alone holds the module

    def configure_encoders(self) -> Encoder:
        """Return the encoder."""
        return SentenceTransformerEncoder(self.given[0])

    def configure_head(self, input_embedding_size: int) -> nn.Module:
        """Return a linear head."""
        return nn.Linear(input_embedding_size, 2)

    def configure_loss(self) -> nn.Module:
        """Return a loss on groups."""
        return nn.CrossEntropyLoss()

    def configure_caches(self) -> CacheConfig:
        """Keep the rows on disk; batches are those of the default."""
        return CacheConfig(CacheType.CPU, save_dir=self.folder)


class FirstEpoch(Callback):
    """Notes when the first step begins, and keeps the rows of all steps."""

    def __init__(self) -> None:
        self.at = 0.0
        self.rows: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note and keep."""
        self.at = self.at or time.perf_counter()
        self.rows.append(batch.inputs["default"])


def fill(model: Any, texts: list[str], folder: Path) -> tuple[float, Any, Any]:
    """Fit for one epoch.

    Returns:
        Seconds to the first step, the rows in the order of the texts, and the report of the cache.
    """
    first, trained = FirstEpoch(), TextModel(model, folder)
    loader = DataLoader([(text, 0) for text in texts], batch_size=256)  # type: ignore[arg-type]  # a list will do
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[first], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(trained, loader)
    return first.at - started, torch.cat(first.rows).numpy(), trained.cache_callback.report


def run_quatcache(model: Any, texts: list[str], folder: Path) -> tuple[float, Any]:
    """Fill by a fit."""
    seconds, rows, report = fill(model, texts, folder / "quatcache")
    if report.encoded != len(set(texts)):
        raise SystemExit(f"{report.encoded} of {len(set(texts))} distinct texts were encoded; no figure is given")
    return seconds, rows


CONTENDERS: dict[str, Callable[[Any, list[str], Path], tuple[float, Any]]] = {
    "encode": run_encode,
    "dataset-order": run_dataset_order,
    "datasets.map": run_datasets,
    "langchain": run_langchain,
    "quatcache": run_quatcache,
}


def encode(contender: str, kind: str, count: int, target: str) -> dict[str, float]:
    """Encode texts for the first time.

    Args:
        contender: A name of ``CONTENDERS``.
        kind: A name of ``TEXTS``.
        count: How many texts.
        target: The file ``.npy`` that the vectors go to, for comparison; caches lie beside it.

    Returns:
        Seconds.
    """
    read, load = TEXTS[kind]
    texts, model = read(count), load()
    run, folder = CONTENDERS[contender], Path(f"{target}.cache")
    for part in ("warm-up", "work"):
        (folder / part).mkdir(parents=True)
    run(model, texts[:8], folder / "warm-up")
    seconds, vectors = run(model, texts, folder / "work")
    np.save(target, vectors)
    return {"seconds": seconds}


def duplicates(count: int, share: float, target: str) -> dict[str, Any]:
    """Fill with texts of which a share occurs more than once.

    Returns:
        How many texts there are, how many distinct ones, and how many were encoded.
    """
    texts, model = with_duplicates(list(dict.fromkeys(glosses(count))), share), static_encoder()
    _, rows, report = fill(model, texts, Path(target))
    if not np.allclose(rows, model.encode(texts, show_progress_bar=False), rtol=0, atol=1e-5):
        raise SystemExit("rows of a fill with duplicates are not those of encode; no figure is given")
    return {"texts": len(texts), "distinct": len(set(texts)), "encoded": report.encoded}


def grown(kind: str, count: int, more: int, target: str) -> dict[str, Any]:
    """Fill, and fill again with further texts at the end, in the same process.

    Args:
        kind: A name of ``TEXTS``.
        count: Texts of the first fill, made distinct.
        more: Further texts, distinct from those.
        target: Where the cache is kept.

    Returns:
        Seconds of both, and how many texts each encoded.
    """
    read, load = TEXTS[kind]
    texts, model = list(dict.fromkeys(read(count + more))), load()
    fill(model, texts[:8], Path(target) / "warm-up")
    kept = texts[: len(texts) - more]
    first, _, report = fill(model, kept, Path(target) / "work")
    again, rows, second = fill(model, texts, Path(target) / "work")
    checked = slice(len(kept) - 64, None)
    if not np.allclose(rows[checked], model.encode(texts[checked], show_progress_bar=False), rtol=0, atol=1e-5):
        raise SystemExit("rows of a grown dataset are not those of encode; no figure is given")
    return {
        "texts": len(kept), "more": more, "first_seconds": first, "again_seconds": again,
        "first_encoded": report.encoded, "again_encoded": second.encoded,
    }  # fmt: skip
