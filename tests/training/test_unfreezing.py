"""Unfreezing in the middle of a cached fit: the cache steps aside, and training goes on as it would without one."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import BaseFinetuning, Callback
from torch import nn
from torch.utils.data import DataLoader, Sampler

from quatcache import CacheConfig, CacheType, SimilarityPairSample
from quatcache.encoders.cached import CachedEncoder
from quatcache.errors import NotFrozenError
from quatcache.losses import MultipleNegativesRankingLoss
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts


class Thawable(HashingEncoder):
    """Frozen weights that a callback can unfreeze."""

    def __init__(self, seed=0):
        super().__init__(seed)
        matrix = self.matrix
        del self.matrix
        self.matrix = nn.Parameter(matrix, requires_grad=False)


class Thaws(BaseFinetuning):
    """Unfreezes an encoder at the start of the second epoch, as fine-tuning recipes do."""

    def __init__(self, name="default"):
        super().__init__()
        self.name = name

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.encoders[self.name])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoders[self.name], optimizer, lr=0.01)


class ThawsAtStep(Callback):
    """Unfreezes in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            matrix = pl_module.encoders["default"].matrix
            matrix.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [matrix], "lr": 0.01})


def run(cache, thaw=Thaws, data=None, val=True, encoders=None, loss=None, epochs=4, **settings):
    model = Model(encoders or {"default": Thawable()}, cache=cache, loss=loss)
    train = loader(data or Texts(texts(44)), shuffle=True, **settings)
    fit(model, train, loader(Texts(texts(10))) if val else None, callbacks=[thaw()], max_epochs=epochs)
    return model


def trained(model):
    return model.encoders["default"].matrix.detach().clone()


@pytest.mark.parametrize(
    "cache",
    [
        {},
        {"labels": False},
        {"cache_type": CacheType.DISK},
        {"num_workers": 1, "labels": True},
        {"mapping": {"default": CacheType.CPU}},
    ],
    ids=["labels cached", "labels read", "disk", "fill with a worker", "by name"],
)
def test_training_goes_on_as_it_would_without_a_cache(tmp_path, cache, caplog):
    plain = run(None)
    model = run(CacheConfig(save_dir=tmp_path, **cache))
    assert same_run(model, plain) and torch.equal(trained(model), trained(plain))
    assert not torch.equal(trained(plain), Thawable().matrix), "the encoder was not trained"
    assert type(model.encoders["default"]) is Thawable
    (message,) = [text for text in caplog.messages if "steps aside" in text]
    assert message.startswith("Encoder 'default' was unfrozen (parameter 'matrix'): the cache steps aside")


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("step", [0, 2, 5, 9])
def test_unfreezing_at_any_step_takes_effect_at_that_step(step, labels):
    runs = [run(cache, lambda: ThawsAtStep(step)) for cache in (None, CacheConfig(labels=labels))]
    assert same_run(*runs) and torch.equal(*(trained(model) for model in runs))


class ThawsAndCounts(Thaws):
    """Notes how often this process has read a dataset when each epoch starts."""

    def __init__(self, data):
        super().__init__()
        self.data, self.reads = data, []

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        self.reads.append(self.data.reads)


@pytest.mark.parametrize("labels", [True, False])
def test_workers_of_the_loader_read_again(labels):
    runs, reads = [], []
    for cache in (None, CacheConfig(labels=labels)):
        thaw = ThawsAndCounts(Texts(texts(44)))
        runs.append(run(cache, lambda thaw=thaw: thaw, data=thaw.data, num_workers=1, val=False))
        reads.append(thaw.data.reads - thaw.reads[2])
    assert same_run(*runs) and torch.equal(*(trained(model) for model in runs))
    assert reads == [0, 0]  # none here, but in the workers


@pytest.mark.parametrize("thaw", [Thaws, lambda: ThawsAtStep(7)], ids=["epoch", "step"])
def test_all_encoders_step_aside_together(thaw):
    runs = [
        run(cache, thaw, encoders={"default": Thawable(), "other": HashingEncoder(3)})
        for cache in (None, CacheConfig(), CacheConfig(mapping={"other": CacheType.NONE}))
    ]
    for model in runs[1:]:
        assert same_run(model, runs[0]) and torch.equal(trained(model), trained(runs[0]))
        assert not any(isinstance(encoder, CachedEncoder) for encoder in model.encoders.values())


@pytest.mark.parametrize("thaw", [Thaws, lambda: ThawsAtStep(3)], ids=["epoch", "step"])
def test_pairs_step_aside_alike(thaw):
    words = texts(40)
    pairs = [SimilarityPairSample(words[n], words[n + 20], 1.0, n) for n in range(20)]
    runs = [
        run(cache, thaw, data=pairs, val=False, loss=MultipleNegativesRankingLoss()) for cache in (None, CacheConfig())
    ]
    assert same_run(*runs) and torch.equal(*(trained(model) for model in runs))


def test_several_train_loaders_step_aside_in_the_middle_of_an_epoch():
    class Both(Model):
        def training_step(self, batch, batch_idx):
            return sum(super(Both, self).training_step(part, batch_idx) for part in batch.values())

    runs = []
    for cache in (None, CacheConfig()):
        model = Both({"default": Thawable()}, cache=cache)
        both = {"a": loader(Texts(texts(24)), shuffle=True), "b": loader(Texts(texts(32)), shuffle=True)}
        fit(model, both, callbacks=[ThawsAtStep(2)], max_epochs=2)
        runs.append(model)
    assert same_run(*runs) and torch.equal(*(trained(model) for model in runs))


def test_loaders_that_are_made_anew_are_plain_ones():
    class Reloading(Model):
        def train_dataloader(self):
            return loader(Texts(texts(30)), shuffle=True)

    runs = []
    for cache in (None, CacheConfig()):
        model = Reloading({"default": Thawable()}, cache=cache)
        fit(model, None, callbacks=[Thaws()], max_epochs=4, reload_dataloaders_every_n_epochs=1)
        runs.append(model)
    assert same_run(*runs) and torch.equal(*(trained(model) for model in runs))


def test_unfrozen_weights_are_saved_and_loaded(tmp_path):
    model = Model({"default": Thawable()}, cache=CacheConfig())
    done = fit(model, loader(Texts(texts(30))), callbacks=[Thaws()], max_epochs=3)
    done.save_checkpoint(tmp_path / "all.ckpt")
    other = Model({"default": Thawable()})
    state = torch.load(tmp_path / "all.ckpt", weights_only=True)["state_dict"]
    assert "encoders.default.matrix" in state
    other.load_state_dict(state)
    assert torch.equal(trained(other), trained(model))
    frozen = Model({"default": Thawable()})
    assert not any(key.startswith("encoders.") for key in frozen.state_dict())


def test_report_measures_the_epochs_with_the_cache_only():
    model = run(CacheConfig())
    assert len(model.cache_callback.report.epoch_seconds) == 1


def test_next_fit_is_refused_until_the_encoder_is_frozen_again(tmp_path):
    model = run(CacheConfig(save_dir=tmp_path))
    with pytest.raises(NotFrozenError, match="its parameter 'matrix' requires a gradient"):
        fit(model, loader(Texts(texts(20))))
    model.encoders.requires_grad_(False)
    fit(model, loader(Texts(texts(20))))
    assert model.cache_callback.report.encoded == 20  # with other weights it is another encoder


def test_unfreezing_on_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("pytorch_lightning.Trainer.world_size", property(lambda self: 2))
    with pytest.raises(NotFrozenError, match=r"'default' was unfrozen .* on 2 processes .*; train the last epochs in"):
        run(CacheConfig())


class Lengthless(Sampler):
    """Batches whose number is not known ahead: Lightning then fetches each batch before the step of the one before."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return (part.tolist() for part in torch.randperm(self.size).split(8))


@pytest.mark.parametrize("fill", ["eager", "lazy"])
def test_a_batch_that_was_fetched_ahead_gets_its_samples(fill):
    models = [Model({"default": Thawable()}, cache) for cache in (CacheConfig(fill=fill), None)]
    for model in models:
        train = DataLoader(Texts(texts(50)), batch_sampler=Lengthless(50))
        fit(model, train, max_epochs=3, callbacks=[ThawsAtStep(9)])
    assert same_run(*models)
    assert torch.equal(trained(models[0]), trained(models[1]))
