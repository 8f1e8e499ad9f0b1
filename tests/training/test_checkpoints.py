"""Checkpoints hold no frozen weights, and load, strictly, into cached and uncached runs alike."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from quatcache import CacheConfig
from quatcache.encoders import SentenceTransformerEncoder
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, head_of, loader, texts, trainer

CACHES = {"cached": CacheConfig(), "uncached": None}


def train(cache, tmp_path, epochs=2, encoders=None, **settings):
    model = Model(encoders, cache)
    run = fit(
        model,
        loader(Texts(texts(40)), shuffle=True),
        max_epochs=epochs,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, save_last=True)],
        **settings,
    )
    return model, run


@pytest.mark.parametrize("cache", CACHES)
def test_a_checkpoint_is_no_larger_than_what_is_trained(cache, minilm, tmp_path):
    model = Model({"default": SentenceTransformerEncoder(minilm)}, CACHES[cache])
    run = fit(model, loader(Texts(texts(16))), max_epochs=1)
    run.save_checkpoint(tmp_path / "model.ckpt")
    trained = sum(parameter.numel() * 4 for parameter in model.head.parameters())
    assert (tmp_path / "model.ckpt").stat().st_size < 3 * trained + 1_000_000
    assert not [
        key for key in torch.load(tmp_path / "model.ckpt", weights_only=False)["state_dict"] if "encoders" in key
    ]


@pytest.mark.parametrize("cache", CACHES)
def test_a_checkpoint_from_the_middle_of_a_run_is_small_too(cache, tmp_path):
    train(CACHES[cache], tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert sorted(saved) == ["head.1.bias", "head.1.weight"]


def test_training_resumes_alike_across_cached_and_uncached_runs(tmp_path):
    losses = []
    for first in CACHES:
        train(CACHES[first], tmp_path / first)
        for second in CACHES:
            model = Model(cache=CACHES[second])
            pl.seed_everything(0, verbose=False)
            checkpoint = tmp_path / first / "last.ckpt"
            trainer(max_epochs=4).fit(
                model, loader(Texts(texts(40)), shuffle=True), ckpt_path=checkpoint, weights_only=False
            )
            losses.append(model.train_losses)
    assert len(losses[0]) == 2 * 5
    assert losses[0] == losses[1] == losses[2] == losses[3]


@pytest.mark.parametrize("cache", CACHES)
def test_load_from_checkpoint_is_strict_and_complete(cache, tmp_path):
    model, _ = train(CACHES[cache], tmp_path)
    loaded = Model.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False, strict=True)
    assert all(torch.equal(value, head_of(loaded)[name]) for name, value in head_of(model).items())
    assert torch.equal(loaded.encode(["oak"]), model.eval().encode(["oak"]))


def test_a_missing_head_is_still_noticed(tmp_path):
    model = Model()
    state = model.state_dict()
    del state["head.1.weight"]
    with pytest.raises(RuntimeError, match=r"head\.1\.weight"):
        Model().load_state_dict(state)


def test_a_trainable_encoder_is_in_the_checkpoint(tmp_path):
    train(CacheConfig(), tmp_path, encoders={"a": HashingEncoder(), "b": TrainableHashing()})
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert "encoders.b.matrix" in saved
    assert not [key for key in saved if key.startswith("encoders.a")]


def test_a_checkpoint_with_frozen_weights_from_elsewhere_still_loads():
    model = Model()
    state = {**model.state_dict(), "encoders.default.matrix": torch.ones(128, 16)}
    model.load_state_dict(state)
    assert torch.equal(model.encoders["default"].matrix, torch.ones(128, 16))
