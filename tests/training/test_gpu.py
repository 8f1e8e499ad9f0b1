"""Training on a GPU: the same losses from every tier, nothing copied in a step that need not be, room for the rows."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import IterableDataset, WeightedRandomSampler

from quatcache import CacheConfig, CacheType, Encoder
from quatcache.keys import content_keys
from quatcache.store import DiskStore, TensorStore
from quatcache.training.placement import place_rows
from tests.fits import Failing, HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts
from tests.training.test_unfreezing import Thawable, ThawsAtStep, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_GPU = {"accelerator": "gpu", "devices": 1}
TIERS = ["gpu", "cpu", "disk"]
MIB = 1 << 20


def shuffled():
    return loader(Texts(texts(50, 30)), shuffle=True)


def weighted():
    return loader(Texts(texts(50, 30)), sampler=WeightedRandomSampler([1 + n % 3 for n in range(50)], 50))


def with_workers():
    return loader(Texts(texts(50, 30)), shuffle=True, num_workers=2)


def pinned_by_workers():
    return loader(Texts(texts(50, 30)), shuffle=True, num_workers=1, pin_memory=True)


def run(cache, train=shuffled, encoders=None, callbacks=(), **settings):
    model = Model(encoders or {"default": HashingEncoder()}, cache)
    val = functools.partial(loader, Texts(texts(20)))
    fit(model, train, val, callbacks=list(callbacks), **{**ON_GPU, **settings})
    return model


# Law 3


@pytest.mark.parametrize("labels", [True, False], ids=["labels cached", "labels read"])
@pytest.mark.parametrize("tier", TIERS)
def test_losses_and_head_are_those_without_a_cache(tier, labels, tmp_path):
    model = run(CacheConfig(tier, labels=labels, save_dir=tmp_path))
    assert model.cache_callback.report.labels is labels
    assert model.cache_callback.report.encoders["default"].tier == tier.upper()
    assert same_run(run(None), model)


@pytest.mark.parametrize("labels", [True, False], ids=["labels cached", "labels read"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_stores_give_the_same_losses_on_every_tier(dtype, labels, tmp_path):
    models = [run(CacheConfig(tier, labels=labels, dtype=dtype, save_dir=tmp_path)) for tier in TIERS]
    assert all(same_run(models[0], other) for other in models[1:])
    assert models[0].train_losses[0] == pytest.approx(run(None).train_losses[0], rel=1e-2)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("train", [weighted, with_workers, pinned_by_workers])
@pytest.mark.parametrize("labels", [True, False], ids=["labels cached", "labels read"])
def test_other_samplers_and_workers_give_the_same_losses(train, tier, labels, tmp_path):
    assert same_run(run(None, train), run(CacheConfig(tier, labels=labels, save_dir=tmp_path), train))


@pytest.mark.parametrize("mapping", [{"a": "gpu", "b": "cpu"}, {"a": "disk", "b": "gpu"}, {"a": "gpu", "b": "gpu"}])
def test_encoders_on_different_tiers_give_the_same_losses(mapping, tmp_path):
    def both():
        return {"a": HashingEncoder(1), "b": HashingEncoder(2)}

    config = CacheConfig(mapping=mapping, save_dir=tmp_path)
    assert same_run(run(None, encoders=both()), run(config, encoders=both()))


def test_one_trainable_encoder_beside_a_cached_one_gives_the_same_losses():
    def both():
        return {"frozen": HashingEncoder(1), "trained": TrainableHashing(2)}

    assert same_run(run(None, encoders=both()), run(CacheConfig("gpu"), encoders=both()))


@pytest.mark.parametrize("config", [{"fill": "lazy"}, {"max_size": "1kB"}], ids=["lazy", "budget"])
def test_rows_that_are_met_in_steps_give_the_same_losses(config, tmp_path):
    assert same_run(run(None), run(CacheConfig(save_dir=tmp_path, **config)))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_gives_the_same_losses(precision):
    assert same_run(run(None, precision=precision), run(CacheConfig("gpu"), precision=precision))


# What is copied in a step


class Lean(Model):
    """Does in a step what must be done: neither logging nor ``.item()``, which wait for the GPU."""

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch.inputs), *batch.targets)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.1)


class RefusesToWait(Callback):
    """From the second step on, lets everything fail that waits for the GPU: batches are fetched in between."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            torch.cuda.set_sync_debug_mode("error")
        self.steps += batch_idx > 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 2 == trainer.num_training_batches:
            torch.cuda.set_sync_debug_mode("default")


class Profiles(Callback):
    """Counts the copies to the GPU from the second step of the second epoch to the last."""

    def __init__(self):
        self.copies = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx + 1 == trainer.num_training_batches:
            torch.cuda.synchronize()
            self.profile.stop()
            self.copies = [event.name for event in self.profile.events() if "Memcpy HtoD" in event.name]


@pytest.fixture
def no_sync_debug():
    yield
    torch.cuda.set_sync_debug_mode("default")


def lean(cache, *callbacks, train=shuffled):
    model = Lean({"default": HashingEncoder()}, cache)
    fit(model, train, callbacks=list(callbacks), **ON_GPU)
    return model


def test_nothing_is_copied_in_a_step_where_the_gpu_has_the_rows():
    profiles = Profiles()
    lean(CacheConfig("gpu"), profiles)
    assert profiles.copies == []


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("train", [shuffled, weighted])
def test_no_step_waits_for_the_gpu_whatever_the_tier(tier, train, tmp_path, no_sync_debug):
    refuses = RefusesToWait()
    lean(CacheConfig(tier, save_dir=tmp_path), refuses, train=train)
    assert refuses.steps > 4


def test_copies_from_main_memory_are_pinned(tmp_path):
    profiles = Profiles()
    lean(CacheConfig("cpu", save_dir=tmp_path), profiles)
    assert profiles.copies
    assert all("Pinned" in name for name in profiles.copies)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("kind", ["memory", "shard", "shards"])
def test_rows_arrive_on_the_gpu_as_they_are_in_main_memory(kind, dtype, tmp_path):
    many = {"dtype": dtype} if kind == "memory" else {"dtype": dtype, "shard_bytes": 1 if kind == "shards" else None}
    store = TensorStore(**many) if kind == "memory" else DiskStore(tmp_path, "0" * 32, **many)
    for place in range(3):
        store.put_many(content_keys([f"{place} {n}" for n in range(40)]), torch.randn(40, 32))
    if kind != "memory":
        store.flush()
    device, expected, given = torch.device("cuda", 0), [], []
    for seed in range(50):  # many in flight: a block of pinned memory must not be written while it is copied
        numbers = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
        expected.append(store.gather(numbers))
        given.append(store.gather(numbers, device))
    assert all(row.device == device and row.dtype == torch.float32 for row in given)
    assert all(torch.equal(here, there.cpu()) for here, there in zip(expected, given, strict=True))


# Room


class Large(Encoder):
    """256 MiB of frozen weights: cuBLAS alone takes up to 32 MiB for itself."""

    trainable = False
    embedding_size = 16

    def __init__(self):
        weight = torch.randn(4 * MIB, 16, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight, requires_grad=False)

    def collate(self, items):
        return torch.tensor([len(text) for text in items])

    def forward(self, inputs):
        return self.weight[inputs]


class Room(Callback):
    """Notes how much memory is taken, and where the encoder is, in steps and when the fit has ended."""

    def __init__(self):
        self.taken, self.at = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.taken.append(torch.cuda.memory_allocated())
        self.at.append(pl_module.encoders["default"].weight.device.type)


class AtEnd(Large):
    """Remembers where it was asked to go."""

    def __init__(self):
        super().__init__()
        self._asked = []

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        self._asked.append(self.weight.device.type)
        return moved


@pytest.mark.parametrize("tier", [*TIERS, "auto"])
def test_encoder_leaves_after_the_fill_and_is_back_at_the_end(tier, tmp_path):
    gc.collect()
    before, room, encoder = torch.cuda.memory_allocated(), Room(), AtEnd()
    parameter = encoder.weight
    model = run(CacheConfig(tier, save_dir=tmp_path), encoders={"default": encoder}, callbacks=[room])
    assert max(room.taken) - before < 128 * MIB
    assert set(room.at) == {"cpu"}
    assert model.encoders["default"] is encoder and encoder.weight is parameter
    # When a fit has gone well, Lightning takes the model off the GPU before callbacks end: the encoder is not fetched.
    assert encoder.weight.device == model.head[1].weight.device and set(encoder._asked) == {"cpu"}


def test_encoder_is_back_after_an_error():
    encoder = AtEnd()
    with pytest.raises(RuntimeError, match="boom"):
        run(CacheConfig("gpu"), encoders={"default": encoder}, callbacks=[Failing(RuntimeError("boom"))])
    assert encoder._asked[0] == "cpu" and set(encoder._asked[1:]) == {"cuda"}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((text + " new", len(text) % 5) for text in texts(12))


def test_a_miss_in_a_step_finds_the_encoder_on_the_gpu():
    models = []
    for cache in (None, CacheConfig("gpu")):
        model = Model({"default": HashingEncoder()}, cache)
        fit(model, shuffled, loader(Stream()), num_sanity_val_steps=0, **ON_GPU)
        models.append(model)
    assert same_run(*models)


def test_encoding_by_hand_in_the_middle_of_a_fit_uses_the_gpu():
    made = []

    class Encodes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            made.append(pl_module.encode(["oak", "elm"]))

    run(CacheConfig("gpu"), callbacks=[Encodes()])
    assert all(each.is_cuda and each.shape == (2, 5) for each in made)


@pytest.mark.parametrize("step", [0, 3, 8])
@pytest.mark.parametrize("tier", TIERS)
def test_unfreezing_goes_on_with_the_encoder_on_the_gpu(tier, step, tmp_path):
    runs = [
        run(cache, encoders={"default": Thawable()}, callbacks=[ThawsAtStep(step)])
        for cache in (None, CacheConfig(tier, save_dir=tmp_path))
    ]
    assert runs[1].train_losses == pytest.approx(runs[0].train_losses, rel=1e-5)
    assert torch.allclose(trained(runs[1]), trained(runs[0]), atol=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_give_the_same(stage):
    from tests.fits import trainer

    outcomes = []
    for cache in (None, CacheConfig("gpu")):
        outcome = getattr(trainer(**ON_GPU), stage)(Model(cache=cache), loader(Texts(texts(20))))
        outcomes.append(torch.cat(outcome).tolist() if stage == "predict" else outcome)
    assert outcomes[0] == outcomes[1]


# Several devices

two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two
@pytest.mark.parametrize("tier", [*TIERS, "auto"])
def test_the_second_gpu_is_used_as_the_first_is(tier, tmp_path):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    config = CacheConfig(tier, save_dir=tmp_path)
    model = run(config, devices=[1])
    assert torch.cuda.memory_allocated(0) <= before
    assert same_run(run(None, devices=[1]), model)


@two
def test_rows_are_placed_on_the_gpu_that_trains(tmp_path):
    store = DiskStore(tmp_path, "0" * 32)
    store.put_many(content_keys(["a", "b"]), torch.randn(2, 4))
    store.flush()
    device = torch.device("cuda", 1)
    placed = place_rows("text", store, CacheType.AUTO, device)
    assert placed.tier is CacheType.GPU and placed.store.device == device
    assert torch.equal(placed.store.gather(torch.tensor([1, 0])).cpu(), store.gather(torch.tensor([1, 0])))
