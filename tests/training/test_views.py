"""``num_views``: datasets that augment are cached in several seeded versions, one of which an epoch takes."""

from __future__ import annotations

import functools
import logging
import random

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from quatcache import CacheConfig, CacheType, SimilarityPairSample
from quatcache.errors import ConfigError
from quatcache.training.views import Views
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts, trainer
from tests.training.test_law_same_training import loss_for

DRAWS = {
    "torch": lambda: int(torch.randint(1 << 30, ())),
    "numpy": lambda: int(np.random.randint(1 << 30)),
    "python": lambda: random.randrange(1 << 30),
}


class Augmented(Dataset):
    """Texts with a random number behind them, another at each reading."""

    def __init__(self, texts, draw="torch", pairs=False):
        self.texts, self.draw, self.pairs, self.reads = list(texts), DRAWS[draw], pairs, 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        self.reads += 1
        text = self.texts[index]
        if self.pairs:
            return SimilarityPairSample(f"{text} {self.draw()}", f"{text} {self.draw()}", subgroup=index % 2)
        return f"{text} {self.draw()}", len(text) % 5


class Plain(Texts):
    """Texts that are the same at each reading."""

    pairs = False


class Seen(Model):
    """Keeps what the head was given in each epoch, by group."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.epochs = {}

    def training_step(self, batch, batch_idx):
        rows = self.encoders["default"](batch.inputs["default"])
        self.epochs.setdefault(self.current_epoch, []).append(rows.detach().clone())
        return super().training_step(batch, batch_idx)

    def rows(self, epoch):
        return torch.cat(self.epochs[epoch])


def run(cache, data=None, epochs=4, shuffle=False, val=None, encoders=None, loading=None, **settings):
    data = data or Augmented(texts(20))
    model = Seen(encoders or {"default": HashingEncoder()}, cache, loss_for("pairs" if data.pairs else "tuples"))
    fit(model, functools.partial(loader, data, shuffle=shuffle, **(loading or {})), val, max_epochs=epochs, **settings)
    return model


def views(count=3, **settings):
    return CacheConfig(num_views=count, **settings)


@pytest.mark.parametrize("draw", sorted(DRAWS))
@pytest.mark.parametrize("pairs", [False, True])
def test_each_sample_has_as_many_versions_as_it_was_told(draw, pairs):
    model = run(views(), Augmented(texts(20), draw, pairs), epochs=6)
    for sample in range(40 if pairs else 20):
        versions = [model.rows(epoch)[sample] for epoch in range(6)]
        if not pairs:
            assert len({tuple(version.tolist()) for version in versions}) == 3
            assert all(torch.equal(versions[epoch], versions[epoch + 3]) for epoch in range(3))
    assert model.cache_callback.report.encoded == (120 if pairs else 60)


def test_a_row_is_what_the_encoder_gives_for_the_view():
    data = Augmented(texts(20))
    model = run(views(), data, epochs=3)
    seen = Views(data, 3)
    encoder = HashingEncoder()
    expected = [encoder(encoder.collate([seen[sample * 3 + view][0] for view in range(3)])) for sample in range(20)]
    for sample in range(20):
        got = torch.stack([model.rows(epoch)[sample] for epoch in range(3)])
        assert sorted(got.tolist()) == sorted(expected[sample].tolist())


def test_the_next_run_encodes_nothing_and_is_the_same(tmp_path):
    first = run(views(save_dir=tmp_path), shuffle=True)
    second = run(views(save_dir=tmp_path), shuffle=True)
    assert same_run(first, second)
    assert second.cache_callback.report.encoded == 0
    assert second.encoders["default"]._rows == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_type": CacheType.DISK},
        {"labels": False},
        {"num_workers": 2, "labels": True},
        {"fill": "lazy"},
        {"fill": "lazy", "labels": False},
        {"max_size": 64 * 25},
    ],
    ids=["disk", "labels read", "fill with workers", "lazy", "lazy, labels read", "budget"],
)
@pytest.mark.parametrize("loading", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
                         ids=["alone", "workers", "persistent workers"])  # fmt: skip
def test_however_it_is_filled_and_loaded_training_is_the_same(settings, loading, tmp_path):
    data = Augmented(texts(20))
    kept = run(views(save_dir=tmp_path / "a"), data, shuffle=True, loading=loading)
    other = run(views(save_dir=tmp_path / "b", **settings), data, shuffle=True, loading=loading)
    assert same_run(kept, other)


def test_a_dataset_that_does_not_augment_is_cached_once():
    model = run(views(), Plain(texts(20)), val=lambda: loader(Texts(texts(25))))
    assert model.cache_callback.report.encoded == 25


def test_validation_has_the_same_view_in_each_epoch():
    class Frozen(Seen):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.0)

    model = Frozen({"default": HashingEncoder()}, views())
    fit(model, loader(Augmented(texts(20))), loader(Augmented(texts(30))), max_epochs=3, num_sanity_val_steps=0)
    losses = model.val_losses
    assert losses[:4] == losses[4:8] == losses[8:]
    assert len(losses) == 12


def test_a_trainable_encoder_gets_the_view_of_the_frozen_one():
    class Both(HashingEncoder):
        pass

    model = Seen({"default": HashingEncoder(), "moving": TrainableHashing()}, views())
    met = []
    model.encoders["moving"].register_forward_pre_hook(lambda module, inputs: met.append(inputs[0]))
    fit(model, loader(Augmented(texts(20))), max_epochs=3)
    frozen = HashingEncoder()
    assert torch.equal(torch.cat([frozen(batch) for batch in met]), torch.cat([model.rows(e) for e in range(3)]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_view_of_its_epoch(tmp_path, workers):
    cache = views(save_dir=tmp_path / "cache", labels=False)  # samples are read, by workers if there are any
    whole = run(cache, epochs=4)
    saver = ModelCheckpoint(tmp_path, filename="half", save_top_k=-1)
    half = run(cache, epochs=2, callbacks=[saver], enable_checkpointing=True)
    resumed = Seen({"default": HashingEncoder()}, cache)
    trainer(max_epochs=4).fit(
        resumed, loader(Augmented(texts(20)), num_workers=workers), ckpt_path=saver.best_model_path
    )
    assert sorted(resumed.epochs) == [2, 3]
    for epoch in (2, 3):
        assert torch.equal(resumed.rows(epoch), whole.rows(epoch))
        assert not torch.equal(whole.rows(epoch), whole.rows(epoch - 1)), "each epoch has another view"
    assert torch.equal(half.rows(1), whole.rows(1))


def test_random_numbers_of_training_are_left_alone(tmp_path):
    # the head has dropout: whether views are read in the step or came from a cache must not show
    first = run(views(labels=False), shuffle=True)
    second = run(views(), shuffle=True)
    assert same_run(first, second)


def test_a_dataset_that_grows_keeps_its_views(tmp_path):
    run(views(save_dir=tmp_path), Augmented(texts(20)), epochs=3)
    grown = run(views(save_dir=tmp_path), Augmented(texts(24)), epochs=3)
    assert grown.cache_callback.report.encoded == 12


def test_more_views_keep_those_that_are_there(tmp_path):
    run(views(2, save_dir=tmp_path), epochs=2)
    more = run(views(5, save_dir=tmp_path), epochs=5)
    assert more.cache_callback.report.encoded == 60


class OwnGenerator(Augmented):
    """Draws from a generator of its own, which no seed of ours reaches."""

    def __init__(self, texts):
        super().__init__(texts)
        generator = np.random.default_rng()
        self.draw = lambda: int(generator.integers(1 << 30))


def test_a_dataset_with_a_generator_of_its_own_is_refused():
    with pytest.raises(ConfigError, match=r"view \d of item \d+ of the train dataset differs between two reads.*let"):
        run(views(), OwnGenerator(texts(20)))


def test_the_refusal_of_augmentation_names_the_remedy():
    with pytest.raises(ConfigError, match=r"differs between two reads.*set num_views to cache several"):
        run(CacheConfig())


def test_the_cost_is_told_before_it_is_paid(caplog):
    class Counts(logging.Handler):
        def emit(self, record):
            if "augments" in record.getMessage():
                rows.append(encoder._rows)

    rows, encoder = [], HashingEncoder()
    handler = Counts()
    logger = logging.getLogger("quatcache")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "quatcache"):
            run(views(), Augmented(texts(200)), epochs=2, encoders={"default": encoder})
    finally:
        logger.removeHandler(handler)
    assert len(rows) == 1
    assert rows[0] < 30
    assert "its 200 samples are cached in 3 views each, up to 38.4 kB of rows; reading and encoding 600" in caplog.text


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "3"])
def test_no_number_of_views_is_refused(count):
    with pytest.raises(ConfigError, match="num_views is"):
        CacheConfig(num_views=count)


def test_extracted_keys_are_refused_beside_views():
    with pytest.raises(ConfigError, match="num_views is 2 and key_extractors are set"):
        CacheConfig(num_views=2, key_extractors=len)


def test_reading_a_view_leaves_the_global_generators_as_they_were():
    seen = Views(Augmented(texts(5), "numpy"), 2)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = [draw() for draw in DRAWS.values()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    seen[3]
    assert [draw() for draw in DRAWS.values()] == expected


GOLDEN = [
    (0.7068323066686567, 0.7143330881241983, 0.4714563177207116),
    (0.4438542742528877, 0.9894250503381802, 0.23011654723606434),
    (0.5967335138917975, 0.6207782254837636, 0.440392506216877),
]
"""What Python, NumPy and torch draw for two views of sample 0 and one of sample 4: rows of old runs go by it."""


def test_views_are_the_same_in_every_process_and_version():
    class Draws:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return random.random(), np.random.random(), torch.rand((), dtype=torch.float64).item()

    views = Views(Draws(), 4)
    assert [views[place] for place in (0, 1, 19)] == GOLDEN


def test_views_that_no_epoch_will_take_are_not_made():
    model = run(views(10), Augmented(texts(20)), epochs=2)
    assert model.cache_callback.report.encoded == 40
