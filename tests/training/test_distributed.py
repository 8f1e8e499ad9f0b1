"""Several ranks fill a cache together, encode each distinct item once in total, and train as they do without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from torch.nn.parallel import DistributedDataParallel

from quatcache.training import distributed
from tests.committed import committed_rows, only_store, texts_by_key
from tests.processes import context, linux_only
from tests.training.distributed_fit import COUNT, first_letters, whole_text
from tests.training.distributed_runs import MANY, Runs, free_port, steps
from tests.training.killed_fit import ENCODED, SAID, logged, samples

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def once(count=MANY):
    return Counter(samples(count)[2])


@pytest.fixture(scope="module")
def uncached(tmp_path_factory):
    """Every step of a run of so many ranks without a cache; each is made once."""
    known = {}

    def made(size, **settings):
        key = size, *sorted(settings.items())
        if key not in known:
            runs = Runs(tmp_path_factory.mktemp("uncached"))
            known[key] = steps(runs.run(size, cache=False, save_dir=None, **settings))
        return known[key]

    return made


@linux_only
def test_ranks_share_a_fill_and_each_distinct_item_is_encoded_once_in_total(runs, uncached):
    results = runs.run(2)
    assert runs.encoded() == once()
    assert all(result["encoded"] > len(once()) // 4 for result in results)
    assert sum(result["encoded"] for result in results) == len(once())
    samples_in_all = sum(map(len, samples(MANY)[:2]))
    assert sum(result["read"] for result in results) == samples_in_all  # no sample is read twice
    for result in results:
        assert result["asked"] == samples_in_all == result["hits"] + result["duplicates"] + result["encoded"]
        assert result["labels"]
    assert steps(results) == uncached(2)
    assert runs.left_behind() == []
    warm = runs.run(2)
    assert [(result["encoded"], result["read"]) for result in warm] == [(0, 0), (0, 0)]
    assert steps(warm) == uncached(2)
    assert runs.left_behind() == []


@linux_only
def test_four_ranks_share_a_fill(runs):
    results = runs.run(4)
    assert runs.encoded() == once()
    assert all(result["encoded"] > len(once()) // 8 for result in results)


@linux_only
def test_ranks_without_save_dir_share_a_temporary_directory_that_is_gone_afterwards(runs, uncached, tmp_path):
    (tmp_path / "system").mkdir()
    results = runs.run(2, save_dir=None, fill=partial(temporary_files_in, tmp_path / "system"))
    assert runs.encoded() == once()
    assert all(result["encoded"] for result in results)
    assert steps(results) == uncached(2)
    assert list((tmp_path / "system").iterdir()) == []
    (told,) = [line for line in logged(runs.log, SAID)[1] if "rows" in line]
    assert "in memory" in told
    assert "quatcache-" not in told  # the directory is nobody's business


def temporary_files_in(directory):
    import tempfile

    tempfile.tempdir = str(directory)


@linux_only
def test_an_error_leaves_no_temporary_directory(runs, tmp_path):
    (tmp_path / "system").mkdir()
    results = runs.run(
        2, save_dir=None, fails=True, survive=True, fill=partial(temporary_files_in, tmp_path / "system")
    )
    assert ["cannot be read" in result["error"] for result in results] == [True, True]
    assert list((tmp_path / "system").iterdir()) == []


def die(call, at, until=None):
    """Be killed in the middle of the fill."""
    if call == at:
        if until is not None:
            assert until.wait(60)
        for thread in threading.enumerate():  # so that it is known what is committed
            if thread.name.startswith("quatcache-commit"):
                thread.join()
        os.kill(os.getpid(), signal.SIGKILL)


SMALL = {"shard_bytes": 4096}
"""Commits of 64 rows."""


@linux_only
@pytest.mark.parametrize("size", [1, 4])
def test_a_fill_that_was_killed_on_two_ranks_is_finished_on_another_number_of_them(size, runs, uncached):
    jobs = runs.start(2, happens=partial(die, at=12), **SMALL)
    assert [job.status() for job in jobs] == [-signal.SIGKILL] * 2
    assert len(runs.left_behind()) == 1
    by_key = texts_by_key(once())
    committed = Counter(by_key[key] for key in only_store(runs.save_dir))
    assert 64 < len(committed) < len(once())
    runs.forget()
    results = runs.run(size)
    assert runs.encoded() == once() - committed
    assert sum(result["encoded"] for result in results) == len(once()) - len(committed)
    assert steps(results) == uncached(size)
    assert runs.left_behind() == []


@linux_only
@pytest.mark.parametrize("extractor", [None, whole_text], ids=["content", "extracted keys"])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_rank_that_is_left_finishes_the_fill_of_one_that_was_killed(victim, extractor, runs):
    def settings(rank):
        return {"happens": partial(die, at=12)} if rank == victim else {}

    jobs = runs.start(2, settings, survive=True, extractor=extractor, **SMALL)
    assert jobs[victim].status() == -signal.SIGKILL
    jobs[1 - victim].result()  # its training may fail: the other rank is missing
    assert only_store(runs.save_dir).keys() == texts_by_key(once()).keys()
    lost = runs.encoded() - once()
    assert set(lost.values()) == {1}
    assert set(lost) <= set(logged(runs.log, ENCODED)[victim])
    assert len(lost) < 64 + 8 + 8  # what it had not committed


@linux_only
def test_extracted_keys_and_labels_come_out_as_on_one_process(runs, tmp_path):
    settings = {"extractor": first_letters, "labels": True}
    alone = Runs(tmp_path / "alone")
    alone.path.mkdir()
    alone.run(1, **settings)
    results = runs.run(2, **settings)
    assert committed_rows(runs.save_dir) == committed_rows(alone.save_dir)
    assert runs.encoded() == alone.encoded()
    assert all(result["encoded"] and result["labels"] for result in results)
    assert tables(runs) == tables(alone)  # their names are digests of all keys and targets
    assert [result["encoded"] for result in runs.run(2, **settings)] == [0, 0]


def tables(runs):
    return sorted(path.name for path in runs.save_dir.glob("datasets/*"))


@linux_only
def test_the_index_tables_are_those_of_one_process(runs, tmp_path):
    alone = Runs(tmp_path / "alone")
    alone.path.mkdir()
    alone.run(1)
    runs.run(2)
    assert len(tables(runs)) == 2
    assert tables(runs) == tables(alone)


def no_frozen_buffers():
    """Have the setup of DDP fail if it would send frozen encoders around."""
    make = DistributedDataParallel.__init__

    def checked(self, *arguments, **settings):
        make(self, *arguments, **settings)
        assert not [name for name in self.named_module_buffers if "encoders." in name]

    DistributedDataParallel.__init__ = checked


@linux_only
def test_frozen_encoders_are_not_sent_around_by_ddp(runs):
    assert all(result["train"] for result in runs.run(2, fill=no_frozen_buffers, count=60))


@linux_only
def test_an_item_that_cannot_be_read_ends_all_ranks_with_the_same_error(runs):
    results = runs.run(2, fails=True, survive=True)
    assert [result["error"] for result in results] == [f"RuntimeError: item {MANY // 2} cannot be read"] * 2
    assert runs.left_behind() == []


@linux_only
def test_an_error_on_one_rank_leaves_its_share_to_the_other(runs):
    def settings(rank):
        return {"happens": fail_once} if rank == 1 else {}

    results = runs.run(2, settings, survive=True)
    assert "out of memory" in results[1]["error"]
    assert only_store(runs.save_dir).keys() == texts_by_key(once()).keys()
    assert len(runs.encoded() - once()) == 8  # the batch that failed: what was encoded before it is kept


def fail_once(call):
    if call == 5:
        raise RuntimeError("out of memory")


def block(call, waiting):
    if call == 2:
        assert waiting.acquire(timeout=60), "the other rank never said that it waits"


def tell_waiting(message, waiting):
    if "waits for rank" in message:
        waiting.release()


@linux_only
@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_may_be_slower_than_the_time_after_which_collectives_fail(slow, runs, uncached):
    waiting = context().Semaphore(0)

    def settings(rank):
        if rank == slow:
            return {"happens": partial(block, waiting=waiting)}
        return {"said": partial(tell_waiting, waiting=waiting)}

    results = runs.run(2, settings, timeout=8, message_seconds=9)
    assert runs.encoded() == once()
    assert steps(results) == uncached(2)
    said = logged(runs.log, SAID)[1 - slow]
    assert any(f"Rank {1 - slow} waits for rank {slow}" in line for line in said)


@linux_only
def test_ranks_with_data_of_their_own_fill_one_after_the_other(runs, uncached):
    results = runs.run(2, own_data=True)
    assert steps(results) == uncached(2, own_data=True)
    own = Counter({f"{text} of rank {rank}" for rank in range(2) for text in samples(MANY)[0].texts})
    assert runs.encoded() == own + Counter(set(samples(MANY)[1].texts))


@linux_only
def test_a_rank_that_is_done_waits_without_a_collective_for_one_that_has_data_of_its_own(runs, uncached):
    waiting = context().Semaphore(0)

    def settings(rank):
        if rank == 1:  # it fills when rank 0 is done
            return {"happens": partial(block, waiting=waiting)}
        return {"said": partial(tell_waiting, waiting=waiting)}

    results = runs.run(2, settings, own_data=True, timeout=8, message_seconds=9)
    assert steps(results) == uncached(2, own_data=True)


@linux_only
def test_ranks_with_data_of_their_own_and_extracted_keys_do_not_wait_for_each_other_for_ever(runs, tmp_path):
    results = runs.run(2, own_data=True, extractor=whole_text)
    own = Counter({f"{text} of rank {rank}" for rank in range(2) for text in samples(MANY)[0].texts})
    assert runs.encoded() == own + Counter(set(samples(MANY)[1].texts))
    assert all(result["encoded"] for result in results)


@linux_only
def test_two_runs_of_two_ranks_on_one_directory_encode_each_item_once_in_total(runs, uncached):
    first, second = runs.start(2), runs.start(2)
    results = [[job.result() for job in jobs] for jobs in (first, second)]
    assert runs.encoded() == once()
    totals = sorted(sum(result["encoded"] for result in ranks) for ranks in results)
    assert totals == [0, len(once())]
    assert [steps(ranks) for ranks in results] == [uncached(2)] * 2
    assert runs.left_behind() == []


@linux_only
def test_ranks_that_cannot_meet_fill_one_after_the_other(runs, uncached):
    runs.save_dir.mkdir()
    (runs.save_dir / "filling").write_text("a file, where the ranks need a directory")
    results = runs.run(2)
    assert runs.encoded() == once()
    assert sorted(result["encoded"] for result in results) == [0, len(once())]
    assert steps(results) == uncached(2)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def results_in(out):
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


SCRIPT = str(ROOT / "tests" / "training" / "distributed_fit.py")


def launched_by_lightning(out, cached, save_dir=""):
    out.mkdir()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, SCRIPT, str(out), str(save_dir), cached]
    done = subprocess.run(
        command, env=environment() | where, capture_output=True, text=True, timeout=300, cwd=out
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return results_in(out)


def torchrun_on_two_nodes(out, save_dir):
    """Start two launchers of one process each, as on two machines."""
    out.mkdir()
    port = free_port()
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}",
             "--rdzv_backend=static", "--master_addr=127.0.0.1", f"--master_port={port}", "--max_restarts=0",
             SCRIPT, str(out), str(save_dir), "cached", "2", "1"],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=out,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    return results_in(out)


def test_two_nodes_started_by_torchrun_train_as_two_processes_of_one_machine(tmp_path):
    plain = launched_by_lightning(tmp_path / "plain", "uncached")
    single = launched_by_lightning(tmp_path / "single", "with workers", tmp_path / "cache")
    nodes = torchrun_on_two_nodes(tmp_path / "nodes", tmp_path / "shared")
    warm = torchrun_on_two_nodes(tmp_path / "warm", tmp_path / "cache")
    assert steps(plain) == steps(single) == steps(nodes) == steps(warm)
    assert plain[0]["train"] != plain[1]["train"]
    for runs in (single, nodes):
        assert sum(rank["encoded"] for rank in runs) == COUNT
        assert all(rank["encoded"] for rank in runs)
    assert [rank["encoded"] for rank in warm] == [0, 0]


def test_nodes_without_save_dir_encode_each_for_itself_and_are_warned(tmp_path, caplog):
    class Trainer:
        world_size, num_nodes, global_rank, is_global_zero = 4, 2, 0, True

        class strategy:
            broadcast = staticmethod(lambda values: values)

    with caplog.at_level("WARNING", logger="quatcache"):
        ranks = distributed.Ranks.of(Trainer, distributed.CacheConfig())
    assert ranks.temporary is None
    assert [record.getMessage() for record in caplog.records] == [
        "save_dir is None, and the ranks of 2 machines share no directory: each of them encodes every item; name a "
        "directory that all machines see as save_dir."
    ]
