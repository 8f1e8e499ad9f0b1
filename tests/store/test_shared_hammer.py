"""Four processes write and read one cache as fast as they can, are killed in the middle now and then, and never read
half an item or another one."""

from __future__ import annotations

import os
import random
import time
from multiprocessing import connection

import pytest
import torch

from quatcache import SharedCache
from tests.processes import context, linux_only
from tests.store import slot_workers

pytestmark = [pytest.mark.slow, linux_only]

SECONDS = float(os.environ.get("QUATCACHE_HAMMER_SECONDS", "30"))
WORKERS = 4
KILLED_EVERY = 0.4
SLOTS = 24
"""So few that processes meet at every turn."""


def launch(cache, seed, once):
    started = context().Event()
    worker = context().Process(target=slot_workers.hammer, args=(cache, seed, once, started), daemon=True)
    worker.start()
    assert started.wait(60)
    return worker


def check_whole(cache):
    found = cache.get_slots(range(SLOTS))
    torn = [
        p for p, item in zip(found.positions.tolist(), found.values, strict=True) if not slot_workers.is_whole(p, item)
    ]
    assert not torn, f"items {torn} are not whole"


@pytest.mark.parametrize("once", [False, True], ids=["written over", "written once"])
def test_no_item_is_torn_under_four_processes_that_write_read_and_are_killed(once):
    draw = random.Random(1)
    seconds = SECONDS if not once else min(SECONDS, 10.0)
    caches = [new_cache()]
    workers = [launch(caches[-1], seed, once) for seed in range(WORKERS)]
    end, kills, reads = time.monotonic() + seconds, 0, 0
    try:
        while time.monotonic() < end:
            connection.wait([worker.sentinel for worker in workers], draw.uniform(0, 2 * KILLED_EVERY))
            broken = [worker.exitcode for worker in workers if worker.exitcode is not None]
            assert not broken, f"workers ended with {broken}; 3 is an item that was not whole"
            check_whole(caches[-1])
            victim = draw.randrange(WORKERS)
            workers[victim].kill()
            workers[victim].join()
            kills += 1
            if once and kills % 4 == 0:  # nothing is left to write: begin anew
                for worker in workers:
                    worker.kill()
                    worker.join()
                check_whole(caches[-1])
                reads += caches[-1].stats().hits
                caches[-1] = new_cache()
                workers = [launch(caches[-1], 1000 + kills * WORKERS + i, once) for i in range(WORKERS)]
            else:
                workers[victim] = launch(caches[-1], 1000 + kills, once)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    cache = caches[-1]
    reads += cache.stats().hits
    assert kills >= seconds / KILLED_EVERY / 4
    assert reads > 100 * seconds
    check_whole(cache)
    for index in range(SLOTS):  # no slot stays locked or half written for ever
        cache.set_slot(index, slot_workers.payload(index, 9), allow_overwrite=True)
        assert slot_workers.is_whole(index, cache[index])
    print(f"{reads:,} items read, {kills} processes killed")


def new_cache():
    return SharedCache(1, SLOTS, (slot_workers.WORDS,), torch.int64)


def test_hammer_notices_an_item_that_is_torn():
    """The workers are worth something: one that finds half an item says so."""
    cache = new_cache()
    torn = slot_workers.payload(0, 1)
    torn[: slot_workers.WORDS // 2] = slot_workers.payload(0, 2)[: slot_workers.WORDS // 2]
    cache.set_slots(range(SLOTS), torch.stack([torn] * SLOTS))
    worker = launch(cache, 1, once=True)
    worker.join(60)
    assert worker.exitcode == 3
