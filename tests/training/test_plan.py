"""A plan: what caching would cost and save, with counts that are exact and nothing that is left behind."""

from __future__ import annotations

import copy
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler, random_split

from quatcache import CacheCallback, CacheConfig, SimilarityPairSample
from quatcache.encoders import ModuleEncoder, SentenceTransformerEncoder
from quatcache.errors import ConfigError, LoaderError, NotFrozenError
from quatcache.training import placement
from quatcache.training.plan import plan, plan_from_config, rehearsal
from quatcache.training.plan.counting import estimated_distinct
from tests.fits import HashingEncoder, Model, Texts, TrainableHashing, fit, loader, same_run, texts, trainer

ROOT = Path(__file__).resolve().parents[2]

# Lightning 2.6 calls jsonargparse by names that the latter has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*was deprecated in v4"),
    pytest.mark.filterwarnings("ignore:(?s).*JSONARGPARSE_DEPRECATION_WARNINGS"),
]


class Clock:
    """Time passes when something is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(HashingEncoder):
    """Each call takes a second, however many items it is given."""

    def __init__(self, clock, seed=0):
        super().__init__(seed)
        self._clock = clock

    def forward(self, inputs):
        self._clock.now += 1.0
        return super().forward(inputs)


class SlowTexts(Texts):
    """Each sample takes a while to read."""

    def __init__(self, items, clock, seconds):
        super().__init__(items)
        self.clock, self.seconds = clock, seconds

    def __getitem__(self, index):
        self.clock.now += self.seconds
        return super().__getitem__(index)


class Data(pl.LightningDataModule):
    """Splits its texts at random, once, as many users do."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)
        if not hasattr(self, "parts"):
            self.parts = random_split(Texts(texts(60, 40)), [48, 12])

    def train_dataloader(self):
        return loader(self.parts[0], shuffle=True)

    def val_dataloader(self):
        return loader(self.parts[1])

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")


def planned(cache=None, train=None, val="20 texts", encoders=None, **settings):
    model = Model(encoders, cache if cache is not None else CacheConfig())
    train = loader(Texts(texts(60, 40))) if train is None else train
    settings = {"trainer": trainer(), **settings}  # on the CPU, as the fits of these tests
    return plan(model, train, loader(Texts(texts(20))) if val == "20 texts" else val, **settings)


def counts(part):
    return part.items, part.distinct, part.stored, part.to_encode


def tree(folder):
    """Every file below a folder: what is in it, and when it was last touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted([folder, *folder.rglob("*")])
    }


# counts


def test_items_are_counted_exactly_in_each_dataset_and_together():
    found = planned(CacheConfig(batch_size=4))
    (encoder,) = found.encoders
    assert [(data.name, *counts(data)) for data in encoder.datasets] == [
        ("train", 60, 40, 0, 40),
        ("val", 20, 20, 0, 20),
    ]
    assert counts(encoder) == (80, 40, 0, 40)  # every text of the second is in the first
    assert not encoder.estimated
    assert (encoder.row_shape, encoder.dtype, encoder.row_bytes) == ((16,), "float32", 64)
    assert (found.total_bytes, found.new_bytes) == (40 * 64, 40 * (64 + 16))
    assert found.batch_size == 4


def test_rows_have_the_bytes_of_the_storage_dtype():
    found = planned(CacheConfig(dtype="float16"))
    assert (found.encoders[0].dtype, found.encoders[0].row_bytes, found.total_bytes) == ("float16", 32, 40 * 32)
    assert found.encoders[0].bytes_by_dtype == {"float32": 2560, "float16": 1280, "bfloat16": 1280}


@pytest.mark.parametrize("labels", ["auto", False])
def test_after_a_fit_nothing_is_left_to_encode(tmp_path, labels):
    cache = CacheConfig(save_dir=tmp_path / "rows", labels=labels)
    fit(Model(cache=cache), loader(Texts(texts(60, 40))), loader(Texts(texts(20))))
    found = planned(cache)
    assert counts(found.encoders[0]) == (80, 40, 40, 0)
    assert found.fill_seconds == 0
    assert (found.break_even, found.break_even_epoch) in [(0, 1), (None, None)]  # by what the machine measured
    assert "nothing is encoded" in found.summary()
    assert found.encoders[0].source is not None
    assert Path(found.encoders[0].source).is_dir()


def test_grown_and_edited_data_have_their_new_items_counted(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts(texts(40))))
    assert counts(planned(cache, loader(Texts(texts(50))), val=None).encoders[0]) == (50, 50, 40, 10)
    edited = [*texts(39), "another text", "another text"]
    assert counts(planned(cache, loader(Texts(edited)), val=None).encoders[0]) == (41, 40, 39, 1)


def test_another_encoder_finds_no_rows(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts(texts(40))))
    found = planned(cache, loader(Texts(texts(40))), val=None, encoders={"default": HashingEncoder(seed=5)})
    assert counts(found.encoders[0]) == (40, 40, 0, 40)


def test_rows_in_a_damaged_shard_count_as_absent_unless_checksums_are_off(tmp_path, caplog):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts(texts(40))))
    (shard,) = (tmp_path / "rows").rglob("shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert counts(planned(cache, loader(Texts(texts(40))), val=None).encoders[0]) == (40, 40, 0, 40)
    careless = CacheConfig(save_dir=tmp_path / "rows", checksums=False)
    assert counts(planned(careless, loader(Texts(texts(40))), val=None).encoders[0]) == (40, 40, 40, 0)


@pytest.mark.parametrize("persistent", [True, False])
def test_encoders_of_one_identity_share_rows_where_rows_persist(tmp_path, persistent):
    cache = CacheConfig(save_dir=tmp_path / "rows" if persistent else None)
    found = planned(cache, encoders={"a": HashingEncoder(), "b": HashingEncoder()})
    assert counts(found.encoders[0]) == (80, 40, 0, 40)
    assert counts(found.encoders[1]) == ((80, 40, 40, 0) if persistent else (80, 40, 0, 40))
    assert found.total_bytes == 40 * 64 * (1 if persistent else 2)
    model = Model({"a": HashingEncoder(), "b": HashingEncoder()}, cache)
    fit(model, loader(Texts(texts(60, 40))), loader(Texts(texts(20))))
    assert model.cache_callback.report.encoded == found.to_encode


def test_rows_that_an_index_table_names_but_that_are_gone_are_encoded_once_for_encoders_that_share_them(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model({"a": HashingEncoder(), "b": HashingEncoder()}, cache), loader(Texts(texts(40))))
    (shard,) = (tmp_path / "rows").rglob("shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    found = planned(cache, loader(Texts(texts(40))), None, {"a": HashingEncoder(), "b": HashingEncoder()})
    assert [counts(encoder) for encoder in found.encoders] == [(40, 40, 0, 40), (40, 40, 40, 0)]


def test_only_encoders_that_would_be_cached_are_planned():
    encoders = {"frozen": HashingEncoder(1), "left": HashingEncoder(2), "trained": TrainableHashing()}
    found = planned(CacheConfig(mapping={"left": "none"}), encoders=encoders)
    assert [encoder.name for encoder in found.encoders] == ["frozen"]


def test_both_items_of_a_pair_count():
    pairs = [SimilarityPairSample(a, b) for a, b in zip(texts(30, 20), texts(30)[::-1], strict=True)]
    found = planned(train=loader(pairs), val=None)
    assert counts(found.encoders[0]) == (60, 30, 0, 30)


class Unkeyable:
    """An item without canonical bytes."""

    def __init__(self, text):
        self.text = text

    def __len__(self):
        return len(self.text)

    def __iter__(self):
        return iter(self.text)


def test_items_without_content_keys_are_counted_each_and_do_not_persist(tmp_path):
    items = [(Unkeyable(text), 0) for text in texts(30, 10)]
    found = planned(CacheConfig(save_dir=tmp_path / "rows"), loader(items), val=None)
    assert counts(found.encoders[0]) == (30, 30, 0, 30)
    assert found.encoders[0].source is None


def test_extracted_keys_decide_what_is_distinct_and_edited_items_are_encoded_again(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows", key_extractors=lambda text: text.split()[-1])
    fit(Model(cache=cache), loader(Texts(texts(40))))
    changed = texts(40)
    changed[3:5] = ["edited 3", "edited 4"]
    for sample in (texts(40), changed):
        found = planned(cache, loader(Texts(sample)), val=None)
        model = Model(cache=cache)
        assert counts(found.encoders[0]) == (40, 40, 40 - found.to_encode, 0 if sample != changed else 2)
        fit(model, loader(Texts(sample)))
        assert model.cache_callback.report.encoded == found.to_encode


def test_one_dataset_behind_two_loaders_is_counted_once_and_drawn_twice():
    clock = Clock()
    data = Texts(texts(40))
    found = planned(train=loader(data), val=loader(data), encoders={"default": Slow(clock)}, time_func=clock)
    assert counts(found.encoders[0]) == (40, 40, 0, 40)
    assert found.epoch_seconds == pytest.approx(2 * 5)  # 40 items in batches of 8, a second each


# estimates


def test_reading_that_would_take_long_stops_and_the_counts_are_estimates():
    clock = Clock()
    data = SlowTexts(texts(5000, 1000), clock, 0.005)
    found = planned(train=loader(data), val=None, time_func=clock, sample=64)
    (encoder,) = found.encoders
    assert encoder.estimated
    assert data.reads < 13_000  # all of them twice to see that they agree, and less than half of them for their keys
    assert encoder.items == 5000
    assert encoder.distinct == pytest.approx(1000, rel=0.05)
    assert encoder.to_encode == encoder.distinct
    assert "~" in found.table()[1][0][3]
    assert found.summary().startswith("About ")
    assert found.read_seconds == pytest.approx(5000 * 0.005)


def test_what_an_index_table_knows_is_not_read_again(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows", batch_size=256)
    fit(Model(cache=cache), loader(Texts(texts(3000)), batch_size=256), max_epochs=1)
    clock = Clock()
    data = SlowTexts(texts(3000), clock, 0.005)  # reading it all would take longer than reading may
    found = planned(cache, loader(data), val=None, time_func=clock, sample=64)
    assert counts(found.encoders[0]) == (3000, 3000, 3000, 0)
    assert not found.encoders[0].estimated


def test_estimates_go_by_what_is_stored_and_by_what_an_index_table_knows(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows", batch_size=256)
    fit(Model(cache=cache), loader(Texts(texts(1000)), batch_size=256), max_epochs=1)
    clock = Clock()
    items = [*texts(1000), *(f"new {i % 2000}" for i in range(8000)), *texts(1000)]
    data = SlowTexts(items, clock, 0.005)
    found = planned(cache, loader(data), val=None, time_func=clock, sample=64)
    (encoder,) = found.encoders
    assert encoder.estimated
    assert encoder.items == 10_000
    assert encoder.distinct == pytest.approx(3000, rel=0.1)
    assert encoder.to_encode == pytest.approx(2000, rel=0.1)


def test_small_dataset_that_was_not_drawn_from_counts_in_full():
    clock = Clock()
    found = planned(
        train=loader(SlowTexts(texts(20_000), clock, 1.0)), val=loader(Texts(texts(3))), time_func=clock, sample=1
    )
    (_, val) = found.encoders[0].datasets
    assert (val.items, val.distinct, val.estimated) == (3, 3, True)


@pytest.mark.parametrize(("distinct", "copies"), [(1000, 1), (500, 2), (100, 10), (1, 1000)])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_estimate_is_near_the_number_of_distinct_keys(distinct, copies, share):
    keys = np.stack([np.repeat(np.arange(distinct), copies), np.zeros(distinct * copies, np.int64)], axis=1)
    drawn = np.random.default_rng(0).permutation(keys)[: int(share * len(keys))]
    found = estimated_distinct(drawn, len(keys))
    assert found == (distinct if share == 1 else pytest.approx(distinct, rel=0.1))


# time


def test_break_even_follows_from_the_calls_of_fill_and_epoch():
    clock = Clock()
    found = planned(CacheConfig(batch_size=1), encoders={"default": Slow(clock)}, time_func=clock, epochs=10)
    assert found.fill_seconds == pytest.approx(40)  # 40 distinct items, one a call
    assert found.epoch_seconds == pytest.approx(11)  # 8 training batches and 3 of validation
    assert found.cached_epoch_seconds == 0
    assert found.break_even == pytest.approx(40 / 11)
    assert found.break_even_epoch == 4
    assert "ahead after epoch 4" in found.summary()
    assert "40.0 s instead of 1.8 min" in found.summary()
    for epoch, ahead in ((3, False), (4, True)):
        assert (found.fill_seconds + epoch * found.cached_epoch_seconds < epoch * found.epoch_seconds) is ahead


def test_break_even_on_a_whole_epoch_is_ahead_after_the_next():
    clock = Clock()
    train = loader(Texts(texts(40)), batch_size=40)
    found = planned(CacheConfig(batch_size=10), train, val=None, encoders={"default": Slow(clock)}, time_func=clock)
    assert (found.fill_seconds, found.epoch_seconds) == (4, 1)
    assert (found.break_even, found.break_even_epoch) == (4, 5)


def test_reading_counts_as_a_part_of_the_fill():
    clock = Clock()
    train = loader(SlowTexts(texts(40), clock, 0.125), batch_size=40)
    found = planned(CacheConfig(batch_size=40), train, val=None, encoders={"default": Slow(clock)}, time_func=clock)
    assert (found.read_seconds, found.fill_seconds, found.epoch_seconds) == (5, 6, 1)


@pytest.mark.parametrize(
    ("uncached", "cached", "epoch"),
    [(1.0, 0.0, 11), (1.0, 0.5, 21), (0.5, 0.5, None), (0.5, 1.0, None), (30.0, 1.0, 1)],
)
def test_what_cached_epochs_cost_delays_the_break_even(uncached, cached, epoch):
    found = planned(time_func=lambda: 0.0)
    costs = {"fill_seconds": 10.0, "epoch_seconds": uncached, "cached_epoch_seconds": cached}
    found = replace(found, encoders=(replace(found.encoders[0], **costs),))
    assert found.break_even_epoch == epoch
    for epochs in range(1, 40):
        ahead = found.fill_seconds + epochs * cached < epochs * uncached
        assert ahead is (epoch is not None and epochs >= epoch)


def test_cache_that_saves_nothing_never_breaks_even():
    found = planned(time_func=lambda: 0.0)
    assert (found.break_even, found.break_even_epoch) == (None, None)
    assert "not save" in found.summary()
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("make", "seconds"),
    [
        (lambda data: loader(data, drop_last=True), 5 - 1 / 8),  # 39 items: 4 batches are drawn
        (lambda data: loader(data, sampler=WeightedRandomSampler([1.0] * 39, 78)), 10),
        (lambda data: DataLoader(data, batch_sampler=[[0, 1, 2]] * 13), 5),  # tells nothing of itself
    ],
    ids=["drop_last", "sampler", "batch sampler"],
)
def test_epoch_is_what_the_loader_draws(make, seconds):
    clock = Clock()
    config = CacheConfig(batch_size=8)
    found = planned(config, make(Texts(texts(39))), val=None, encoders={"default": Slow(clock)}, time_func=clock)
    per_item = 5 / 39  # the sample is all 39 items, in five batches of at most 8
    items = {5 - 1 / 8: 32, 10: 78, 5: 39}[seconds]
    assert found.epoch_seconds == pytest.approx(items * per_item)


def test_epoch_of_pairs_encodes_both_items_of_a_batch_in_one_call():
    clock = Clock()
    pairs = [SimilarityPairSample(a, b) for a, b in zip(texts(30), texts(30)[::-1], strict=True)]
    found = planned(train=loader(pairs), val=None, encoders={"default": Slow(clock)}, time_func=clock)
    assert found.epoch_seconds == pytest.approx(4)  # batches of 8 pairs


def test_sample_is_encoded_by_the_fill_longest_first_and_then_as_an_epoch_does():
    class Recording(HashingEncoder):
        def collate(self, items):
            self._batches.append(list(items))
            return super().collate(items)

    encoder = Recording()
    encoder._batches = []
    data = Texts(texts(60, 40))
    planned(CacheConfig(batch_size=8), loader(data, batch_size=20), val=None, encoders={"default": encoder}, sample=30)
    warm_up, *rest = encoder._batches
    assert len(warm_up) == 8
    filled, uncached = rest[:-2], rest[-2:]
    assert [len(batch) for batch in uncached] == [20, 10]
    assert all(len(batch) <= 8 for batch in filled)
    lengths = [len(text) for batch in filled for text in batch]
    assert lengths == sorted(lengths, reverse=True)
    sampled = [text for batch in uncached for text in batch]
    assert sorted(text for batch in filled for text in batch) == sorted(set(sampled))
    assert [len(text) for text in sampled] != sorted((len(text) for text in sampled), reverse=True)


# where rows would be


def test_tier_auto_says_why_and_named_tiers_are_kept(tmp_path, monkeypatch):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    assert planned(cache).encoders[0].tier == "CPU"
    assert "free in main memory" in planned(cache).encoders[0].tier_reason
    assert planned(CacheConfig("disk", save_dir=tmp_path / "rows")).encoders[0].tier == "DISK"
    monkeypatch.setattr(placement, "free_memory", lambda: 40 * 64)  # rows may take half of it
    assert planned(cache).encoders[0].tier == "DISK"
    assert planned(CacheConfig()).encoders[0].tier == "CPU"


def test_rows_of_other_data_count_where_the_tier_is_picked(tmp_path, monkeypatch):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts([f"other {text}" for text in texts(100)])))
    monkeypatch.setattr(placement, "free_memory", lambda: 2 * 64 * 139)  # one row short of room for both
    assert planned(cache).encoders[0].tier == "DISK"
    monkeypatch.setattr(placement, "free_memory", lambda: 2 * 64 * 140)
    assert planned(cache).encoders[0].tier == "CPU"


def test_disk_that_is_too_small_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("quatcache.training.plan.planner._disk_free", lambda path: 100)
    found = planned(CacheConfig(save_dir=tmp_path / "rows"))
    assert "do not fit into the 100 bytes" in found.summary()
    assert planned(CacheConfig()).disk_free is None


def test_free_bytes_are_those_of_the_disk_that_will_hold_the_directory(tmp_path):
    found = planned(CacheConfig(save_dir=tmp_path / "not" / "there" / "yet"))
    assert found.disk_free > 0
    assert found.memory_free > 0


# what is left behind


def test_plan_writes_nothing_where_nothing_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    planned(CacheConfig("disk", save_dir="rows"))
    assert tree(tmp_path) == before


def test_plan_touches_no_file_of_a_cache(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts(texts(60, 40))), loader(Texts(texts(20))))
    before = tree(tmp_path)
    for train in (texts(60, 40), texts(70)):
        planned(cache, loader(Texts(train)))
        assert tree(tmp_path) == before


def test_read_only_directory_can_be_planned_for(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts(texts(40))))
    places = [tmp_path / "rows", *(tmp_path / "rows").rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        assert planned(cache, loader(Texts(texts(50))), val=None).to_encode == 10
    finally:
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)


class DrawingTexts(Texts):
    """Draws random numbers whenever it is read."""

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(())
        return super().__getitem__(index)


class DrawingEncoder(HashingEncoder):
    """Draws random numbers whenever it encodes."""

    def forward(self, inputs):
        torch.rand(())
        return super().forward(inputs)


def test_random_states_and_encoders_are_as_before():
    model = Model({"default": DrawingEncoder()}, CacheConfig())
    encoder, train = model.encoders["default"], loader(DrawingTexts(texts(60)), shuffle=True)
    train.generator = torch.Generator().manual_seed(1)
    modes = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(encoder.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), train.generator.get_state()
    plan(model, train)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert torch.equal(train.generator.get_state(), states[3])
    assert model.encoders["default"] is encoder
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    assert model._trainer is None


@pytest.mark.parametrize("how", ["loaders", "data module", "hooks"])
@pytest.mark.parametrize("persistent", [True, False])
def test_fit_after_a_plan_is_the_fit_without_one_bit_for_bit(tmp_path, how, persistent):
    class Hooked(Model):
        prepare_data, setup = Data.prepare_data, Data.setup
        train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader
        calls = Data().calls

    def run(after_plan):
        cache = CacheConfig(save_dir=tmp_path / f"rows {after_plan}" if persistent else None)
        pl.seed_everything(3, verbose=False)
        model = (Hooked if how == "hooks" else Model)(cache=cache)
        pl.seed_everything(3, verbose=False)
        loaders, data = {}, None
        if how == "loaders":
            train = loader(DrawingTexts(texts(60, 40)), shuffle=True, generator=torch.Generator().manual_seed(1))
            loaders = {"train_dataloaders": train, "val_dataloaders": loader(DrawingTexts(texts(20)))}
        elif how == "data module":
            data = Data()
        if after_plan:
            plan(model, **loaders, datamodule=data)
        trainer().fit(model, **loaders, datamodule=data)
        return model

    plain, after = run(False), run(True)
    assert same_run(plain, after)
    assert plain.cache_callback.report.encoded == after.cache_callback.report.encoded > 0


def test_fit_gives_the_figures_that_were_planned(tmp_path):
    cache = CacheConfig(save_dir=tmp_path / "rows", batch_size=4)
    found = planned(cache, loader(Texts(texts(60, 40))), loader(Texts(texts(55))))
    model = Model(cache=cache)
    fit(model, loader(Texts(texts(60, 40))), loader(Texts(texts(55))))
    report = model.cache_callback.report.encoders["default"]
    assert (report.encoded, report.nbytes, report.tier) == (found.to_encode, found.total_bytes, found.encoders[0].tier)


# where loaders come from


def test_data_module_is_set_up_in_a_copy_and_torn_down():
    data = Data()
    found = plan(Model(cache=CacheConfig()), datamodule=data)
    assert [(part.name, part.items) for part in found.encoders[0].datasets] == [("train", 48), ("val", 12)]
    assert data.calls == ["prepare_data", "fit", "teardown fit"]
    assert not hasattr(data, "parts")
    assert data.trainer is None


def test_data_module_is_taken_in_place_of_loaders_and_its_hooks_find_the_trainer():
    class Asking(Data):
        def train_dataloader(self):
            return loader(self.parts[0], batch_size=self.trainer.world_size)

    assert plan(Model(cache=CacheConfig()), Asking()).encoders[0].items == 60


def test_data_module_is_torn_down_after_an_error():
    data = Data()
    with pytest.raises(NotFrozenError):
        plan(Model({"default": unfrozen()}, CacheConfig()), datamodule=data)
    assert data.calls[-1] == "teardown fit"


def test_data_module_made_from_datasets_has_its_loaders():
    data = pl.LightningDataModule.from_datasets(Texts(texts(30)), Texts(texts(10)), batch_size=4)
    assert [part.items for part in plan(Model(cache=CacheConfig()), datamodule=data).encoders[0].datasets] == [30, 10]


def test_validation_hook_of_the_model_goes_with_a_train_loader_that_was_passed():
    class Hooked(Model):
        def val_dataloader(self):
            return loader(Texts(texts(10)))

    found = plan(Hooked(cache=CacheConfig()), loader(Texts(texts(30))))
    assert [part.items for part in found.encoders[0].datasets] == [30, 10]
    none = trainer(limit_val_batches=0)
    found = plan(Hooked(cache=CacheConfig()), loader(Texts(texts(30))), trainer=none)
    assert [part.items for part in found.encoders[0].datasets] == [30]


@pytest.mark.parametrize(
    "pack", [list, lambda two: dict(zip("ab", two, strict=True)), lambda two: CombinedLoader(list(two), "min_size")]
)
def test_collections_of_loaders_are_taken_apart(pack):
    found = planned(train=pack([loader(Texts(texts(30))), loader(Texts(texts(10)))]), val=None)
    assert [(part.name, part.items) for part in found.encoders[0].datasets] == [("train 0", 30), ("train 1", 10)]


def test_config_of_a_callback_given_to_the_trainer_counts():
    given = trainer(callbacks=[CacheCallback(CacheConfig(batch_size=7))])
    assert plan(Model(), loader(Texts(texts(10))), trainer=given).batch_size == 7
    assert plan(Model(), loader(Texts(texts(10))), trainer=given, config=CacheConfig(batch_size=5)).batch_size == 5


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_of_the_trainer_is_that_of_the_planned_rows(tmp_path, precision):
    cache = CacheConfig(save_dir=tmp_path / "rows")
    fit(Model(cache=cache), loader(Texts(texts(40))), precision=precision)
    model = Model(cache=cache)
    before = model.encoders["default"].matrix.clone()
    assert counts(plan(model, loader(Texts(texts(40))), trainer=trainer(precision=precision)).encoders[0])[2:] == (
        40,
        0,
    )
    assert model.encoders["default"].matrix.dtype == torch.float32
    assert torch.equal(model.encoders["default"].matrix, before)
    assert plan(model, loader(Texts(texts(40)))).to_encode == 40


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("64-true", "float64")]
)
def test_inputs_and_rows_have_the_precision_of_the_trainer(precision, dtype):
    items = [(torch.arange(8.0) + i, i % 5) for i in range(20)]
    encoders = {"default": ModuleEncoder(torch.nn.Linear(8, 4), torch.stack, embedding_size=4)}
    found = planned(train=loader(items), val=None, encoders=encoders, trainer=trainer(precision=precision))
    assert found.encoders[0].dtype == dtype


def test_encoder_goes_to_the_device_of_the_trainer_and_back(monkeypatch):
    moves = []

    class Moving(HashingEncoder):
        def to(self, device):
            moves.append(torch.device(device).type)
            return self

    run = trainer()

    class Elsewhere:
        root_device = torch.device("meta")
        precision_plugin = run.precision_plugin

    monkeypatch.setattr(type(run), "strategy", property(lambda self: Elsewhere()))
    with rehearsal.encoder_as_in(run, Moving()):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]


# errors


def unfrozen():
    encoder = HashingEncoder()
    encoder.weight = torch.nn.Parameter(torch.ones(1))
    return encoder


class Endless(IterableDataset):
    def __iter__(self):
        return iter([("a", 0)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: planned(encoders={"default": TrainableHashing()}), ConfigError, "trainable = False"),
        (lambda: planned(CacheConfig("none")), ConfigError, "tier NONE"),
        (lambda: plan(Model(), loader(Texts(texts(5)))), ConfigError, "pass one as config"),
        (lambda: plan(Model(cache=CacheConfig())), LoaderError, "no train loader"),
        (lambda: planned(sample=0), ConfigError, "sample is 0"),
        (lambda: planned(train=loader(Endless())), LoaderError, "IterableDataset"),
        (lambda: planned(train=loader(Texts(texts(9)), collate_fn=list)), LoaderError, "collate_fn"),
        (lambda: planned(encoders={"default": unfrozen()}), NotFrozenError, "requires a gradient"),
        (lambda: planned(CacheConfig(mapping={"other": "cpu"})), ConfigError, "'other'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence_with_the_remedy(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    text = str(raised.value)
    assert text.endswith(".")
    assert len(text.splitlines()) == 1


# what is shown


def test_table_has_a_cell_for_each_heading_and_json_holds_every_figure():
    found = planned(encoders={"a": HashingEncoder(), "b": HashingEncoder(2)}, epochs=5)
    headings, rows = found.table()
    assert all(len(row) == len(headings) for row in rows)
    assert [row[:2] for row in rows] == [[name, data] for name in "ab" for data in ("train", "val", "together")]
    assert rows[2][2:6] == ["80", "40", "0", "40"]
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["encoders"][1]["datasets"][0] == {
        "name": "train", "items": 60, "distinct": 40, "stored": 0, "to_encode": 40, "estimated": False
    }  # fmt: skip
    assert content["total_bytes"] == found.total_bytes == 2 * 40 * 64
    assert content["break_even_epoch"] == found.break_even_epoch
    assert content["epochs"] == 5


def test_one_dataset_makes_one_line():
    headings, rows = planned(val=None).table()
    assert len(rows) == 1
    assert rows[0][:6] == ["default", "train", "60", "40", "0", "40"]
    assert all(rows[0])
    assert len(headings) == len(rows[0])


@pytest.mark.parametrize(
    ("terminal", "asked", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bar_is_shown_in_a_terminal_unless_unwanted(monkeypatch, capsys, terminal, asked, shown):
    for name in ("FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    rich = pytest.importorskip("rich")
    monkeypatch.setattr(rich, "_console", None)  # the global console asks the environment when it is made
    planned(show_progress_bar=asked)
    out = capsys.readouterr().out
    assert "Encoding a sample" in out if shown else out == ""


# real encoders


def test_real_static_embeddings_are_planned_and_then_found(wordllama, tmp_path):
    def encoders():
        return {"default": SentenceTransformerEncoder(wordllama)}

    cache = CacheConfig(save_dir=tmp_path / "rows", dtype="float16")
    found = planned(cache, encoders=encoders())
    assert counts(found.encoders[0]) == (80, 40, 0, 40)
    assert (found.encoders[0].row_shape, found.encoders[0].row_bytes) == ((256,), 512)
    assert found.fill_seconds > 0
    assert found.epoch_seconds > found.cached_epoch_seconds > 0
    fit(Model(encoders(), cache), loader(Texts(texts(60, 40))), loader(Texts(texts(20))))
    assert counts(planned(cache, encoders=encoders()).encoders[0]) == (80, 40, 40, 0)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own for what a run would write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quatcache", "cache", "plan", "--config", "icd10.yaml"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


SMALL = ["--data.init_args.train_size", "66", "--data.init_args.validation_size", "22"]


@pytest.mark.filterwarnings("error:LightningCLI's args parameter")
def test_config_of_the_repository_can_be_planned(minilm_path, elsewhere):
    pytest.importorskip("jsonargparse")
    before = tree(elsewhere), torch.get_rng_state()
    found = plan_from_config(["--config", str(ROOT / "configs" / "icd10.yaml"), *SMALL])
    assert tree(elsewhere) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    (encoder,) = found.encoders
    assert counts(encoder) == (88, 88, 0, 88)
    assert [data.items for data in encoder.datasets] == [66, 22]
    assert (encoder.row_bytes, found.batch_size, found.epochs) == (1536, 64, 100)
    assert found.save_dir == str(elsewhere / "cache")
    assert found.break_even_epoch in {1, 2, 3}
    assert "100 epochs" in found.summary()


def test_config_that_a_run_left_behind_can_be_planned(minilm_path, elsewhere):
    pytest.importorskip("jsonargparse")
    config = elsewhere / "config.yaml"
    text = (ROOT / "configs" / "icd10.yaml").read_text(encoding="utf-8")
    config.write_text(text + "\nckpt_path: null\nweights_only: null\n", encoding="utf-8")
    arguments = ["--config", str(config), *SMALL, "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "-1"]
    found = plan_from_config(arguments)
    assert (found.to_encode, found.epochs) == (66, None)
    with pytest.raises(SystemExit):
        plan_from_config(["--config", str(config), "--model.init_args.cache.batchsize", "3"])
