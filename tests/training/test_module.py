"""What TrainableModel gives a user beside the cache."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.retrieval import RetrievalMRR, RetrievalPrecision

from quatcache import CacheCallback, CacheConfig, ServableModel, SimilarityPairSample, TrainableModel
from quatcache.data import Batch
from quatcache.errors import ConfigError, LoaderError, ModelDefinitionError
from quatcache.heads import LinearHead
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.metrics import EmbeddingRetrieval
from quatcache.training.plan import plan
from tests.fits import Failing, HashingEncoder, Model, Texts, fit, loader, same_run, texts, trainer

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


def test_loaders_that_the_trainer_leaves_out_are_not_asked_for():
    class NoValidation(WithLoaders):
        def val_dataloader(self):
            raise FileNotFoundError("there are no validation data")

    model = NoValidation(cache=CacheConfig())
    trainer(limit_val_batches=0).fit(model)
    assert model.cache_callback.report.encoded == 40


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
        (MulticlassAccuracy(5), r"configure_metrics returned MulticlassAccuracy\(\); return a dict of torchmetrics"),
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


@pytest.mark.parametrize("cache", [None, CacheConfig()], ids=["plain", "cached"])
def test_metrics_are_named_for_the_loaders_of_their_own_run(cache):
    class Measured(Model):
        def configure_metrics(self):
            return {"acc": MulticlassAccuracy(5)}

    model, data = Measured(cache=cache), loader(Texts(texts(20)))
    run = fit(model, data, [data, data])
    assert {"val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1"} < set(run.callback_metrics)
    logged = trainer().test(model, data, verbose=False)
    assert [set(metrics) for metrics in logged] == [{"test_loss", "test_acc"}]
    logged = trainer().validate(model, data, verbose=False)
    assert [set(metrics) for metrics in logged] == [{"val_loss", "val_acc"}]


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(99, 5),
        nn.Sequential(nn.Linear(99, 5), nn.ReLU()),
        nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(99, 5))),
        LinearHead(99, 5),
    ],
    ids=["linear", "sequential", "nested", "own"],
)
def test_a_head_of_another_width_is_refused_when_the_model_is_made(head):
    with pytest.raises(ConfigError, match="the encoders give 16 values per item, the head takes 99; make them agree"):
        Model(head=head)


def test_a_head_may_take_what_a_model_of_its_own_making_gives_it():
    class Doubled(Model):
        def forward(self, inputs):
            rows = inputs["default"] if torch.is_tensor(inputs["default"]) else None
            rows = self.encoders["default"](inputs["default"]) if rows is None else self.encoders["default"](rows)
            return self.head(torch.cat([rows, rows], dim=1))

    fit(Doubled(head=nn.Linear(32, 5), cache=CacheConfig()), loader(Texts(texts(20))), max_epochs=1)
    fit(Model(head=nn.Sequential(nn.LazyLinear(5))), loader(Texts(texts(20))), max_epochs=1)
    assert Model(head=nn.Sequential(nn.Flatten(), nn.Linear(99, 5))).head[1].in_features == 99  # nothing shows


def test_a_loss_that_does_not_take_pairs_is_told_how_it_is_called():
    pairs = [SimilarityPairSample(text, text) for text in texts(8)]
    message = r"called for pairs as loss\(embeddings, pairs, labels, subgroups\), which CrossEntropyLoss does not take"
    with pytest.raises(ModelDefinitionError, match=message):
        fit(Model(cache=CacheConfig()), loader(pairs, collate_fn=None))

    class OfPairs(nn.Module):
        def forward(self, embeddings, pairs, labels, subgroups):
            return embeddings.sum()

    message = r"called for groups as loss\(embeddings, groups\), which OfPairs does not take"
    with pytest.raises(ModelDefinitionError, match=message):
        fit(Model(loss=OfPairs()), loader(Texts(texts(20))))


def test_an_error_within_a_loss_is_not_explained_away():
    class Broken(nn.Module):
        def forward(self, embeddings, groups):
            return embeddings + "a"

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        fit(Model(loss=Broken()), loader(Texts(texts(20))))
    assert not isinstance(caught.value, ModelDefinitionError)


@pytest.mark.parametrize(("returned", "shown"), [({"a": 1}, "{'a': 1}"), (CacheConfig, "<class '.*CacheConfig'>")])
def test_caches_that_are_no_config_are_refused(returned, shown):
    class Wrong(Model):
        def configure_caches(self):
            return returned

    with pytest.raises(
        ModelDefinitionError, match=f"Wrong.configure_caches returned {shown}; return a CacheConfig, or"
    ):
        fit(Wrong(), loader(Texts(texts(20))))
    with pytest.raises(
        ModelDefinitionError, match=f"Wrong.configure_caches returned {shown}; return a CacheConfig, or"
    ):
        plan(Wrong(), loader(Texts(texts(20))))
    with pytest.raises(ConfigError, match=f"config is {shown}; pass a CacheConfig, or None"):
        CacheCallback(returned)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"m": 3}, "configure_metrics returned 3 as metric 'm'; return a dict of torchmetrics"),
        (
            [MulticlassAccuracy(5)],
            r"configure_metrics returned \[MulticlassAccuracy\(\)\]; return a dict of torchmetrics",
        ),
    ],
)
def test_metrics_of_another_kind_are_refused_before_the_fill(metrics, message):
    class Measured(Model):
        def configure_metrics(self):
            return metrics

    model, data = Measured(cache=CacheConfig()), Texts(texts(20))
    with pytest.raises(ModelDefinitionError, match=message):
        fit(model, loader(data), loader(data))
    assert model.cache_callback.report.encoded == 0 and data.reads == 0


def together(kind):
    """Two train loaders of which each step gets a batch of each."""
    one, two = loader(Texts(texts(20))), loader(Texts(texts(12)))
    return {
        "dict": {"a": one, "b": two},
        "list": [one, two],
        "combined": CombinedLoader({"a": one, "b": two}, "min_size"),
    }[kind]


@pytest.mark.parametrize("cache", [None, CacheConfig()], ids=["plain", "cached"])
@pytest.mark.parametrize(("kind", "batch"), [("dict", "dict"), ("list", "list"), ("combined", "dict")])
def test_train_loaders_that_a_step_gets_together_are_refused_before_the_fill(kind, batch, cache):
    model, loaders = Model(cache=cache), together(kind)
    message = (
        f"fit was given 2 train loaders, so a step gets a {batch} of Batches: concatenate the datasets, or override "
        "training_step to take it"
    )
    with pytest.raises(LoaderError, match=message):
        fit(model, loaders)
    assert model.cache_callback.report.encoded == 0
    with pytest.raises(LoaderError, match=r"fit was given 1 train loader in a list, so .*: pass the loader itself"):
        fit(model, [loader(Texts(texts(20)))])


def test_a_step_of_the_models_own_takes_loaders_together():
    class Together(Model):
        def training_step(self, batch, batch_idx):
            return sum(super(Together, self).training_step(part, batch_idx) for part in batch.values())

    model = Together(cache=CacheConfig())
    fit(model, together("dict"))
    assert model.cache_callback.report.encoded > 0


def test_a_step_that_is_given_several_batches_says_so():
    batch = {"a": Batch({}, ()), "b": Batch({}, ())}
    with pytest.raises(LoaderError, match="fit was given 2 train loaders, so a step gets a dict of Batches"):
        Model().training_step(batch, 0)
    with pytest.raises(LoaderError, match=r"a val step got a dict of 2 Batches.*mode 'sequential', or override"):
        Model().validation_step(batch, 0)


class Counting(CacheCallback):
    """A callback of the user's own that goes on where the cache's ends."""

    ended = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.ended += 1


def test_lightning_enters_no_hook_of_a_step_that_does_nothing():
    def entered(callback, model):
        profiler = SimpleProfiler()
        fit(model, loader(Texts(texts(24))), callbacks=[callback] if callback else [], max_epochs=1, profiler=profiler)
        name = type(callback).__name__ if callback else "CacheCallback"
        times = {action: len(found) for action, found in profiler.recorded_durations.items()}
        begin = f"[Callback]{name}."
        return {action.removeprefix(begin) for action, n in times.items() if action.startswith(begin) and n == 3}

    assert entered(None, Model(cache=CacheConfig())) == {"on_train_batch_start"}
    callback = Counting(CacheConfig())
    assert entered(callback, Model()) == {"on_train_batch_start", "on_train_batch_end"}
    assert callback.ended == 3
    assert pickle.loads(pickle.dumps(callback)).ended == 3


class Recording(PassThroughProfiler):
    """A profiler of the user's own, on what Lightning offers for none."""

    def __init__(self):
        super().__init__()
        self.started = []

    def start(self, action_name):
        self.started.append(action_name)


@pytest.mark.parametrize("profiler", [SimpleProfiler, Recording], ids=["Lightning's", "own"])
def test_a_profiler_sees_all_of_a_cached_step(profiler):
    profiler = profiler()
    fit(Model(cache=CacheConfig()), loader(Texts(texts(24))), max_epochs=1, profiler=profiler)
    seen = profiler.started if isinstance(profiler, Recording) else profiler.recorded_durations
    assert {"run_training_batch", "[Callback]CacheCallback.on_train_batch_start"} <= set(seen)


def test_a_step_without_a_profiler_enters_none_and_the_trainer_is_left_as_it_was():
    class Looking(Callback):
        def on_train_batch_end(self, trainer, *args):
            entered.append(type(trainer.profiler.profile("an action")))

    entered = []
    run = fit(Model(cache=CacheConfig()), loader(Texts(texts(24))), max_epochs=1, callbacks=[Looking()])
    assert entered == [nullcontext] * 3
    assert type(run.profiler) is PassThroughProfiler and "profile" not in vars(run.profiler)
    with pytest.raises(RuntimeError, match="boom"):
        run = trainer(callbacks=[Failing(RuntimeError("boom"))])
        run.fit(Model(cache=CacheConfig()), loader(Texts(texts(24))))
    assert "profile" not in vars(run.profiler)
