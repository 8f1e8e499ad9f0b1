"""Law 9: the model and the loaders are left as found, whatever ends the run."""

from __future__ import annotations

import signal

import pytest
import torch

from quatcache import CacheCallback, CacheConfig
from quatcache.encoders.cached import CachedEncoder
from tests.fits import Failing, HashingEncoder, Model, Texts, fit, loader, same_run, texts, trainer


def snapshot(data_loader):
    return {name: value for name, value in vars(data_loader).items() if name != "_iterator"}


def assert_as_found(model, encoder, loaders, before):
    assert model.encoders["default"] is encoder
    for data_loader, was in zip(loaders, before, strict=True):
        assert snapshot(data_loader) == was


@pytest.mark.parametrize("ending", ["finishes", "error", "ctrl-c", "error in the fill", "max_steps"])
def test_encoders_and_loaders_are_as_before(ending):
    encoder = HashingEncoder()
    model = Model({"default": encoder}, CacheConfig())
    loaders = loader(Texts(texts(40)), shuffle=True), loader(Texts(texts(10)))
    before = [snapshot(data_loader) for data_loader in loaders]
    if ending == "finishes":
        fit(model, *loaders)
    elif ending == "max_steps":
        fit(model, *loaders, max_steps=2)
    elif ending == "error":
        with pytest.raises(RuntimeError, match="boom"):
            fit(model, *loaders, callbacks=[Failing(RuntimeError("boom"))])
    elif ending == "ctrl-c":
        handler = signal.getsignal(signal.SIGINT)
        try:
            with pytest.raises(SystemExit):
                fit(model, *loaders, callbacks=[Failing(KeyboardInterrupt())])
        finally:
            signal.signal(signal.SIGINT, handler)
    else:
        encoder.forward = lambda inputs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            fit(model, *loaders)
        del encoder.forward
    assert_as_found(model, encoder, loaders, before)
    assert model.encode(["oak"]).shape == (1, 5)


def test_a_run_after_an_interrupted_one_trains_as_if_nothing_had_happened(tmp_path):
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    with pytest.raises(RuntimeError):
        fit(model, loader(Texts(texts(40))), callbacks=[Failing(RuntimeError("boom"))])
    plain, cached = Model(), Model(cache=CacheConfig(save_dir=tmp_path))
    for each in (plain, cached):
        fit(each, loader(Texts(texts(40)), shuffle=True))
    assert same_run(plain, cached)


def test_during_training_the_encoders_are_lookups():
    seen = []

    class Looks(Failing):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(type(pl_module.encoders["default"]))

    fit(Model(cache=CacheConfig()), loader(Texts(texts(20))), callbacks=[Looks(None)])
    assert set(seen) == {CachedEncoder}


def test_the_model_encodes_new_texts_in_the_middle_of_a_cached_fit():
    made = []

    class Encodes(Failing):
        def on_train_epoch_start(self, trainer, pl_module):
            made.append(pl_module.encode(["a text that no dataset has"]))

        def on_train_batch_end(self, *args):
            pass

    model = Model(cache=CacheConfig())
    fit(model, loader(Texts(texts(20))), callbacks=[Encodes(None)])
    assert made[0].shape == (1, 5)


def test_one_callback_serves_every_run_of_a_model(tmp_path):
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    run = trainer(max_epochs=1)
    run.fit(model, loader(Texts(texts(20))))
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(Texts(texts(20))))
    assert [type(callback) for callback in run.callbacks].count(CacheCallback) == 1
    assert model.cache_callback.report.encoded == 0


def test_a_callback_given_by_hand_takes_the_place_of_the_models_own():
    mine = CacheCallback(CacheConfig())
    model = Model(cache=None)
    fit(model, loader(Texts(texts(20))), callbacks=[mine])
    assert mine.report.encoded == 20
    assert model.cache_callback.report.encoded == 0


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_runs_cached_as_uncached_and_leaves_the_encoder(stage, tmp_path):
    encoder = HashingEncoder()
    data = loader(Texts(texts(20)))
    outcomes = []
    for cache in (None, CacheConfig(save_dir=tmp_path), CacheConfig(save_dir=tmp_path)):
        model = Model({"default": encoder}, cache)
        outcomes.append(getattr(trainer(), stage)(model, data))
        assert model.encoders["default"] is encoder
    if stage == "predict":
        outcomes = [torch.cat(outcome).tolist() for outcome in outcomes]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert model.cache_callback.report.encoded == 0


def test_a_plain_lightning_module_with_encoders_is_served_by_hand():
    import pytorch_lightning as pl
    from torch import nn

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoders = nn.ModuleDict({"text": HashingEncoder().eval()})
            torch.manual_seed(0)
            self.head = nn.Linear(16, 5)
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.head(self.encoders["text"](batch.inputs["text"])), *batch.targets)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), 0.1)

    def run(config):
        model = Plain()
        callback = CacheCallback(config)
        fit(model, loader(Texts(texts(40)), shuffle=True), callbacks=[callback])
        return model, callback

    (plain, _), (cached, callback) = run(None), run(CacheConfig())
    assert plain.losses == cached.losses
    assert callback.report.encoded == 40
    assert list(cached.state_dict()) == list(plain.state_dict())
