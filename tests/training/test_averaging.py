"""Callbacks that average weights leave frozen encoders as they are, bit for bit, and average what trains."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning import callbacks
from torch.optim.swa_utils import AveragedModel

from quatcache import CacheConfig
from quatcache.encoders import SentenceTransformerEncoder
from tests.fits import Model, Texts, TrainableHashing, fit, loader, same_run, texts, trainer
from tests.tiny import write_tiny
from tests.training.test_unfreezing import Thawable, Thaws

pytestmark = pytest.mark.skipif(
    not hasattr(callbacks, "EMAWeightAveraging"), reason="this version of Lightning averages no weights"
)

VALIDATION = [f"{text} again" for text in texts(30)]


def averaging():
    return callbacks.EMAWeightAveraging(decay=0.9)


def run(cache, encoder=Thawable, also=(), **settings):
    model = Model({"default": encoder()}, cache)
    fit(
        model, lambda: loader(Texts(texts(40)), shuffle=True), loader(Texts(VALIDATION)),
        callbacks=[averaging(), *also], **{"max_epochs": 3, **settings},
    )  # fmt: skip
    return model


@pytest.mark.parametrize("settings", [{}, {"max_steps": 8}, {"val_check_interval": 2}], ids=str)
@pytest.mark.parametrize("cache", [{}, {"fill": "lazy"}, {"max_size": 1000}, {"labels": False}], ids=str)
def test_training_and_validation_are_those_without_a_cache(cache, settings, tmp_path):
    model = run(CacheConfig(save_dir=tmp_path, **cache), **settings)
    assert same_run(run(None, **settings), model)
    assert torch.equal(model.encoders["default"].matrix, Thawable().matrix)


def test_rows_are_found_by_the_runs_that_follow(tmp_path):
    model = run(CacheConfig(save_dir=tmp_path))
    trainer().test(model, loader(Texts(texts(40))), verbose=False)
    assert model.cache_callback.report.encoded == 0
    assert run(CacheConfig(save_dir=tmp_path)).cache_callback.report.encoded == 0


def test_a_warm_run_of_an_adapter_trains_alike(minilm_path, tmp_path):
    folder = write_tiny(tmp_path / "model", minilm_path)

    def encoder():
        return SentenceTransformerEncoder(folder)

    cold, warm = (run(CacheConfig(save_dir=tmp_path / "cache"), encoder) for _ in range(2))
    assert warm.cache_callback.report.encoded == 0
    assert same_run(cold, warm)


def test_what_trains_is_averaged(tmp_path):
    model = Model({"default": TrainableHashing()})
    kept = averaging()
    fit(model, loader(Texts(texts(40))), callbacks=[kept], max_steps=4)
    plain = Model({"default": TrainableHashing()})
    fit(plain, loader(Texts(texts(40))), max_steps=4)
    assert model.train_losses == plain.train_losses
    assert not torch.equal(model.encoders["default"].matrix, plain.encoders["default"].matrix)


class OfTheHead(callbacks.Callback):
    """Averages a part of the model, in an attribute that is named like Lightning's."""

    def setup(self, trainer, pl_module, stage):
        self._average_model = AveragedModel(pl_module.head)


def test_an_average_of_a_part_is_left_alone():
    model = Model(cache=CacheConfig())
    fit(model, loader(Texts(texts(16))), loader(Texts(texts(8))), callbacks=[OfTheHead()])
    assert model.cache_callback.report.encoded == 16


class Keeps(callbacks.Callback):
    """Keeps the weights of the encoder as the last step left them."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last = pl_module.encoders["default"].matrix.detach().clone()


def test_an_encoder_that_is_unfrozen_is_averaged_from_then_on(tmp_path):
    keeps = Keeps()
    plain, cached = (
        run(cache, also=[Thaws(), keeps], max_epochs=4) for cache in (None, CacheConfig(save_dir=tmp_path))
    )
    assert same_run(plain, cached)
    averaged = cached.encoders["default"].matrix
    assert torch.equal(plain.encoders["default"].matrix, averaged)
    assert not torch.equal(averaged, Thawable().matrix)
    assert not torch.equal(averaged, keeps.last)
