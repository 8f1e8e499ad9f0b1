"""The loaders that take the place of the user's: same batches, light in workers, and no false alarm."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
from datasets import Dataset as HuggingFaceDataset
from lightning_fabric.utilities.data import suggested_max_num_workers
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import get_worker_info

from quatcache import CacheConfig
from quatcache.data import read_sample
from quatcache.training.loaders import MemoryLoader
from tests.fits import Model, Texts, fit, loader, same_run, texts


class Upper(Model):
    """Takes samples apart in a way of its own: a static method, so that it reaches workers alone."""

    @staticmethod
    def read_sample(sample):
        text, group = sample
        return read_sample((text.upper(), group))


class Method(Model):
    """The same as a method, which takes the model along."""

    def read_sample(self, sample):
        return read_sample((sample[0].upper(), sample[1]))


@pytest.mark.parametrize("kind", [Model, Upper, Method])
@pytest.mark.parametrize("cache", [None, CacheConfig(labels=False)], ids=["uncached", "labels read"])
def test_workers_that_are_spawned_give_the_same_batches(kind, cache):
    def run(**settings):
        model = kind(cache=cache)
        fit(model, loader(Texts(texts(16)), **settings), max_epochs=1)
        return model

    assert same_run(run(), run(num_workers=1, multiprocessing_context="spawn"))


HERE = []


class NotForked(Texts):
    """Cannot be read in a process that has what this one has in memory."""

    def __getitem__(self, index):
        assert get_worker_info() is None or not HERE, "forked"
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "cache",
    [CacheConfig(num_workers=1, labels=True), CacheConfig(labels=False)],
    ids=["in the fill", "in training"],
)
def test_workers_are_spawned_where_the_user_says_so(cache, monkeypatch):
    monkeypatch.setattr(f"{__name__}.HERE", [True])
    train = loader(NotForked(texts(16)), num_workers=1, multiprocessing_context="spawn")
    fit(Model(cache=cache), train, max_epochs=1)


def test_a_sample_hook_decides_what_is_encoded():
    model = Upper(cache=CacheConfig())
    fit(model, loader(Texts(texts(16))))
    assert set(model.encoders["default"]._collated) == {text.upper() for text in texts(16)}


def test_a_cached_loader_is_not_blamed_for_having_no_workers():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Model(cache=CacheConfig()), loader(Texts(texts(16))), loader(Texts(texts(8))))
        assert not [each for each in told if "workers" in str(each.message)]
        fit(Model(cache=CacheConfig(labels=False)), loader(Texts(texts(16))))
    few_processors = suggested_max_num_workers(1) < 2  # then Lightning suggests no workers
    assert few_processors or [each for each in told if "workers" in str(each.message)]


def test_a_model_can_be_copied_in_the_middle_of_a_cached_fit():
    class Copies(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            copied = pickle.loads(pickle.dumps(pl_module.cache_callback))
            assert copied.report.encoded == 16
            self.copy = copy.deepcopy(pl_module)

    copies = Copies()
    fit(Model(cache=CacheConfig()), loader(Texts(texts(16))), callbacks=[copies], max_epochs=1)
    assert copies.copy.encode(["oak"]).shape == (1, 5)


def test_while_all_is_cached_batches_come_from_memory():
    kinds = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            kinds.append(type(trainer.train_dataloader))

    fit(Model(cache=CacheConfig()), loader(Texts(texts(16)), num_workers=2), callbacks=[Looks()])
    assert kinds == [MemoryLoader]


class Parts(Model):
    """Gets a dict of batches, of which one may have run out."""

    def training_step(self, batch, batch_idx):
        given = [part for part in batch.values() if part is not None]
        return sum(super(Parts, self).training_step(part, batch_idx) for part in given)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_loaders_of_unequal_lengths_are_combined_in_each_mode_as_without_a_cache(mode):
    def run(cache):
        model = Parts(cache=cache)
        fit(
            model,
            lambda: CombinedLoader(
                {"long": loader(Texts(texts(40)), shuffle=True), "short": loader(Texts(texts(24)[::-1]), shuffle=True)},
                mode,
            ),
            lambda: {"one": loader(Texts(texts(16))), "other": loader(Texts(texts(8)), batch_size=3)},
        )
        return model

    uncached = run(None)
    for settings in ({}, {"labels": False}, {"fill": "lazy"}, {"max_size": 1000}):
        assert same_run(uncached, run(CacheConfig(**settings))), settings


def test_a_dataset_that_grows_from_reload_to_reload_trains_alike_and_encodes_what_is_new():
    class Growing(Model):
        def train_dataloader(self):
            return loader(Texts(texts(16 + 8 * self.current_epoch)), shuffle=True)

        def val_dataloader(self):
            return loader(Texts(texts(8 + 8 * self.current_epoch)))

    def run(cache):
        model = Growing(cache=cache)
        fit(model, None, max_epochs=3, reload_dataloaders_every_n_epochs=1)
        return model

    uncached = run(None)
    for settings in ({}, {"labels": False}, {"fill": "lazy"}):
        cached = run(CacheConfig(**settings))
        assert same_run(uncached, cached), settings
        assert cached.cache_callback.report.encoded == 32


def test_a_stream_of_hugging_face_read_by_workers_trains_alike():
    class Mapped(Model):
        @staticmethod
        def read_sample(sample):
            return read_sample((sample["text"], sample["label"]))

    rows = HuggingFaceDataset.from_dict({"text": texts(32), "label": [i % 5 for i in range(32)]})

    def run(cache):
        model = Mapped(cache=cache)
        fit(model, lambda: loader(rows.to_iterable_dataset(num_shards=2), num_workers=2))
        return model

    cached = run(CacheConfig())
    assert same_run(run(None), cached)
    assert cached.cache_callback.report.encoded == 32
