"""Rows that are cached as batches meet them, when something changes or fails meanwhile."""

from __future__ import annotations

import errno
import logging

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import IterableDataset, SubsetRandomSampler

from quatcache import CacheConfig
from quatcache.errors import KeyTypeError, StoreError
from quatcache.store import DiskStore
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts, trainer
from tests.training.test_lazy import Opaque, OpaqueEncoder, Watch


class Cut(HashingEncoder):
    """Sees the first letters of a text only."""

    def __init__(self, letters=5):
        super().__init__()
        self.letters = letters

    def collate(self, items):
        return super().collate([item[: self.letters] for item in items])


class AtStep(Callback):
    """Does something to the encoder before one of the steps."""

    def __init__(self, do, step=1):
        self.do, self.step = do, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.do(pl_module.encoders.real()["default"])


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = list(samples)

    def __iter__(self):
        return iter(self.samples)


def widen(encoder):
    encoder.letters = 100


def write_behind(encoder):
    encoder.matrix.data.mul_(2)


def lazy(**settings):
    return CacheConfig(fill="lazy", **settings)


@pytest.mark.parametrize("kind", [Texts, "stream"])
@pytest.mark.parametrize("change", [widen, write_behind])
def test_rows_of_a_changed_encoder_are_not_kept(kind, change, tmp_path, caplog):
    samples = [(text, len(text) % 5) for text in texts(80)]

    def data():
        return Stream(samples) if kind == "stream" else Texts(texts(80))

    model = Model({"default": Cut()}, lazy(save_dir=tmp_path))
    try:
        fit(model, loader(data()), max_epochs=1, callbacks=[AtStep(change)])
    except Exception as error:  # noticed in a step
        assert "changed" in str(error)
    else:
        assert "was changed while its rows were cached" in caplog.text
    models = [Model({"default": Cut()}, cache) for cache in (lazy(save_dir=tmp_path), None)]
    for each in models:
        fit(each, loader(data()), max_epochs=1)
    assert same_run(*models)


def test_what_was_met_before_an_encoder_is_unfrozen_is_kept(tmp_path):
    from tests.training.test_unfreezing import Thawable, ThawsAtStep

    model = Model({"default": Thawable()}, lazy(save_dir=tmp_path))
    fit(model, loader(Texts(texts(80))), max_epochs=1, callbacks=[ThawsAtStep(4)])
    models = [Model({"default": Thawable()}, cache) for cache in (lazy(save_dir=tmp_path), None)]
    for each in models:
        fit(each, loader(Texts(texts(80))), max_epochs=1)
    assert same_run(*models)
    assert 30 <= models[0].cache_callback.report.encoded <= 48


@pytest.mark.parametrize("streams_first", [True, False])
def test_a_stream_of_items_without_content_keys_is_refused_beside_a_dataset_of_such(streams_first):
    samples = [(Opaque(text), 0) for text in texts(40)]
    sources = [Stream(samples), samples[:10]]
    train, val = sources if streams_first else sources[::-1]
    with pytest.raises(KeyTypeError, match="key_extractors"):
        fit(Model({"default": OpaqueEncoder()}, CacheConfig()), loader(train), loader(val))


def test_rows_of_this_run_do_not_vouch_for_older_ones(tmp_path, monkeypatch):
    first = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path))
    fit(first, loader(Texts(texts(30))), max_epochs=1)
    monkeypatch.setattr("quatcache.store.directory._versions", lambda: {"torch": "another"})
    other = [(f"other {text}", 0) for text in texts(30)]
    stream = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path))
    fit(stream, loader(Stream([*other, *other])), max_epochs=1)
    assert stream.cache_callback.report.encoders["default"].verified == 0
    again = Model({"default": HashingEncoder()}, CacheConfig(save_dir=tmp_path))
    fit(again, loader(Texts(texts(30))), max_epochs=1)
    assert again.cache_callback.report.encoders["default"].verified == 8


class Huge(Texts):
    """Twenty million samples."""

    def __len__(self):
        return 20_000_000

    def __getitem__(self, index):
        return self.texts[index % len(self.texts)], 0


class Wide(HashingEncoder):
    embedding_size = 4096

    def forward(self, inputs):
        return super().forward(inputs).repeat(1, 256)


@pytest.mark.parametrize("settings", [{"fill": "lazy"}, {}])
def test_a_run_that_takes_little_needs_no_memory_for_the_rest(settings):
    model = Model({"default": Wide()}, CacheConfig(**settings))
    fit(model, loader(Huge(texts(20))), max_steps=2)
    assert model.cache_callback.report.encoders["default"].rows == 16


def full(*args, **settings):
    raise StoreError(errno.ENOSPC, "the disk is full")


@pytest.mark.parametrize("what", ["commit", "pack", "read-only"])
def test_a_cache_that_can_take_no_more_does_not_end_training(what, tmp_path, monkeypatch, caplog):
    models = [Model({"default": HashingEncoder()}, cache) for cache in (lazy(save_dir=tmp_path), None)]
    if what == "commit":
        monkeypatch.setattr("quatcache.store.disk.COMMIT_SECONDS", 0.0)
        monkeypatch.setattr("quatcache.store.commits.write_shard", full)
    elif what == "pack":
        monkeypatch.setattr("quatcache.store.disk.pack", full)
    else:
        monkeypatch.setattr("quatcache.store.CacheDirectory.check_writable", full)
        monkeypatch.setattr("quatcache.store.commits.write_shard", full)
    for model in models:
        fit(model, loader(Texts(texts(50))), max_epochs=3)
    assert same_run(*models)
    assert "the disk is full" in caplog.text
    if what != "pack":
        assert "encoded each time they are met" in caplog.text


def test_memory_that_runs_short_does_not_end_training(monkeypatch, caplog):
    monkeypatch.setattr("quatcache.training.memory.free_memory", lambda: 0)
    models = [Model({"default": HashingEncoder()}, cache) for cache in (lazy(), None)]
    for model in models:
        fit(model, loader(Texts(texts(50))), max_epochs=2)
    assert same_run(*models)
    assert models[0].cache_callback.report.encoders["default"].rows == 0
    assert "encoded each time they are met" in caplog.text


def test_a_larger_budget_is_used_and_then_nothing_is_read(tmp_path):
    part = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path, max_size=20 * 64))
    fit(part, loader(Texts(texts(50))), max_epochs=2)
    watch = Watch(data := Texts(texts(50)))
    whole = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path))
    fit(whole, loader(data), max_epochs=3, callbacks=[watch])
    assert watch.reads == [30, 0, 0]
    assert whole.cache_callback.report.encoded == 30


@pytest.mark.parametrize(
    "settings", [{"sampler": SubsetRandomSampler(range(20))}, {"drop_last": True}], ids=["subset", "drop_last"]
)
def test_samples_that_are_never_taken_do_not_keep_others_from_memory(settings):
    watch = Watch(data := Texts(texts(30)))
    models = [Model({"default": HashingEncoder()}, cache) for cache in (lazy(), None)]
    for model in models:
        fit(model, loader(data, **settings), max_epochs=3, callbacks=[watch] if model is models[0] else [])
    assert same_run(*models)
    assert watch.reads[1:] == [0, 0]


def test_targets_that_change_their_type_are_read():
    samples = [(text, number if number < 20 else float(number)) for number, text in enumerate(texts(40))]
    losses = [Model({"default": HashingEncoder()}, cache, loss=Sum()) for cache in (lazy(), None)]
    for model in losses:
        fit(model, loader(samples, shuffle=True), max_epochs=3)
    assert same_run(*losses)


class Sum(torch.nn.Module):
    def forward(self, embeddings, groups):
        groups = torch.as_tensor(groups)
        return (embeddings.sum(1) * groups).mean()


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_runs_without_training_report_and_index_what_they_met(run, tmp_path):
    model = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path))
    data = Texts(texts(30))
    getattr(trainer(), run)(model, loader(data))
    assert model.cache_callback.report.encoded == 30
    assert model.cache_callback.report.encoders["default"].rows == 30
    again, data.reads = Model({"default": HashingEncoder()}, lazy(save_dir=tmp_path)), 0
    watch = Watch(data)
    fit(again, loader(data), max_epochs=1, callbacks=[watch])
    assert watch.reads == [0]
    assert again.cache_callback.report.encoders["default"].hits == 30


def test_items_that_share_an_extracted_key_are_told_of(caplog):
    for cache in (lazy(key_extractors=lambda text: text[0]), CacheConfig(key_extractors=lambda text: text[0])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "quatcache"):
            fit(Model({"default": HashingEncoder()}, cache), loader(Texts(texts(30))), max_epochs=1)
        assert "have the extracted key of another item but other content" in caplog.text


def test_encoding_in_the_first_epoch_counts_as_filling():
    model = Model({"default": HashingEncoder()}, lazy())
    fit(model, loader(Texts(texts(60))), max_epochs=2)
    report = model.cache_callback.report
    assert report.fill_seconds > 0
    assert report.encoders["default"].served == 120


def test_reloading_forgets_what_it_replaced():
    class Counts(Callback):
        met = ()

        def on_train_epoch_end(self, trainer, pl_module):
            session = pl_module.cache_callback._session
            self.met += (len(session._datasets.meetings.met),)

    counts, data = Counts(), Texts(texts(60))

    class Reloading(Model):
        def train_dataloader(self):
            return loader(data, sampler=SubsetRandomSampler(range(20)))

    fit(Reloading({"default": HashingEncoder()}, lazy()), None, max_epochs=4, callbacks=[counts],
        reload_dataloaders_every_n_epochs=1)  # fmt: skip
    assert counts.met == (1, 1, 1, 1)


def test_a_commit_that_was_forbidden_is_never_made(tmp_path):
    from quatcache.keys import content_keys

    store = DiskStore(tmp_path / "store", "0" * 32)
    store.put_many(content_keys(["a"]), torch.ones(1, 2))

    def forbid():
        raise RuntimeError("no")

    store.before_commit = forbid
    with pytest.raises(RuntimeError, match="no"):
        store.flush()
    store.before_commit = lambda: None
    store.flush()
    assert len(DiskStore(tmp_path / "store", "0" * 32)) == 0


class Drawing(HashingEncoder):
    """Draws a random number in each call, which its rows do not depend on."""

    def forward(self, inputs):
        torch.rand(())
        return super().forward(inputs)


def test_encoding_in_a_step_takes_no_random_numbers_from_training():
    models = [Model({"default": Drawing()}, cache) for cache in (lazy(), CacheConfig(max_size=20 * 64), CacheConfig())]
    for model in models:
        fit(model, loader(Texts(texts(50)), shuffle=True), max_epochs=2)
    assert same_run(models[0], models[2])
    assert same_run(models[1], models[2])
