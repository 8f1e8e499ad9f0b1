"""What processes do with a shared cache in tests: importable, so that spawned ones find it."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time

import numpy as np
import torch
from xxhash import xxh3_128_digest

from quatcache import SharedCache
from quatcache.store.segment import Segment

WORDS = 4096
"""Numbers of a payload: 32 kB, so that a copy of it takes long enough to be met."""


def payload(index, tag):
    """An item that proves itself: its index, what was drawn for a tag, and the hash of both."""
    words = np.random.default_rng([index, tag]).integers(0, 1 << 62, WORDS, dtype=np.int64)
    words[0] = index
    words[-2:] = np.frombuffer(xxh3_128_digest(words[:-2].tobytes()), np.int64)
    return torch.from_numpy(words)


def is_whole(index, item):
    """Say whether an item is a payload of an index."""
    words = item.numpy()
    return words[0] == index and words[-2:].tobytes() == xxh3_128_digest(words[:-2].tobytes())


def hammer(cache, seed, once, started):
    """Write and read random slots until killed; end with status 3 at the first item that is not whole.

    Args:
        cache: The cache; spawned processes attach when they unpickle it.
        seed: Of what is done.
        once: Never write over what is there, and read views; else write over, clear now and then, and read copies.
        started: An event that is set once the process is at work.
    """
    draw = random.Random(seed)
    samples = len(cache.aux_array)
    started.set()
    while True:
        index = draw.randrange(samples)
        some = draw.sample(range(samples), 8)
        act = draw.random()
        if act < 0.25:
            cache.set_slot(index, payload(index, draw.randrange(4)), allow_overwrite=None if once else True)
        elif act < 0.35:
            items = torch.stack([payload(i, draw.randrange(4)) for i in some])
            cache.set_slots(some, items, allow_overwrite=None if once else True)
        elif act < 0.352:
            if not once:
                cache.clear()
        elif act < 0.7 and once:
            slot = cache.get_slot(index)
            if slot is not None and not is_whole(index, slot):
                os._exit(3)
        else:
            found = cache.get_slots(some)
            for position, item in zip(found.positions.tolist(), found.values, strict=True):
                if not is_whole(some[position], item):
                    os._exit(3)


def write_and_die(cache, index, value, overwrite, step):
    """Write a slot, and be killed at one of the points between which the order of writes matters."""
    seen = 0

    def order(self):
        nonlocal seen
        seen += 1
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Segment.order = order
    cache.set_slot(index, value, allow_overwrite=overwrite)


def write_some(cache, indices, value):
    """Write the same number into slots."""
    for index in indices:
        cache.set_slot(index, torch.full(tuple(cache.array.shape[1:]), value + index, dtype=cache.array.dtype))


def rank(name, own, answers, barrier):
    """Be one of several processes that make the same cache by name."""
    cache = SharedCache(1, 40, (5,), torch.int64, name=name)
    write_some(cache, range(own, 40, 2), 1000)
    barrier.wait()
    answers.put((own, cache.get_slots(range(40)).values.tolist(), cache.stats().present))
    barrier.wait()  # who made it leaves no earlier than the others have read


def race(name, number, answers, barrier):
    """Make a cache at the same moment as others."""
    barrier.wait()
    cache = SharedCache(1, 8, (3,), torch.int64, name=name)
    write_some(cache, [number], 70)
    barrier.wait()
    answers.put(cache.get_slots(range(8)).positions.tolist())
    barrier.wait()


def hold(name, ready):
    """Make a cache, and live until killed."""
    cache = SharedCache(1, 10, (4,), name=name)
    cache.set_slot(1, torch.ones(4, dtype=torch.uint8))
    ready.set()
    while True:
        time.sleep(60)


def use(cache, hits):
    """Read a slot so many times, and one that is empty once."""
    for _ in range(hits):
        assert cache.get_slot(0) is not None
    assert cache.get_slot(1) is None


def make_and_end(name):
    """Make a cache in a child of multiprocessing, which ends without running atexit."""
    cache = SharedCache(1, 10, (4,), name=name)
    assert cache.stats().slots == 10


def claim_in_vain(segment, place):
    """Ask for a byte that another process has."""
    assert not segment.claim(place)
    assert segment.claim(place + 1)


def claim_by_name(pickled, place, answers):
    """Ask for a byte that another process has, and for the next one."""
    cache = pickle.loads(pickled)
    answers.put([cache._segment.claim(place), cache._segment.claim(place + 1)])
