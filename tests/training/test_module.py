"""What TrainableModel gives a user beside the cache."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.retrieval import RetrievalMRR, RetrievalPrecision

from quatcache import CacheConfig, ServableModel, SimilarityPairSample, TrainableModel
from quatcache.errors import ModelDefinitionError
from quatcache.heads import LinearHead
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.metrics import EmbeddingRetrieval
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts, trainer

CACHES = [None, CacheConfig()]


@pytest.mark.parametrize("cache", CACHES)
def test_metrics_are_logged_for_each_validation_loader(cache):
    metrics = {
        "accuracy": MulticlassAccuracy(5, average="micro"),
        "precision": EmbeddingRetrieval(RetrievalPrecision(top_k=1)),
    }
    model = Model(cache=cache, metrics=metrics)
    halves = Texts(texts(20)), Texts(texts(30)[20:])
    run = fit(model, loader(Texts(texts(40))), [loader(half) for half in halves])
    for place, half in enumerate(halves):
        logits = model.encode(half.texts)
        accuracy = (logits.argmax(dim=1) == torch.tensor(half.groups)).float().mean()
        assert run.callback_metrics[f"val_accuracy/dataloader_idx_{place}"].item() == pytest.approx(accuracy.item())
        assert f"val_precision/dataloader_idx_{place}" in run.callback_metrics
        assert f"val_loss/dataloader_idx_{place}" in run.callback_metrics


@pytest.mark.parametrize("cache", CACHES)
def test_pairs_are_measured_by_reciprocal_rank(cache):
    pairs = [SimilarityPairSample(text, text.upper()) for text in texts(20)]
    model = Model(cache=cache, loss=MultipleNegativesRankingLoss(), metrics={"mrr": EmbeddingRetrieval(RetrievalMRR())})
    run = fit(model, loader(pairs), loader(pairs))
    assert 0 < run.callback_metrics["val_mrr"].item() <= 1
    assert "train_loss" in run.callback_metrics


def test_metrics_start_afresh_each_epoch():
    model = Model(metrics={"accuracy": MulticlassAccuracy(5, average="micro")})
    data = Texts(texts(20))
    run = trainer()
    run.validate(model, loader(data), verbose=False)
    once = run.callback_metrics["val_accuracy"].item()
    run.validate(model, loader(data), verbose=False)
    assert run.callback_metrics["val_accuracy"].item() == once


def test_attributes_may_be_set_after_super_init():
    class Late(TrainableModel):
        def __init__(self, width):
            super().__init__()
            self.save_hyperparameters()
            self.width = width

        def configure_encoders(self):
            return HashingEncoder()

        def configure_head(self, input_embedding_size):
            return LinearHead(input_embedding_size, self.width)

        def configure_loss(self):
            return nn.CrossEntropyLoss()

    model = Late(7)
    assert model.encode(["oak"]).shape == (1, 7)
    assert dict(model.hparams) == {"width": 7}


def test_several_encoders_are_concatenated_in_name_order():
    class Both(Model):
        def configure_head(self, input_embedding_size):
            assert input_embedding_size == 32
            return nn.Identity()

    model = Both({"b": HashingEncoder(1), "a": HashingEncoder(2)})
    rows = model.encode(["oak"])
    assert torch.equal(rows[:, :16], HashingEncoder(2)(HashingEncoder(2).collate(["oak"])))


def test_a_servable_gives_what_the_model_gives(tmp_path):
    model = Model(cache=CacheConfig(), head=LinearHead(16, 5))
    fit(model, loader(Texts(texts(40))))
    model.save_servable(tmp_path / "servable")
    assert {path.suffix for path in (tmp_path / "servable").rglob("*") if path.is_file()} <= {".json", ".safetensors"}
    loaded = ServableModel.load(tmp_path / "servable", encoders={"default": HashingEncoder(5)})
    assert torch.equal(loaded.encode(texts(9)), model.encode(texts(9)))


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(Texts(texts(40)), shuffle=True)

    def val_dataloader(self):
        return [loader(Texts(texts(20))), loader(Texts(texts(10)))]


class WithLoaders(Model):
    def train_dataloader(self):
        return Data.train_dataloader(self)

    def val_dataloader(self):
        return Data.val_dataloader(self)


@pytest.mark.parametrize("cache", CACHES)
def test_every_source_of_loaders_trains_alike(cache):
    runs = []
    for source in ("loaders", "datamodule", "hooks"):
        model = WithLoaders(cache=cache) if source == "hooks" else Model(cache=cache)
        pl.seed_everything(0, verbose=False)
        if source == "loaders":
            trainer().fit(model, Data().train_dataloader(), Data().val_dataloader())
        elif source == "datamodule":
            trainer().fit(model, datamodule=Data())
        else:
            trainer().fit(model)
        runs.append(model)
    assert same_run(runs[0], runs[1])
    assert same_run(runs[0], runs[2])


def test_loaders_that_are_reloaded_each_epoch_are_cached_each_time():
    class Grows(Data):
        def train_dataloader(self):
            self.epochs = getattr(self, "epochs", 0) + 1
            return loader(Texts(texts(20 + 10 * self.epochs)), shuffle=True)

    models = []
    for cache in CACHES:
        model = Model(cache=cache)
        pl.seed_everything(0, verbose=False)
        trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=Grows())
        models.append(model)
    assert same_run(*models)
    assert models[1].cache_callback.report.encoded == 50


@pytest.mark.parametrize("settings", [{"limit_train_batches": 2}, {"overfit_batches": 2}, {"fast_dev_run": True}])
def test_limits_of_the_trainer_hold(settings):
    models = [Model(cache=cache) for cache in CACHES]
    for model in models:
        fit(model, loader(Texts(texts(40)), shuffle=True), loader(Texts(texts(10))), **settings)
    assert same_run(*models)


def test_logging_without_a_setup_shows_the_line_of_a_fit():
    script = (
        "import tests.fits as f, quatcache as q\n"
        "model = f.Model(cache=q.CacheConfig())\n"
        "f.fit(model, f.loader(f.Texts(f.texts(9))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "quatcache: encoder 'default' on CPU (AUTO: 576 bytes of " in done.stderr and ": 9 rows" in done.stderr


def test_importing_the_package_loads_neither_torch_nor_lightning():
    script = (
        "import sys, quatcache; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'pytorch_lightning')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_level_of_the_logger_is_the_users(caplog):
    logging.getLogger("quatcache").setLevel(logging.WARNING)
    try:
        fit(Model(cache=CacheConfig()), loader(Texts(texts(9))))
        assert "cached" not in caplog.text
    finally:
        logging.getLogger("quatcache").setLevel(logging.INFO)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            {"mrr": RetrievalMRR()},
            r"'mrr' is a bare RetrievalMRR.*wrap it: .*EmbeddingRetrieval\(RetrievalMRR\(\)\)",
        ),
        (MulticlassAccuracy(5), "configure_metrics returned a MulticlassAccuracy; return a dict"),
    ],
)
def test_metrics_that_cannot_be_updated_are_refused(metrics, message):
    class Measured(Model):
        def configure_metrics(self):
            return metrics

    with pytest.raises(ModelDefinitionError, match=message):
        fit(Measured(), loader(Texts(texts(20))), loader(Texts(texts(20))))


def test_an_encoder_of_another_class_in_the_directory_explains_nothing(tmp_path, caplog):
    class Other(HashingEncoder):
        pass

    with caplog.at_level("INFO", logger="quatcache"):
        for encoder in (HashingEncoder(), Other()):
            fit(Model({"default": encoder}, CacheConfig(save_dir=tmp_path)), loader(Texts(texts(9))))
    assert "differs" not in caplog.text
