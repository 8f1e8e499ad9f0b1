"""What spawned workers of a loader take along: what reads and keys samples, and none of the weights."""

from __future__ import annotations

import pickle

import pytest
from pytorch_lightning.callbacks import Callback

from quatcache import CacheConfig
from quatcache.encoders import SentenceTransformerEncoder, TransformersEncoder
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts
from tests.tiny import write_tiny
from tests.training.test_streams import Stream


class Stays:
    """Makes an encoder that cannot leave its process."""

    def __reduce_ex__(self, protocol):
        raise AssertionError("a worker was to take the encoder along")


class StaysSentence(Stays, SentenceTransformerEncoder):
    pass


class StaysTransformers(Stays, TransformersEncoder):
    pass


class Prefixes(HashingEncoder):
    """Sees as much of a text as an attribute of its own says."""

    def __init__(self):
        super().__init__()
        self.seen = 6

    def content(self, item):
        return item[: self.seen]

    def collate(self, items):
        return super().collate([self.content(item) for item in items])


class Weighs(Callback):
    """Pickles what a worker of the training loader would get."""

    def on_train_epoch_start(self, trainer, pl_module):
        served = trainer.fit_loop._combined_loader.flattened[0]
        self.bytes = len(pickle.dumps((served.dataset, served.collate_fn)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, minilm_path):
    return str(write_tiny(tmp_path_factory.mktemp("tiny"), minilm_path))


def data(kind):
    return Stream(zip(texts(24), [i % 5 for i in range(24)], strict=True)) if kind == "stream" else Texts(texts(24))


CONFIGS = {
    "lazy": CacheConfig(fill="lazy"),
    "partial": CacheConfig(max_size=1200),
    "stream": CacheConfig(),
}


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("adapter", [StaysSentence, StaysTransformers])
def test_workers_of_an_adapter_get_none_of_its_weights(kind, adapter, tiny):
    encoder, weighs = adapter(tiny), Weighs()
    fit(Model({"default": encoder}, CONFIGS[kind]), loader(data(kind)), max_epochs=1, callbacks=[weighs])
    assert sum(weight.nbytes for weight in encoder.parameters()) > 3_000_000
    assert weighs.bytes < 50_000


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_spawned_workers_key_the_items_of_an_adapter_without_it(kind, tiny):
    model = Model({"default": StaysTransformers(tiny)}, CONFIGS[kind])
    spawned = loader(data(kind), num_workers=1, multiprocessing_context="spawn")
    fit(model, spawned, max_epochs=1)
    beyond_budget = 24 - 1200 // 128 if kind == "partial" else 0
    assert model.cache_callback.report.encoded == 24 + beyond_budget


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_an_encoder_that_keys_by_its_own_attributes_goes_along(kind):
    def run(cache):
        model = Model({"default": Prefixes()}, cache)
        fit(model, loader(data(kind), num_workers=1, multiprocessing_context="spawn"), max_epochs=1)
        return model

    assert same_run(run(CONFIGS[kind]), run(None))
