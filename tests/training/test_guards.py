"""What could change behind a cache is noticed, and what surrounds a fit works with a cache as without one."""

from __future__ import annotations

import copy
import itertools
import random
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, Sampler, Subset

from quatcache import CacheCallback, CacheConfig, Encoder
from quatcache.data import Batch
from quatcache.encoders.weights import tensor_digest
from quatcache.errors import ConfigError, ModelDefinitionError, NotFrozenError, StoreError
from quatcache.training import guards
from quatcache.training.guards import FrozenGuard
from tests.fits import Failing, HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts, trainer


@pytest.fixture(autouse=True)
def always_thorough(monkeypatch):
    """Digest all weights at each look: small fits are over before it would be their turn."""
    monkeypatch.setattr("quatcache.training.guards.SHARE_OF_TIME", float("inf"))


def test_weights_are_digested_as_often_as_their_share_of_time_allows(monkeypatch):
    monkeypatch.setattr("quatcache.training.guards.SHARE_OF_TIME", 0.01)
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    encoder = Linear()
    guard = FrozenGuard({"default": encoder}, time_func=tick)
    guard.remember()  # takes a second
    encoder.linear.weight.data += 1.0
    guard.check_unchanged()
    now[0] += 100.0
    with pytest.raises(NotFrozenError, match=r"linear\.weight"):
        guard.check_unchanged()


def replaced(encoder):
    encoder.linear.weight = nn.Parameter(encoder.linear.weight + 1, requires_grad=False)


def written(encoder):
    encoder.linear.weight.add_(1)


def moved(encoder):
    encoder.linear.weight.data = encoder.linear.weight.data + 1


@pytest.mark.parametrize("change", [replaced, written, moved])
def test_a_step_notices_weights_that_torch_says_were_changed_without_looking_at_all_modules(change, monkeypatch):
    monkeypatch.setattr("quatcache.training.guards.SHARE_OF_TIME", 0.0)
    looked = []
    look = guards._look
    monkeypatch.setattr(guards, "_look", lambda one, before, thorough: looked.append(1) or look(one, before, thorough))
    encoder = Linear()
    guard = FrozenGuard({"default": encoder}, time_func=itertools.count().__next__)
    guard.remember()
    guard.check_in_step()  # finds out what a look costs
    looked.clear()
    guard.check_in_step()
    assert not looked
    change(encoder)
    with pytest.raises(NotFrozenError, match=r"linear\.weight"):
        guard.check_in_step()


def test_a_step_notices_other_changes_when_looks_have_become_cheap_again(monkeypatch):
    monkeypatch.setattr("quatcache.training.guards.SHARE_OF_TIME", 0.01)
    now = [0.0]
    encoder = Linear()
    encoder.table = np.ones(3)  # of an array, torch sees nothing
    guard = FrozenGuard({"default": encoder}, time_func=lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    guard.remember()
    guard.check_in_step()
    encoder.table[0] = 2.0
    guard.check_in_step()
    now[0] += 500.0
    with pytest.raises(NotFrozenError, match="table"):
        guard.check_in_step()


class Linear(Encoder):
    """An ordinary frozen layer with parameters, applied row by row."""

    embedding_size = 4

    def __init__(self):
        torch.manual_seed(5)
        self.linear = nn.Linear(4, 4).requires_grad_(False)

    def collate(self, items):
        return torch.stack(items)

    def forward(self, inputs):
        return torch.stack([self.linear(row) for row in inputs])


def vectors(count=40):
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(4, generator=generator), i % 5) for i in range(count)]


def both(data=None, encoder=Linear, cache=None, kind=Model, **settings):
    """Fit with and without a cache; give both models."""
    models = []
    callbacks = settings.pop("callbacks", list)
    given = settings.pop("loader", {"shuffle": True})
    for config in (None, cache or CacheConfig()):
        model = kind({"default": encoder()}, config)
        fit(model, loader(data() if data else vectors(), **given), callbacks=callbacks(), **settings)
        models.append(model)
    return models


def test_a_trainer_that_is_used_again_takes_the_cache_of_the_next_model(tmp_path):
    run = trainer(max_epochs=1)
    first = Model(cache=CacheConfig(save_dir=tmp_path))
    run.fit(first, loader(Texts(texts(20))))
    second = Model(cache=None)
    run.fit_loop.max_epochs = 2
    run.fit(second, loader(Texts(texts(20))))
    assert [callback for callback in run.callbacks if isinstance(callback, CacheCallback)] == [second.cache_callback]
    assert second.cache_callback.report.encoders == {}


def test_targets_that_differ_at_each_read_are_not_cached():
    class Noisy(Texts):
        def __getitem__(self, index):
            return self.texts[index], random.randrange(5)

    plain, cached = both(lambda: Noisy(texts(40)), HashingEncoder, loader={"shuffle": False})
    assert "differs between two reads" in cached.cache_callback.report.labels_reason
    assert len(cached.train_losses) == len(plain.train_losses)


def test_a_rare_augmentation_is_refused_too():
    class Rare(Texts):
        def __getitem__(self, index):
            return self.texts[index].upper() if random.random() < 0.1 else self.texts[index], 0

    with pytest.raises(ConfigError, match=r"item \d+ of the train dataset differs between two reads"):
        fit(Model(cache=CacheConfig()), loader(Rare(texts(400))))


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_hooks_that_change_batches_are_refused_with_a_cache_only(hook):
    def add(self, batch, dataloader_idx):
        return Batch({name: value + 1.0 for name, value in batch.inputs.items()}, batch.targets)

    kind = type("Shifts", (Model,), {hook: add})
    fit(kind({"default": Linear()}), loader(vectors()))
    with pytest.raises(ConfigError, match=f"Shifts.{hook} would be given cached rows"):
        fit(kind({"default": Linear()}, CacheConfig()), loader(vectors()))


def test_a_warm_start_proves_the_encoder_frozen_as_well(tmp_path):
    fit(Model({"default": Linear()}, CacheConfig(save_dir=tmp_path)), loader(vectors()))
    thawed = Linear()
    thawed.linear.requires_grad_(True)
    with pytest.raises(NotFrozenError, match=r"linear\.weight"):
        fit(Model({"default": thawed}, CacheConfig(save_dir=tmp_path)), loader(vectors()))


def test_weights_that_are_written_after_the_fill_are_noticed():
    class Writes(Model):
        def on_fit_start(self):
            with torch.no_grad():
                self.encoders.real()["default"].linear.weight.add_(1.0)

    with pytest.raises(NotFrozenError, match="weights of encoder 'default' were changed after its rows were cached"):
        fit(Writes({"default": Linear()}, CacheConfig()), loader(vectors()))


class Scaled(Linear):
    """A frozen layer, an activation, and a plain tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.activation = nn.ReLU()
        self.scale = torch.ones(4)

    def forward(self, inputs):
        return self.activation(super().forward(inputs)) * self.scale


def written_in_place(encoder):
    with torch.no_grad():
        encoder.linear.weight.add_(1.0)


def written_through_data(encoder):
    encoder.linear.weight.data.add_(1.0)


def written_through_numpy(encoder):
    encoder.linear.bias.numpy()[:] = 7.0


def plain_tensor_written(encoder):
    encoder.scale.mul_(2.0)


def layer_swapped(encoder):
    encoder.linear = nn.Linear(4, 4).requires_grad_(False)


def activation_swapped(encoder):
    encoder.activation = nn.Tanh()


def layer_added(encoder):
    encoder.extra = nn.Linear(4, 4).requires_grad_(False)


CHANGES = {
    written_in_place: "weight 'linear.weight'", written_through_data: "weight 'linear.weight'",
    written_through_numpy: "weight 'linear.bias'", plain_tensor_written: "weight 'scale'",
    layer_swapped: "weight 'linear.weight' and 1 more", activation_swapped: "module 'activation'",
    layer_added: "weight 'extra.weight' and 2 more",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_in_the_middle_of_a_fit_is_refused_at_the_next_epoch(change):
    class Changes(Callback):
        ended = 0

        def on_train_epoch_end(self, trainer, pl_module):
            self.ended += 1
            change(pl_module.encoders.real()["default"])

    changes = Changes()
    with pytest.raises(NotFrozenError, match=rf"after its rows were cached \({CHANGES[change]}\)"):
        fit(Model({"default": Scaled()}, CacheConfig()), loader(vectors()), callbacks=[changes], max_epochs=3)
    assert changes.ended == 1


def test_rows_of_a_changed_encoder_do_not_join_those_before():
    guard = FrozenGuard({"default": Scaled()})
    guard.remember()
    written_through_data(guard._encoders["default"])
    with pytest.raises(NotFrozenError):
        guard.remember()


@pytest.mark.parametrize("cheap", [True, False])
def test_same_values_in_another_place_are_no_change(monkeypatch, cheap):
    monkeypatch.setattr(guards, "_is_cheap", lambda tensor: cheap)
    encoder = Scaled()
    guard = FrozenGuard({"default": encoder})
    guard.remember()
    encoder.scale = encoder.scale.clone()
    encoder.linear.weight.data = encoder.linear.weight.data.clone()
    with torch.no_grad():
        encoder.linear.bias.copy_(encoder.linear.bias.clone())
    guard.check_unchanged()


def test_tensors_of_an_accelerator_are_digested_only_where_something_was_written(monkeypatch):
    monkeypatch.setattr(guards, "_is_cheap", lambda tensor: False)
    digested = []
    monkeypatch.setattr(guards, "tensor_digest", lambda tensor: digested.append(1) or tensor_digest(tensor))
    encoder = Scaled()
    guard = FrozenGuard({"default": encoder})
    guard.remember()
    assert len(digested) == 3
    guard.check_unchanged()
    assert len(digested) == 3
    plain_tensor_written(encoder)
    with pytest.raises(NotFrozenError, match="weight 'scale'"):
        guard.check_unchanged()
    assert len(digested) == 4


@pytest.mark.parametrize("cheap", [True, False])
def test_tensors_made_in_inference_mode_are_compared_as_well(monkeypatch, cheap):
    monkeypatch.setattr(guards, "_is_cheap", lambda tensor: cheap)
    encoder = Scaled()
    with torch.inference_mode():
        encoder.scale = torch.ones(4)
    guard = FrozenGuard({"default": encoder})
    guard.remember()
    guard.check_unchanged()
    with torch.inference_mode():
        encoder.scale.mul_(2.0)
    with pytest.raises(NotFrozenError, match="weight 'scale'"):
        guard.check_unchanged()


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)],
        lambda: [EarlyStopping("train_loss", patience=1)],
        lambda: [LearningRateFinder(num_training_steps=10)],
    ],
    ids=["averaging", "early stopping", "rate finder"],
)
def test_callbacks_that_copy_or_stop_the_model_train_alike(callbacks, tmp_path):
    plain, cached = both(callbacks=callbacks, max_epochs=4, default_root_dir=tmp_path)
    assert same_run(plain, cached)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_inputs_are_converted_to_the_precision_of_the_trainer(precision):
    assert same_run(*both(precision=precision))


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}])
def test_settings_of_the_optimisation_train_alike(settings):
    assert same_run(*both(**settings))


class NoLength(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        return iter(torch.randperm(40).tolist())


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": NoLength()},
        {"sampler": [-1, -2, 0, 1] * 4},
        {"batch_size": 1, "batch_sampler": [np.array([1, 2], np.uint8), [3]]},
        {"sampler": torch.arange(20)},
    ],
    ids=["no length", "negative", "small integers", "tensors"],
)
def test_every_kind_of_index_trains_alike(settings):
    assert same_run(*both(loader=settings))


@pytest.mark.parametrize("size", [1, 7, 8, 40, 41])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_of_any_size_and_a_generator_of_the_users_draw_alike(size, drop_last):
    if drop_last and size > 40:
        return
    runs = []
    for cache in (None, CacheConfig()):
        model = Model({"default": Linear()}, cache)
        shared = torch.Generator().manual_seed(9)
        data = DataLoader(vectors(), size, shuffle=True, drop_last=drop_last, generator=shared)
        val = DataLoader(vectors(), 16, sampler=torch.utils.data.RandomSampler(vectors(), generator=shared))
        fit(model, data, val, max_epochs=3)
        runs.append((model, shared.get_state()))
    assert same_run(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_rows_of_truth_values_are_cached():
    class Signs(HashingEncoder):
        def forward(self, inputs):
            return super().forward(inputs) > 0

    class Head(nn.Linear):
        def forward(self, rows):
            return super().forward(rows.float())

    model = Model({"default": Signs()}, CacheConfig(), head=Head(16, 5))
    fit(model, loader(Texts(texts(20))))
    assert model.cache_callback.report.encoded == 20


def test_a_copy_made_in_the_middle_of_a_fit_is_a_model_of_its_own():
    class Keeps(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.best = copy.deepcopy(pl_module)

    keeps = Keeps()
    fit(Model({"default": Linear()}, CacheConfig()), loader(vectors()), callbacks=[keeps])
    assert isinstance(keeps.best.encoders["default"], Linear)
    trainer().validate(keeps.best, loader(vectors(10)), verbose=False)


@pytest.mark.parametrize("persists", [True, False])
def test_one_encoder_under_two_names_encodes_once(persists, tmp_path):
    encoder = HashingEncoder()
    model = Model({"a": encoder, "b": encoder}, CacheConfig(save_dir=tmp_path if persists else None))
    fit(model, loader(Texts(texts(20))))
    assert model.cache_callback.report.encoded == 20


def test_a_run_inside_a_run_of_the_same_model_is_refused():
    class Nests(Callback):
        def on_train_batch_end(self, outer, pl_module, *args):
            trainer().validate(pl_module, loader(vectors(10)), verbose=False)

    with pytest.raises(ConfigError, match=r"middle of a run of another trainer; give this run copy\.deepcopy"):
        fit(Model({"default": Linear()}, CacheConfig()), loader(vectors()), callbacks=[Nests()])


def test_filters_that_the_user_adds_in_a_fit_stay():
    class Filters(Callback):
        def on_train_start(self, trainer, pl_module):
            warnings.filterwarnings("ignore", "the user's own")

    with warnings.catch_warnings():
        before = list(warnings.filters)
        fit(Model(cache=CacheConfig()), loader(Texts(texts(20))), callbacks=[Filters()])
        assert [entry for entry in warnings.filters if entry not in before] == [warnings.filters[0]]
        assert warnings.filters[0][1].pattern == "the user's own"


def test_a_model_that_forgets_its_callback_is_told():
    class Forgets(Model):
        def configure_callbacks(self):
            return []

    with pytest.raises(
        ModelDefinitionError, match=r"got an object of type list instead of a Batch.*super\(\)\.configure_callbacks"
    ):
        fit(Forgets(), loader(Texts(texts(20))))


def test_a_directory_that_may_only_be_read_serves_what_it_has(tmp_path, monkeypatch):
    data = Texts(texts(40))
    fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(data))

    def refuse(self, stores):
        raise StoreError("cannot write into save_dir")

    monkeypatch.setattr("quatcache.store.directory.CacheDirectory.filling", refuse)
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    fit(model, loader(Subset(data, range(10, 30))))
    assert model.cache_callback.report.encoded == 0
    with pytest.raises(StoreError):
        fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(Texts(texts(50))))


@pytest.mark.parametrize("cache", [None, CacheConfig()])
def test_the_trainer_has_the_users_loader_after_a_fit(cache):
    given = loader(Texts(texts(20)))
    run = fit(Model(cache=cache), given)
    assert run.train_dataloader is given


def test_a_dataset_edited_in_place_between_reloads_is_indexed_again():
    class Edits(Model):
        def train_dataloader(self):
            if self.current_epoch:
                self.data.texts = [text + " new" for text in self.data.texts]
            return loader(self.data)

    models = []
    for cache in (None, CacheConfig()):
        model = Edits(cache=cache)
        model.data = Texts(texts(40))
        fit(model, None, reload_dataloaders_every_n_epochs=1, max_epochs=3)
        models.append(model)
    assert same_run(*models)


def test_tensors_reach_the_fill_from_workers_whatever_their_number():
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, limits[1]), limits[1]))
    try:
        model = Model({"default": Linear()}, CacheConfig(num_workers=1))
        fit(model, loader(vectors(1500), batch_size=500), max_epochs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert model.cache_callback.report.encoded == 1500


def test_an_extractor_that_cannot_travel_to_a_spawned_worker_is_named():
    model = Model(cache=CacheConfig(num_workers=1, key_extractors=lambda text: text))
    with pytest.raises(ConfigError, match="cannot be sent to the workers of the fill"):
        fit(model, loader(Texts(texts(20)), num_workers=1, multiprocessing_context="spawn"))


def test_the_dtype_an_encoder_computes_in_is_part_of_its_identity(tmp_path):
    class Rounds(HashingEncoder):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, inputs):
            return super().forward(inputs).to(self.dtype).float()

    for dtype in (torch.float32, torch.bfloat16):
        model = Model({"default": Rounds(dtype)}, CacheConfig(save_dir=tmp_path))
        fit(model, loader(Texts(texts(20))))
        assert model.cache_callback.report.encoded == 20


def test_manual_optimisation_trains_alike():
    class Manual(Model):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss.detach()}

    assert same_run(*both(kind=Manual))


def test_loaders_in_a_dict_train_alike():
    class Sums(Model):
        def training_step(self, batch, batch_idx):
            return sum(super(Sums, self).training_step(part, batch_idx) for part in batch.values())

    models = []
    for cache in (None, CacheConfig()):
        model = Sums({"a": HashingEncoder(), "b": TrainableHashing()}, cache)
        pl.seed_everything(0, verbose=False)
        given = {"x": loader(Texts(texts(40)), shuffle=True), "y": loader(Texts(texts(24)), shuffle=True)}
        trainer().fit(model, given)
        models.append(model)
    assert same_run(*models)


def hooks_of_registrations():
    module = nn.modules.module
    return len(module._global_parameter_registration_hooks), len(module._global_module_registration_hooks)


class Layered(HashingEncoder):
    """An encoder with parts inside."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]).requires_grad_(False).eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: encoder.parts[0].requires_grad_(True),
        lambda encoder: setattr(encoder.parts[1], "0", nn.Linear(2, 2)),
        lambda encoder: encoder.parts.append(nn.Linear(2, 2)),
        lambda encoder: encoder.parts[0].register_parameter("scale", nn.Parameter(torch.ones(1))),
        lambda encoder: setattr(encoder.parts[0], "bias", nn.Parameter(torch.ones(2))),
    ],
    ids=["unfrozen", "exchanged", "appended", "registered", "replaced"],
)
def test_parameter_that_trains_is_seen_at_once_wherever_it_comes_from(change):
    before = hooks_of_registrations()
    encoder = Layered()
    guard = FrozenGuard({"default": encoder})
    assert guard.unfrozen() is None and guard.unfrozen() is None
    change(encoder)
    assert guard.unfrozen()[0] == "default"
    guard.close()
    assert hooks_of_registrations() == before
    assert guard.unfrozen()[0] == "default"
    encoder.requires_grad_(False)
    assert guard.unfrozen() is None
    encoder.parts[0] = nn.Linear(2, 2)
    assert guard.unfrozen()[0] == "default"  # what was closed does not remember


def test_nothing_watches_modules_after_a_run_however_it_ends():
    before = hooks_of_registrations()
    fit(Model(cache=CacheConfig()), loader(Texts(texts(20))))
    assert hooks_of_registrations() == before
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(Model(cache=CacheConfig()), loader(Texts(texts(20))), callbacks=[Failing(RuntimeError("in the middle"))])
    assert hooks_of_registrations() == before
    guard = FrozenGuard({})
    del guard
    assert hooks_of_registrations() == before
