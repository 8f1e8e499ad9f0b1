"""Law 3 over the whole matrix: source of loaders x sampler x kind of sample x tier x labels x fill x processes."""

from __future__ import annotations

from itertools import product

import pytest

from tests.processes import Job, linux_only
from tests.training.distributed_runs import free_port
from tests.training.matrix_fits import SOURCES, Way, differing, differs, refusals, sampled_alike, ways


def shared_ways(source):
    """What two ranks train: the whole cross with an eager fill; a lazy one is met by each sampler and kind once."""
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
    ranks = on_two_ranks(differing, tmp_path, folder=str(tmp_path), cells=cells)
    troubles = [trouble for found in ranks for trouble in found]
    assert not troubles, "\n".join(troubles)


@linux_only
@pytest.mark.slow
def test_a_batch_sampler_keeps_its_batch_size_and_its_sampler_on_two_ranks(tmp_path):
    ranks = on_two_ranks(sampled_alike, tmp_path)
    for losses in ranks:
        for name, steps in {"shuffled": 6, "weighted": 4, "a class of its own": 6}.items():  # of two epochs
            assert [run for run in losses[name] if run != losses[name][0]] == []
            assert len(losses[name][0]) == steps
    assert ranks[0] != ranks[1]


@linux_only
@pytest.mark.slow
def test_lightning_refuses_to_share_out_batches_of_unknown_origin_before_a_fill_as_without_a_cache(tmp_path):
    way, save_dir = Way("passed", "own batches", "group", "cpu", "auto"), tmp_path / "cache"
    ranks = on_two_ranks(refusals, tmp_path, way=way, save_dir=str(save_dir), use_distributed_sampler=True)
    for messages in ranks:
        assert messages[0] == messages[1]
        assert messages[0].startswith("TypeError:  Lightning can't inject a (distributed) sampler")
        assert "Trainer(use_distributed_sampler=False)" in messages[0]
    assert not list(save_dir.rglob("*.safetensors"))  # nothing was encoded
