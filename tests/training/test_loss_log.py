"""What is logged of losses is what a self.log in each step would show, without a self.log in each step."""

import csv
import math
import pickle
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

from quatcache import CacheConfig
from quatcache.data.batches import BatchReader
from quatcache.data.samples import read_sample
from quatcache.training import loss_log
from quatcache.training.lightning import LightningModule
from quatcache.training.loss_log import LossLog
from tests.fits import Model, Texts, fit, loader, same_run, texts, trainer
from tests.stores_for_tests import Clock

TRAIN, VAL = Texts(texts(44)), Texts(texts(21))  # batches of 8, the last ones smaller


class Quiet(Model):
    """A model whose hooks look at no loss; it counts what is logged for a stage."""

    on_train_batch_end = LightningModule.on_train_batch_end

    def __init__(self, **settings):
        super().__init__(**settings)
        self.logged = []

    def log(self, name, *arguments, **settings):
        self.logged.append(name)
        super().log(name, *arguments, **settings)


class Doubled(Quiet):
    """Logs each loss once more, in each step, as people do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        size = len(batch.targets[0])
        LightningModule.log(self, "plain", loss, batch_size=size, prog_bar=True)
        LightningModule.log(self, "plain_epoch", loss, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = super().validation_step(batch, batch_idx, dataloader_idx)
        LightningModule.log(self, "plain_val", loss, batch_size=len(batch.targets[0]))
        return loss

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        loss = super().test_step(batch, batch_idx, dataloader_idx)
        LightningModule.log(self, "plain_test", loss, batch_size=len(batch.targets[0]))
        return loss


PAIRS = {"train_loss": "plain", "train_loss_epoch": "plain_epoch", "val_loss": "plain_val", "test_loss": "plain_test"}


def written(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def check(rows, expected):
    """Each row has our value exactly where it has the other, and it is the same."""
    seen = set()
    for row in rows:
        for ours, plain in PAIRS.items():
            for name in row:
                if name.startswith(ours) and name.removeprefix(ours)[:1] in {"", "/"}:
                    assert row[name] == row[plain + name.removeprefix(ours)], (name, row)
                    seen |= {name} if row[name] else set()
    assert seen == expected


SETTINGS = {
    "usual": {},
    "every step": {"log_every_n_steps": 1},
    "every third": {"log_every_n_steps": 3},
    "accumulated": {"log_every_n_steps": 2, "accumulate_grad_batches": 2},
    "validation in between": {"log_every_n_steps": 4, "val_check_interval": 2},
    "validation by steps": {"log_every_n_steps": 4, "val_check_interval": 4, "check_val_every_n_epoch": None},
    "few steps": {"max_steps": 8, "max_epochs": -1, "log_every_n_steps": 3},
    "few batches": {"limit_train_batches": 3, "limit_val_batches": 2, "log_every_n_steps": 2},
    "bar": {"enable_progress_bar": True, "log_every_n_steps": 5},
}


@pytest.mark.parametrize("cache", [None, CacheConfig()], ids=["uncached", "cached"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loggers_get_what_a_log_in_each_step_gives(name, cache, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"max_epochs": 3, "log_every_n_steps": 50, **SETTINGS[name]}
    run = fit(Doubled(cache=cache), loader(TRAIN, shuffle=True), loader(VAL), logger=logger, **settings)
    steps = {"train_loss"} if settings["log_every_n_steps"] < 50 else set()
    check(written(tmp_path), steps | {"train_loss_epoch", "val_loss"})
    for ours, plain in list(PAIRS.items())[:3]:
        assert torch.equal(run.callback_metrics[ours], run.callback_metrics[plain]), ours


def test_evaluations_of_every_kind_log_and_return_the_mean(tmp_path):
    model, run = Doubled(), trainer(logger=CSVLogger(tmp_path, name="", version=""))
    for evaluate, stage in ((run.validate, "val"), (run.test, "test")):
        (alone,) = evaluate(model, loader(VAL), verbose=False)
        assert alone[f"{stage}_loss"] == alone[f"plain_{stage}"]
        both = evaluate(model, [loader(VAL), loader(TRAIN)], verbose=False)
        for place, found in enumerate(both):
            suffix = f"/dataloader_idx_{place}"
            assert found[f"{stage}_loss{suffix}"] == found[f"plain_{stage}{suffix}"]


def test_loss_is_not_logged_in_steps_that_nobody_sees():
    model = Quiet(cache=CacheConfig())
    fit(model, loader(Texts(texts(400))), loader(VAL), max_epochs=2, log_every_n_steps=20)
    # steps 20, 40, 60, 80, 100 of 2 x 50, and the last of each epoch; val once an epoch and in the sanity check
    assert model.logged.count("train_loss") == 6 and model.logged.count("val_loss") == 3
    assert model.logged.count("train_loss_epoch") == 2


def test_loss_that_nobody_sees_is_not_read_after_its_step():
    reads = []

    class Model(Quiet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            reads.append([name for name, _ in self.trainer._results.valid_items()])
            return loss

    run = fit(Model(cache=CacheConfig()), loader(Texts(texts(96))), max_epochs=1, log_every_n_steps=4)
    assert [["training_step.train_loss"] if place % 4 == 3 else [] for place in range(11)] == reads[:11]
    assert torch.isfinite(run.callback_metrics["train_loss"])


class Watching(Callback):
    """Looks at the loss after each step."""

    def __init__(self):
        self.seen, self.expected = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.callback_metrics["train_loss"].item())
        self.expected.append(outputs["loss"].item())


def test_whoever_looks_at_each_step_sees_its_loss():
    callback = Watching()
    fit(Quiet(), loader(TRAIN), callbacks=[callback])
    assert callback.seen == callback.expected and len(set(callback.seen)) == 12

    class Model(Quiet):
        seen = ()

        def on_after_backward(self):
            self.seen = (*self.seen, self.trainer.callback_metrics["train_loss"].item())

    model = Model()
    fit(model, loader(TRAIN))
    assert model.seen == tuple(callback.expected)

    seen = []
    watching = LambdaCallback(
        on_train_batch_end=lambda run, *rest: seen.append(run.callback_metrics["train_loss"].item())
    )
    fit(Quiet(), loader(TRAIN), callbacks=[watching])
    assert seen == callback.expected


@pytest.mark.parametrize(
    "hook", ["optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step", "backward"]
)
def test_own_hooks_around_the_optimizer_see_the_loss_of_each_step(hook):
    def look(self, *arguments, **settings):
        result = getattr(LightningModule, hook)(self, *arguments, **settings)
        seen.append(self.trainer.callback_metrics["train_loss"].item())
        return result

    seen, watching, kept = [], Watching(), type("Kept", (Quiet,), {hook: look})()
    if hook == "lr_scheduler_step":
        kept.configure_optimizers = Plateau.configure_optimizers.__get__(kept)
    fit(kept, loader(TRAIN))
    plain = Quiet()
    if hook == "lr_scheduler_step":
        plain.configure_optimizers = Plateau.configure_optimizers.__get__(plain)
    fit(plain, loader(TRAIN), callbacks=[watching])
    assert sorted(set(seen)) == sorted(set(watching.expected))


class Endless(torch.utils.data.IterableDataset):
    """A stream: nobody knows how many batches it has."""

    def __iter__(self):
        return iter([VAL[place] for place in range(len(VAL))])


class LooksEarly(Callback):
    """Looks when a validation epoch ends, before the callbacks of the model."""

    seen = None

    def on_validation_epoch_end(self, trainer, pl_module):
        self.seen = trainer.callback_metrics["val_loss"].item()


def test_mean_of_a_stream_is_there_when_callbacks_look():
    callback = LooksEarly()
    run = fit(
        Doubled(cache=CacheConfig()), loader(TRAIN), loader(Endless()), callbacks=[callback], num_sanity_val_steps=0
    )
    assert callback.seen == run.callback_metrics["plain_val"].item()


def test_run_that_resumes_with_the_same_model_forgets_the_losses_of_the_broken_one(tmp_path):
    model = Doubled(cache=CacheConfig())
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(model, loader(TRAIN), max_epochs=1, callbacks=[saves, BreaksLater()], enable_checkpointing=True)
    watching = Watching()
    run = trainer(max_epochs=1, callbacks=[watching])
    run.fit(model, loader(TRAIN), ckpt_path=tmp_path / "epoch=0-step=2.ckpt")
    assert watching.seen == watching.expected and len(watching.seen) == 4
    assert torch.equal(run.callback_metrics["train_loss_epoch"], run.callback_metrics["plain_epoch"])


class BreaksLater(Callback):
    """Ends training after four batches."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("broken off")


class Plateau(Quiet):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.head.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "monitor": "train_loss"}]


def test_what_acts_on_the_loss_of_a_step_has_it(tmp_path):
    every = dict.fromkeys(["train_loss"], 12)
    for settings in (
        {
            "callbacks": [ModelCheckpoint(tmp_path, monitor="train_loss", every_n_train_steps=2)],
            "enable_checkpointing": True,
        },
        {"callbacks": [Timer()]},
        {"fast_dev_run": 12, "max_epochs": 1},
    ):
        model = Quiet()
        fit(model, loader(Texts(texts(96)) if "fast_dev_run" in settings else TRAIN), **settings)
        assert model.logged.count("train_loss") == every["train_loss"], settings
    model = Plateau()
    fit(model, loader(TRAIN))
    assert model.logged.count("train_loss") == 12


@pytest.mark.parametrize(
    "settings",
    [{}, {"val_check_interval": 2}, {"max_steps": 4, "max_epochs": -1}],
    ids=["epochs", "validations", "steps"],
)
def test_monitors_of_the_training_loss_find_that_of_the_last_step(settings, tmp_path):
    stops = EarlyStopping("train_loss", patience=0, min_delta=100.0)
    checkpoint = ModelCheckpoint(tmp_path, monitor="train_loss", save_top_k=-1, filename="{epoch}-{step}")
    outcomes = []
    for kind in (Quiet, Model):  # the hooks of the other look at each step
        run = fit(
            kind(), loader(TRAIN), loader(VAL), callbacks=[stops, checkpoint], enable_checkpointing=True, **settings
        )
        outcomes.append((stops.best_score, checkpoint.best_model_score, run.global_step))
        stops, checkpoint = (
            EarlyStopping("train_loss", patience=0, min_delta=100.0),
            ModelCheckpoint(tmp_path / "other", monitor="train_loss", save_top_k=-1, filename="{epoch}-{step}"),
        )
    assert [score.item() for score in outcomes[0][:2]] == [score.item() for score in outcomes[1][:2]]
    assert outcomes[0][2] == outcomes[1][2]


def test_progress_bar_shows_a_fresh_loss():
    clock, shown = Clock(), []

    class Bar(TQDMProgressBar):
        def get_metrics(self, run, module):
            metrics = super().get_metrics(run, module)
            clock.now += loss_log.REFRESH_SECONDS / 2  # of a step
            shown.append(metrics.get("train_loss"))
            return metrics

    model = Quiet()
    model.loss_log = LossLog(time_func=clock)
    run = fit(model, loader(TRAIN), max_epochs=1, callbacks=[Bar()], enable_progress_bar=True)
    assert model.logged.count("train_loss") == 4  # every other of six steps, and the last
    assert shown[-1] == run.callback_metrics["train_loss"].item() and None not in shown[:6]


class Short(list):
    """A batch sampler that has fewer batches than it says."""

    def __len__(self):
        return super().__len__() + 2


def test_mean_is_there_although_the_last_batch_came_early():
    model = Doubled(cache=CacheConfig())
    train, val = (torch.utils.data.DataLoader(data, batch_sampler=Short([[0, 1, 2], [3, 4]])) for data in (TRAIN, VAL))
    run = fit(model, train, loader(VAL))
    assert torch.equal(run.callback_metrics["train_loss_epoch"], run.callback_metrics["plain_epoch"])
    run.validate(model, val, verbose=False)
    assert torch.equal(run.callback_metrics["val_loss"], run.callback_metrics["plain_val"])


class Breaking(Callback):
    """Ends the first training or evaluation after two batches."""

    broken = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1 and not self.broken:
            self.broken = True
            raise RuntimeError("broken off")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_what_was_broken_off_is_in_no_mean():
    model, breaking = Doubled(cache=CacheConfig()), Breaking()
    with pytest.raises(RuntimeError, match="broken off"):
        fit(model, loader(TRAIN), callbacks=[breaking])
    run = fit(model, loader(TRAIN), max_epochs=1)
    assert torch.equal(run.callback_metrics["train_loss_epoch"], run.callback_metrics["plain_epoch"])
    run, breaking.broken = trainer(callbacks=[breaking]), False
    with pytest.raises(RuntimeError, match="broken off"):
        run.validate(model, loader(VAL), verbose=False)
    (found,) = trainer().validate(model, loader(VAL), verbose=False)
    assert found["val_loss"] == found["plain_val"]


def test_step_without_a_trainer_gives_its_loss():
    model = Quiet()
    batch = BatchReader(TRAIN, {"default": model.encoders["default"].collate}, read_sample).__getitems__([0, 1])
    with pytest.warns(UserWarning, match="trainer"):
        assert model.training_step(batch, 0).isfinite() and model.validation_step(batch, 0).isfinite()


def test_names_of_lightning_that_are_relied_on_exist():
    run = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert isinstance(run.fit_loop.epoch_loop._results, dict) and isinstance(type(run)._results, property)
    assert run.fit_loop.epoch_loop.total_batch_idx == -1
    assert hasattr(ModelCheckpoint(), "_every_n_train_steps") and hasattr(ModelCheckpoint(), "_train_time_interval")


@pytest.mark.parametrize("cache", [None, CacheConfig()], ids=["uncached", "cached"])
def test_a_compiled_model_trains_and_logs_the_same(cache):
    def run(compiled):
        model = Model(cache=cache)
        pl.seed_everything(0, verbose=False)
        run = trainer()
        given = torch.compile(model, backend="eager") if compiled else model
        run.fit(given, loader(Texts(texts(40)), shuffle=True), loader(Texts(texts(20))))
        return model, {name: value.item() for name, value in run.callback_metrics.items()}

    (plain, logged), (compiled, logged_too) = run(False), run(True)
    assert same_run(plain, compiled)
    assert logged == logged_too
    assert "train" not in vars(plain.loss_log)  # no compiler is imported for it
    pickle.dumps(compiled.loss_log)


LOSSES = {
    "float32": [torch.rand((), generator=torch.Generator().manual_seed(place)) * 9 for place in range(300)],
    "small beside large": [torch.tensor(1e8), torch.tensor(0.3), torch.tensor(-1e8), torch.tensor(1e-7)] * 5,
    "overflow": [torch.tensor(3e38), torch.tensor(3e38)],
    "infinities": [torch.tensor(math.inf), torch.tensor(-math.inf), torch.tensor(1.0)],
    "no number": [torch.tensor(1.0), torch.tensor(math.nan)],
    "float64": [torch.tensor(0.1, dtype=torch.float64)] * 7,
    "bfloat16": [torch.tensor(0.1, dtype=torch.bfloat16)] * 7,
    "one value in a dimension": [torch.tensor([0.7])] * 3,
    "another dtype later": [torch.tensor(0.1), torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.3)],
}


@pytest.mark.parametrize("name", LOSSES)
def test_mean_is_that_of_lightning_bit_for_bit(name):
    log, logged = LossLog(), {}
    module = SimpleNamespace(
        trainer=SimpleNamespace(num_val_batches=[len(LOSSES[name])], sanity_checking=False),
        _trainer=True,
        log=lambda name, value, **settings: logged.update({name: value}),
    )
    metadata = _Metadata("validation_step", "val_loss", on_step=False, on_epoch=True)
    metadata.sync = _Sync()
    plain = _ResultMetric(metadata, is_tensor=True)
    for place, loss in enumerate(LOSSES[name]):
        size = 1 + place % 300
        log.evaluate(module, "val", loss, size, place)
        plain.update(loss, size)
    expected = plain.compute()
    assert logged["val_loss"].dtype == expected.dtype
    assert torch.equal(logged["val_loss"].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)), (logged, expected)


def test_loss_that_is_changed_in_place_after_its_step_is_logged_as_it_was():
    class Penalised(Doubled):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            loss += 5.0
            return loss

    run = fit(Penalised(cache=CacheConfig()), loader(TRAIN), max_epochs=1)
    assert torch.equal(run.callback_metrics["train_loss_epoch"], run.callback_metrics["plain_epoch"])
