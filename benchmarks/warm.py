"""A run that starts warm, as a user has it every day: MiniLM is declared, and its rows are all on disk.

``quatcache`` counts from after the imports that the script of a user has to its first training step. What loading the
encoder would need is looked for afterwards: the library in ``sys.modules``, and models of it among all objects.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.anonymous import Peak
from benchmarks.fills import FirstStep, Texts
from benchmarks.rows import extend_cache
from benchmarks.texts import minilm_path
from quatcache import CacheConfig, CacheType, Encoder, TrainableModel
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.training.lightning import Trainer

__all__ = ["first_step", "prepare", "train"]

FEW = 64


class DeclaredMiniLM(TrainableModel):
    """A linear head on MiniLM, cached on disk."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def configure_encoders(self) -> Encoder:
        """Declare MiniLM."""
        return SentenceTransformerEncoder(minilm_path())

    def configure_head(self, input_embedding_size: int) -> nn.Module:
        """Return a linear head."""
        return nn.Linear(input_embedding_size, 2)

    def configure_loss(self) -> nn.Module:
        """Return a loss on groups."""
        return nn.CrossEntropyLoss()

    def configure_caches(self) -> CacheConfig:
        """Train from the disk."""
        return CacheConfig(CacheType.DISK, save_dir=self.folder)


def fit(folder: str, rows: int, steps: int, *callbacks: Any) -> Any:
    """Fit so many steps, at most one epoch."""
    model = DeclaredMiniLM(folder)
    loader = DataLoader(Texts(rows), batch_size=256, shuffle=True)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    return model.cache_callback.report


def prepare(folder: str, rows: int) -> dict[str, Any]:
    """Make a cache of so many rows without encoding them: a real fit of a few, and rows for the others.

    A warm fit follows, which nobody times: files are then in the page cache, and notes that a first start leaves are
    there.
    """
    fit(folder, FEW, 1)
    extend_cache(Path(folder), rows)
    fit(folder, rows, 1)
    return {"bytes": sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))}


def train(folder: str, rows: int, steps: int) -> dict[str, Any]:
    """Start warm and train for so many steps, as a user does: nothing is measured in the process.

    Raises:
        SystemExit: Something was encoded.
    """
    encoded = fit(folder, rows, steps).encoded
    if encoded:
        raise SystemExit(f"a warm start encoded {encoded} items; no figure is given")
    return {"steps": steps}


def first_step(folder: str, rows: int, steps: int) -> dict[str, Any]:
    """Start warm.

    Returns:
        Seconds from after the imports to the first step, items encoded, whether the library of the encoder was
        imported and its model loaded, and bytes of anonymous memory since the imports.
    """
    first = _FirstStep()
    with Peak() as memory:
        started = time.perf_counter()
        report = fit(folder, rows, steps, first)
    library = sys.modules.get("sentence_transformers")
    loaded = library is not None and any(isinstance(found, library.SentenceTransformer) for found in gc.get_objects())
    return {
        "first_step_seconds": first.at - started,
        "encoded": report.encoded,
        "library_imported": library is not None,
        "encoder_loaded": loaded,
        "anonymous_left": memory.left,
        "anonymous_highest": memory.highest,
    }


class _FirstStep(FirstStep):
    """Checks rows but those that MiniLM itself gave."""

    def check(self, numbers: torch.Tensor, targets: torch.Tensor) -> None:
        """Rows of MiniLM have no number in them; there are few."""
        known = numbers >= FEW
        super().check(numbers[known], targets[known])
