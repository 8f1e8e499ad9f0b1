"""Epochs in index tensors: the numbers of the user's sampler at the moments of the user's sampler, moved once."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from quatcache import CacheConfig, CacheType, SimilarityPairSample
from quatcache.data.batches import CachedColumns
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.training import index_batches, session
from quatcache.training.index_batches import IndexBatches
from tests.fits import HashingEncoder, Model, Texts, fit, loader, same_run, texts

META = torch.device("meta")


class Backwards(Sampler):
    """Counts from the end, as lists understand it."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(range(-1, -self.size - 1, -1))


def distributed(size, epoch=0, **settings):
    sampler = DistributedSampler(range(size), **settings)
    sampler.set_epoch(epoch)
    return sampler


def seeded():
    return torch.Generator().manual_seed(5)


KNOWN = {
    "in order": lambda: SequentialSampler(range(11)),
    "in order, whole batches": lambda: SequentialSampler(range(12)),
    "nothing": lambda: SequentialSampler(range(0)),
    "shuffled": lambda: RandomSampler(range(11)),
    "shuffled, whole batches": lambda: RandomSampler(range(12)),
    "shuffled, own generator": lambda: RandomSampler(range(11), generator=seeded()),
    "ranks": lambda: distributed(11, num_replicas=2, rank=1, seed=7),
    "ranks, third epoch": lambda: distributed(11, epoch=2, num_replicas=2, rank=1, seed=7),
    "ranks, even": lambda: distributed(12, num_replicas=3, rank=0),
    "ranks, uneven, dropped": lambda: distributed(11, num_replicas=3, rank=2, drop_last=True),
    "ranks, even, dropped": lambda: distributed(12, num_replicas=3, rank=2, drop_last=True),
    "ranks, in order": lambda: distributed(11, num_replicas=4, rank=3, shuffle=False),
    "more ranks than samples": lambda: distributed(3, num_replicas=8, rank=7, shuffle=True),
    "more ranks than samples, in order": lambda: distributed(2, num_replicas=5, rank=4, shuffle=False),
}
OTHER = {
    "replacement": lambda: RandomSampler(range(11), replacement=True, num_samples=9),
    "twice": lambda: RandomSampler(range(5), num_samples=10),
    "weighted": lambda: WeightedRandomSampler([1.0, 2.0, 3.0], 10),
}


def drawn(batches, generator):
    """Every batch, and the states of both generators when it was given and at the end."""
    made = []
    for batch in batches:
        made.append((list(batch), torch.get_rng_state().tolist(), generator and generator.get_state().tolist()))
    return [*made, (torch.get_rng_state().tolist(), generator and generator.get_state().tolist())]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("name", [*KNOWN, *OTHER])
def test_batches_and_random_states_are_those_of_the_sampler_at_every_batch(name, drop_last):
    outcomes = []
    for wrap in (lambda batches: batches, lambda batches: (b.where for b in IndexBatches(batches, 12))):
        torch.manual_seed(3)
        sampler = {**KNOWN, **OTHER}[name]()
        batches = wrap(BatchSampler(sampler, 4, drop_last))
        outcomes.append(
            drawn(
                (b.tolist() if isinstance(b, torch.Tensor) else b for b in batches), getattr(sampler, "generator", None)
            )
        )
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", KNOWN)
def test_an_epoch_of_a_known_sampler_is_known_ahead_and_moved_once(name, monkeypatch):
    moved = []
    monkeypatch.setattr(index_batches, "send", lambda values, device: moved.append(values) or values.to(device))
    batches = IndexBatches(BatchSampler(KNOWN[name](), 4, False), 12, META)
    given = list(batches)
    assert len(moved) == (name != "nothing")
    assert [batch.where.device for batch in given] == [META] * len(given)
    assert [batch.drawn.tolist() for batch in given] == [batch.tolist() for batch in batches.known]
    assert all(len(batch.drawn) == len(batch.where) for batch in given)


def test_nothing_is_known_ahead_of_samplers_that_draw_as_they_go(monkeypatch):
    moved = []
    monkeypatch.setattr(index_batches, "send", lambda values, device: moved.append(values.tolist()) or values)
    batches = IndexBatches(BatchSampler(Backwards(5), 2, False), 5, META)
    assert [list(batch.drawn) for batch in batches] == [[-1, -2], [-3, -4], [-5]]
    assert moved == [[4, 3], [2, 1], [0]]
    assert not batches.known


def test_samples_that_a_sampler_counts_from_the_end_are_trained_on():
    train = functools.partial(loader, Texts(texts(20)), sampler=Backwards(20))
    assert same_run(run(None, train), run(CacheConfig(), train))


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_dataset_that_changed_behind_its_sampler_is_refused_as_by_the_sampler(drop_last):
    data = list(range(10))
    sampler = DistributedSampler(data, num_replicas=2, rank=0, drop_last=drop_last)
    del data[5:]
    if not drop_last:
        data.extend(range(20))
    with pytest.raises(AssertionError):
        list(IndexBatches(BatchSampler(sampler, 4, False), len(data)))


# Whole fits on the way that a GPU goes, on the CPU: all that is on one device stays there.


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the CPU for a GPU that has all rows; gives what was sent there for an epoch, and the columns."""
    sent = {"orders": [], "columns": []}

    def send(values, device):
        sent["orders"].append(len(values))
        return values.clone()

    copied = CachedColumns.to

    def to(columns, device):
        sent["columns"].append(device)
        return copied(columns, device)

    monkeypatch.setattr(session, "fetches", lambda device: True)
    monkeypatch.setattr(index_batches, "send", send)
    monkeypatch.setattr(CachedColumns, "to", to)
    return sent


def run(cache, train, encoders=None, loss=None, **settings):
    model = Model(encoders or {"default": HashingEncoder()}, cache, loss or nn.CrossEntropyLoss())
    fit(model, train, functools.partial(loader, Texts(texts(20))) if loss is None else None, **settings)
    return model


def test_an_epoch_and_the_columns_are_moved_once(as_on_a_gpu):
    train = functools.partial(loader, Texts(texts(50, 30)), shuffle=True)
    model = run(CacheConfig(), train, max_epochs=3)
    assert same_run(run(None, train, max_epochs=3), model)
    assert sorted(as_on_a_gpu["orders"]) == [20] * 4 + [50] * 3  # validation has a sanity check before
    assert len(as_on_a_gpu["columns"]) == 2  # of two datasets


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_other_samplers_are_moved_one_by_one(as_on_a_gpu, workers):
    def train():
        return loader(Texts(texts(30)), sampler=WeightedRandomSampler([1.0] * 30, 30), num_workers=workers)

    model = run(CacheConfig(), train, max_epochs=1)
    orders = sorted(as_on_a_gpu["orders"])
    assert same_run(run(None, train, max_epochs=1), model)
    assert orders == [6, 8, 8, 8, 20, 20]


def test_pairs_and_two_encoders_train_alike(as_on_a_gpu):
    words = texts(40)
    pairs = [SimilarityPairSample(words[n], words[n + 20], 1.0, n) for n in range(20)]

    def once(cache):
        both = {"a": HashingEncoder(1), "b": HashingEncoder(2)}
        return run(cache, functools.partial(loader, pairs, shuffle=True), both, MultipleNegativesRankingLoss())

    assert same_run(once(None), once(CacheConfig()))
    assert as_on_a_gpu["orders"] == [20, 20]


@pytest.mark.parametrize("cache", [{"cache_type": CacheType.DISK}, {"mapping": {"b": "disk"}}, {"labels": False}])
def test_where_not_all_is_on_the_device_indices_stay_in_main_memory(as_on_a_gpu, cache, tmp_path):
    def once(cache):
        both = {"a": HashingEncoder(1), "b": HashingEncoder(2)}
        return run(cache, functools.partial(loader, Texts(texts(50)), shuffle=True), both)

    assert same_run(once(None), once(CacheConfig(save_dir=tmp_path, **cache)))
    assert as_on_a_gpu == {"orders": [], "columns": []}


class TensorBatches:
    """Batches as tensors, with indices that count from the end."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([torch.arange(5), torch.arange(-5, 0), torch.tensor([3, -3]), torch.tensor([-20])])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"labels": False}, {"fill": "lazy"}, {"max_size": 600}])
def test_batches_that_are_tensors_may_count_from_the_end(settings, workers):
    def run(cache):
        model = Model(cache=cache)
        fit(model, loader(Texts(texts(20)), batch_size=1, batch_sampler=TensorBatches(), num_workers=workers))
        return model

    assert same_run(run(CacheConfig(**settings)), run(None))
