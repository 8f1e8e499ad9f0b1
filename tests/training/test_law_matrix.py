"""Law 3 over the whole matrix: source of loaders x sampler x kind of sample x tier x labels x fill x processes."""

from __future__ import annotations

from itertools import product

import pytest
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

from tests.fits import loader
from tests.processes import Job, linux_only
from tests.training.distributed_runs import free_port
from tests.training.matrix_fits import SIZE, SOURCES, Way, differing, differs, refusals, train_losses, ways


def shared_ways(source):
    """What two ranks train: all but the lazy fill, which each sampler and kind meets with one tier, with labels or not."""
    whole = [way for way in ways(fills=["eager"]) if way.source == source]
    if source == "stream":
        return whole
    turns = list(product(["cpu", "disk"], ["auto", False]))
    kinds = dict.fromkeys((way.sampler, way.kind) for way in whole)
    first = SOURCES.index(source)
    lazy = [
        Way(source, sampler, kind, *turns[(first + place + place // 2) % 4], "lazy")
        for place, (sampler, kind) in enumerate(kinds)
    ]
    return whole + lazy


def on_two_ranks(function, path, **settings):
    """Run a function as each of two ranks, and give what it returned there, or how it ended otherwise."""
    shared = {"size": 2, "port": free_port(), **settings}
    jobs = [Job(function, path / f"{rank}.json", rank=rank, **shared) for rank in range(2)]
    results = []
    for rank, job in enumerate(jobs):
        try:
            results.append(job.result())
        except AssertionError as error:  # the other rank may know why
            under_way = path / f"{rank}.at"
            results.append([f"{under_way.read_text() if under_way.exists() else ''} on rank {rank}: {error}"])
    return results


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.name)
def test_cached_training_is_uncached_training(way):
    assert differs(way) is None


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_cached_training_on_two_ranks_is_uncached_training(source, tmp_path):
    cells = shared_ways(source)
    assert on_two_ranks(differing, tmp_path, folder=str(tmp_path), cells=cells) == [[], []]
