"""Ranks that cache rows as batches meet them encode each distinct item once in total, and never wait in vain."""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import partial

import pytest

from quatcache.errors import StoreError
from quatcache.store import DiskStore
from quatcache.training.shared_steps import SharedSteps
from tests.committed import committed_rows, only_store, texts_by_key
from tests.processes import linux_only
from tests.training.distributed_fit import BUDGET, fit_variant
from tests.training.distributed_runs import MANY, Runs, steps
from tests.training.killed_fit import ENCODED, logged, samples

pytestmark = [pytest.mark.slow, linux_only]


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def once():
    return Counter(samples(MANY)[2])


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_each_distinct_item_is_encoded_once_in_total(stream, runs, tmp_path):
    results = runs.run(2, lazy=True, stream=stream)
    assert runs.encoded() == once()
    assert sum(result["encoded"] for result in results) == len(once())
    for result in results:
        assert result["asked"] == result["hits"] + result["duplicates"] + result["encoded"]
    (tmp_path / "plain").mkdir()
    assert steps(results) == steps(Runs(tmp_path / "plain").run(2, cache=False, save_dir=None, stream=stream))
    assert runs.left_behind() == []
    assert [result["encoded"] for result in runs.run(2, lazy=True, stream=stream)] == [0, 0]
    assert only_store(runs.save_dir).keys() == texts_by_key(once()).keys()


def hand_on_or_fail():
    """Have a rank fail that looks for rows of another while it holds back what it has encoded itself."""
    hand_on, rows_of_others, handed_on = SharedSteps.hand_on, SharedSteps.rows_of_others, []

    def noting(steps, turn):
        hand_on(steps, turn)
        handed_on.append(turn)

    def checking(steps, turn):
        assert handed_on and handed_on[-1] is turn
        return rows_of_others(steps, turn)

    SharedSteps.hand_on, SharedSteps.rows_of_others = noting, checking


def test_a_rank_hands_on_its_rows_before_it_waits_for_those_of_others(runs):
    runs.run(2, lazy=True, fill=hand_on_or_fail)
    assert runs.encoded() == once()


def test_rows_that_are_committed_meanwhile_are_found_in_the_store(runs):
    results = runs.run(2, lazy=True, stream=True, shard_bytes=2048)
    assert runs.encoded() == once()
    assert sum(result["encoded"] for result in results) == len(once())
    assert only_store(runs.save_dir).keys() == texts_by_key(once()).keys()


def test_ranks_without_save_dir_encode_each_item_once_in_total(runs):
    runs.run(2, lazy=True, save_dir=None)
    assert runs.encoded() == once()


@pytest.mark.parametrize("variant", ["pairs, two encoders", "encoders of one identity"])
def test_several_encoders_encode_each_item_once_in_total(variant, tmp_path):
    settings = {"function": fit_variant, "variant": variant, "count": 60}
    lazy, eager, plain = (Runs(tmp_path / name) for name in ("lazy", "eager", "plain"))
    for runs in (lazy, eager, plain):
        runs.path.mkdir()
    results = lazy.run(2, fill="lazy", **settings)
    eager.run(2, **settings)
    assert lazy.encoded() == eager.encoded()
    assert committed_rows(lazy.save_dir).keys() == committed_rows(eager.save_dir).keys()
    assert steps(results) == steps(plain.run(2, cache=False, **{**settings, "save_dir": None}))


def test_what_a_budget_does_not_keep_is_not_claimed(tmp_path):
    settings = {"function": fit_variant, "variant": "budget", "count": 60}
    lazy, plain = (Runs(tmp_path / name) for name in ("lazy", "plain"))
    for runs in (lazy, plain):
        runs.path.mkdir()
    results = lazy.run(2, fill="lazy", **settings)
    assert steps(results) == steps(plain.run(2, cache=False, **{**settings, "save_dir": None}))
    assert min(map(len, committed_rows(lazy.save_dir).values())) >= BUDGET


def test_a_cheap_encoder_is_not_shared_for_sharing_would_cost_more(runs):
    runs.run(2, lazy=True, stream=True, shared_seconds=1e9)  # after its first step each rank knows how fast it is
    again = runs.encoded() - once()  # those of the validation are split between the ranks
    assert len(set(samples(MANY)[0].texts) - set(again)) <= 32


def full_disk():
    """Have no store of this process take any more rows after its second batch."""
    put_many, calls = DiskStore.put_many, iter(range(1000))

    def put(store, keys, values):
        if len(keys) and next(calls) >= 2:
            raise StoreError("no space left; free some.")
        put_many(store, keys, values)

    DiskStore.put_many = put


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_disk_is_full_goes_on_alone_and_so_does_the_other(victim, runs, tmp_path):
    results = runs.run(2, lambda rank: {"fill": full_disk} if rank == victim else {}, lazy=True, stream=True)
    (tmp_path / "plain").mkdir()
    assert steps(results) == steps(Runs(tmp_path / "plain").run(2, cache=False, save_dir=None, stream=True))
    assert results[1 - victim]["encoded"]


def only_on(victim, what):
    """Settings for each rank: something happens on one of them."""
    return lambda rank: {"happens": what} if rank == victim else {}


def die(call, at):
    if call == at:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(call, at):
    if call == at:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("victim", [0, 1])
def test_nobody_waits_for_a_rank_that_was_killed_between_its_claim_and_its_rows(victim, stream, runs):
    jobs = runs.start(2, only_on(victim, partial(die, at=3)), lazy=True, stream=stream, survive=True)
    assert jobs[victim].status() == -signal.SIGKILL
    jobs[1 - victim].result()  # its training fails for want of the other: it ends
    last = logged(runs.log, ENCODED)[victim][-8:]
    runs.forget()
    results = runs.run(2, lazy=True, stream=stream)
    assert set(last) & set(runs.encoded())
    assert only_store(runs.save_dir).keys() == texts_by_key(once()).keys()
    assert results[0]["train"]


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("victim", [0, 1])
def test_an_encoder_that_raises_on_one_rank_ends_both_with_an_error(victim, stream, runs):
    results = runs.run(2, only_on(victim, partial(fail, at=3)), lazy=True, stream=stream, survive=True)
    assert "out of memory" in results[victim]["error"]
    assert results[1 - victim].get("error")
    assert runs.left_behind() == []
