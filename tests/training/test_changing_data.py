"""A dataset that grows, shrinks, is reordered and edited from run to run: trained as if it had never been cached."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch import nn

from quatcache import CacheConfig, SimilarityPairSample
from quatcache.errors import ConfigError
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.training import verify
from tests.fits import WORDS, HashingEncoder, Model, Texts, fit, loader, same_run, texts


@dataclass
class Data:
    """Samples that change; a sample is ``(text, label)``, or ``(text, text, score, subgroup)`` for pairs."""

    pairs: bool
    random: random.Random
    samples: list

    def text(self):
        """Give a text, often one that was met before in another place."""
        return f"{self.random.choice(WORDS)} {self.random.randrange(12)}"

    def sample(self):
        if self.pairs:
            return self.text(), self.text(), float(self.random.randrange(3)), self.random.randrange(3)
        return self.text(), self.random.randrange(5)

    def some(self):
        return self.random.sample(range(len(self.samples)), self.random.randint(1, min(5, len(self.samples))))

    def grow(self):
        self.samples += [self.sample() for _ in range(self.random.randint(1, 6))]

    def insert(self):
        self.samples.insert(self.random.randrange(len(self.samples)), self.sample())

    def shrink(self):
        kept = set(range(len(self.samples))) - set(self.some())
        self.samples = [self.samples[place] for place in sorted(kept)] or self.samples[:1]

    def cut(self):
        self.samples = self.samples[: self.random.randint(1, len(self.samples))]

    def reorder(self):
        self.random.shuffle(self.samples)

    def swap(self):
        one, other = (self.random.choice(self.some()) for _ in range(2))
        self.samples[one], self.samples[other] = self.samples[other], self.samples[one]

    def edit(self):
        for place in self.some():
            self.samples[place] = self.sample()

    def edit_text(self):
        place = self.random.choice(self.some())
        self.samples[place] = (self.text(), *self.samples[place][1:])

    def edit_target(self):
        place = self.random.choice(self.some())
        self.samples[place] = (*self.samples[place][:-1], (self.samples[place][-1] + 1) % 5)

    def edit_score(self):
        place = self.random.choice(self.some())
        if self.pairs:
            one, other, score, subgroup = self.samples[place]
            self.samples[place] = one, other, 0.0 if score else 1.0, subgroup

    def duplicate(self):
        self.samples += [self.samples[place] for place in self.some()]

    def double(self):
        self.samples = (self.samples * 2)[:48]

    def as_dataset(self, samples):
        if self.pairs:
            return [SimilarityPairSample(*sample) for sample in samples]
        return Texts([text for text, _ in samples], [label for _, label in samples])

    def texts_of(self, samples):
        return {text for sample in samples for text in sample[: 2 if self.pairs else 1]}


CHANGES = [
    *("grow", "insert", "duplicate", "double", "shrink", "cut"),
    *("reorder", "swap", "edit", "edit_text", "edit_target", "edit_score"),
]
RUNS = st.lists(
    st.fixed_dictionaries(
        {
            "changes": st.lists(st.sampled_from(CHANGES), max_size=3),
            "labels": st.sampled_from([True, False, "auto"]),
            "tier": st.sampled_from(["cpu", "disk"]),
            "overlap": st.one_of(st.none(), st.integers(0, 6)),
        }
    ),
    min_size=1,
    max_size=5,
)


def train(data, dataset, val, cache):
    encoder = HashingEncoder()
    loss = MultipleNegativesRankingLoss(negatives="same_subgroup") if data.pairs else nn.CrossEntropyLoss()
    model = Model({"default": encoder}, cache, loss)
    fit(model, loader(dataset, shuffle=True), val and loader(val), max_epochs=1)
    return model, encoder._collated


def check(data, runs):
    """Fit run by run on one directory, each time beside a fit without a cache."""
    met, encoded = set(), Counter()
    with tempfile.TemporaryDirectory() as save_dir:
        for run in runs:
            for change in run["changes"]:
                getattr(data, change)()
            val = None
            if run["overlap"] is not None:
                val = [*data.samples[: run["overlap"]], data.sample()]
            met |= data.texts_of(data.samples + (val or []))
            dataset, val = data.as_dataset(data.samples), val and data.as_dataset(val)
            cache = CacheConfig(run["tier"], batch_size=4, labels=run["labels"], save_dir=save_dir)
            cached, collated = train(data, dataset, val, cache)
            plain, _ = train(data, dataset, val, None)
            assert same_run(plain, cached)
            assert cached.cache_callback.report.labels is (run["labels"] is not False)
            assert cached.cache_callback.report.encoded == len(collated)
            encoded.update(collated)
    assert set(encoded) == met
    assert set(encoded.values()) == {1}


@given(seed=st.integers(0, 2**32), pairs=st.booleans(), size=st.integers(1, 24), runs=RUNS)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_whatever_happens_to_a_dataset_it_is_trained_as_without_a_cache_and_texts_are_encoded_once(
    seed, pairs, size, runs
):
    data = Data(pairs, random.Random(seed), [])
    data.samples = [data.sample() for _ in range(size)]
    check(data, runs)


@pytest.mark.parametrize("pairs", [False, True], ids=["groups", "pairs"])
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_alone_is_noticed(change, pairs):
    data = Data(pairs, random.Random(3), [])
    data.samples = [data.sample() for _ in range(16)]
    usual = {"changes": [], "labels": True, "tier": "cpu", "overlap": 5}
    check(data, [usual, {**usual, "changes": [change]}, usual])


class Noting(Texts):
    """Keeps the indices that were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.indices = []

    def __getitem__(self, index):
        self.indices.append(index)
        return super().__getitem__(index)


@pytest.fixture
def few_are_compared(monkeypatch):
    """Compare 8 items instead of 64, and take no time for more; the same ones in each run."""
    monkeypatch.setattr(verify, "SAMPLED", 8)
    for compare in (verify.matching_table, verify.reread):
        monkeypatch.setattr(compare, "__kwdefaults__", {"seconds": 0.0, "time_func": time.monotonic})
    drawn = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=7: drawn(seed))


def large(change=lambda words, groups: None):
    words, groups = texts(200), [place % 5 for place in range(200)]
    change(words, groups)
    return Noting(words, groups)


def compared_places(save_dir):
    """Find the items that a warm start compares, beyond those at the front that every run looks at."""
    dataset = large()
    model = Model(cache=CacheConfig(save_dir=save_dir))
    fit(model, loader(dataset))
    assert model.cache_callback.report.encoded == 0
    assert len(set(dataset.indices)) < 32
    return sorted(set(dataset.indices) - set(range(verify.READ_TWICE)))


@pytest.mark.parametrize("what", ["text", "label"])
def test_an_edit_in_a_dataset_too_large_to_be_compared_is_noticed_where_it_is_looked_at(
    what, few_are_compared, tmp_path
):
    fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(large()))
    places = compared_places(tmp_path)
    assert len(places) >= 6

    def edit(words, groups):
        if what == "text":
            words[places[2]] = "quite another text"
        else:
            groups[places[2]] = (groups[places[2]] + 1) % 5

    edited = large(edit)
    cached, plain = Model(cache=CacheConfig(save_dir=tmp_path)), Model()
    fit(cached, loader(edited, shuffle=True))
    assert cached.cache_callback.report.encoded == (what == "text")
    assert cached.cache_callback.report.read == 200
    fit(plain, loader(edited, shuffle=True))
    assert same_run(plain, cached)


def test_the_ends_of_a_dataset_are_compared_at_every_warm_start(few_are_compared, tmp_path):
    fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(large()))
    for place, expected in itertools.product((0, 199), (1, 0)):
        model = Model(cache=CacheConfig(save_dir=tmp_path))
        fit(model, loader(large(lambda words, groups, place=place: words.__setitem__(place, f"an end: {place}"))))
        assert model.cache_callback.report.encoded == expected


def test_of_a_dataset_that_grew_every_item_is_compared_and_what_is_new_is_read_twice_before_the_fill(tmp_path):
    fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(Texts(texts(200))))
    grown = Noting(texts(210))
    model = Model(cache=CacheConfig(save_dir=tmp_path))
    fit(model, loader(grown))
    assert model.cache_callback.report.read == model.cache_callback.report.encoded == 10
    reads = Counter(grown.indices)
    front = range(verify.READ_TWICE)  # of which it is asked whether they can be keyed
    assert [reads[place] for place in range(210)] == [2 if place in front else 1 if place < 200 else 3
                                                      for place in range(210)]  # fmt: skip


class Restless(Texts):
    """Gives another text at each read of some of its items."""

    def __init__(self, count, changing):
        super().__init__(texts(count))
        self.changing = changing

    def __getitem__(self, index):
        text, group = super().__getitem__(index)
        return (f"{text} {self.reads}" if index in self.changing else text), group


@pytest.mark.parametrize("changing", [{205}, {0}, {100}], ids=["new", "first", "old"])
def test_an_item_that_changes_at_each_read_is_refused_in_a_dataset_that_grew(changing, tmp_path):
    fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(Texts(texts(200))))
    with pytest.raises(ConfigError, match=f"item {min(changing)} of the train dataset differs between two reads"):
        fit(Model(cache=CacheConfig(save_dir=tmp_path)), loader(Restless(210, changing)))


class OneMore(HashingEncoder):
    """Sees other content each time that it is asked."""

    def content(self, item):
        self._asked = getattr(self, "_asked", 0) + 1
        return f"{item} {self._asked}"


@pytest.mark.parametrize("what", ["content", "key"])
def test_texts_that_stay_while_their_keys_change_are_refused(what):
    counter = itertools.count()
    extractor = {"key_extractors": lambda item: next(counter)} if what == "key" else {}
    encoder = OneMore() if what == "content" else HashingEncoder()
    with pytest.raises(ConfigError, match="differs between two reads"):
        fit(Model({"default": encoder}, CacheConfig(**extractor)), loader(Texts(texts(20))))


class Relabelled(Texts):
    """Gives one of its samples another label at each read."""

    def __getitem__(self, index):
        text, group = super().__getitem__(index)
        return text, (self.reads % 5 if index == 7 else group)


def test_a_label_that_changes_between_two_reads_is_not_kept():
    model = Model(cache=CacheConfig())
    fit(model, loader(Relabelled(texts(21))))
    report = model.cache_callback.report
    assert not report.labels and "the target of item 7 differs between two reads" in report.labels_reason


class ChangesLength(Callback):
    """Adds to a dataset, or takes from it, after the first epoch."""

    def __init__(self, data, by):
        self.data, self.by = data, by

    def on_train_epoch_end(self, trainer, pl_module):
        if self.by > 0:
            self.data.texts += [f"new {number}" for number in range(self.by)]
            self.data.groups += [0] * self.by
        else:  # not at its end: the samples behind have other indices then
            del self.data.texts[: -self.by], self.data.groups[: -self.by]


@pytest.mark.parametrize("by", [4, -4])
@pytest.mark.parametrize("cache", [{}, {"labels": False}, {"fill": "lazy"}, {"max_size": 1000}], ids=str)
def test_another_length_within_a_fit_is_refused_unless_loaders_are_reloaded(cache, by):
    def run(config, **settings):
        data, model = Texts(texts(24)), Model(cache=config)
        model.train_dataloader = lambda: loader(data, shuffle=True)
        fit(model, None, callbacks=[ChangesLength(data, by)], max_epochs=2, **settings)
        return model

    remedy = {"reload_dataloaders_every_n_epochs": 1}
    with pytest.raises(ConfigError, match=f"has {24 + by} samples and had 24 when it was cached in this run; give"):
        run(CacheConfig(**cache))
    assert same_run(run(None, **remedy), run(CacheConfig(**cache), **remedy))
