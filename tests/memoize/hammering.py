"""One process of several that ask a stored function for overlapping batches: FOLDER, threads or tasks, SEED."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from quatcache import memoize_batch  # the repository is found first

COMPUTED: list[int] = []
LOCK = threading.Lock()


def note(batch):
    with LOCK:
        COMPUTED.extend(batch)
    return [{"square": item * item} for item in batch]


def square(batch):
    return note(batch)


async def square_async(batch):
    await asyncio.sleep(0)
    return note(batch)


def batches(seed):
    draw = random.Random(seed)
    everything = list(range(300))
    draw.shuffle(everything)  # each process asks for all, in its own order
    return [everything[start : start + 15] + draw.sample(range(300), 5) for start in range(0, 300, 15)]


def check(batch, answer):
    assert answer == [{"square": item * item} for item in batch]


def main(folder, kind, seed):
    decorate = memoize_batch("batch", save_dir=folder, version="1", batch_size=10)
    if kind == "threads":
        function = decorate(square)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: [check(batch, function(batch)) for batch in batches(one)], [seed, seed + 100]))
    else:
        cached = decorate(square_async)

        async def ask(one):
            for batch in batches(one):
                check(batch, await cached(batch))

        async def both():
            await asyncio.gather(ask(seed), ask(seed + 100))

        asyncio.run(both())
    print(json.dumps(COMPUTED))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
