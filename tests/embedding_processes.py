"""What a process of its own does with an EmbeddingCache; it logs what it encodes, and may be killed meanwhile."""

from __future__ import annotations

import os
import signal

from quatcache import EmbeddingCache
from tests.training.killed_fit import LoggingEncoder, append, small_commits

YIELDED = "yielded"


def encode(save_dir, log, number, items, *, batch_size=4, window=None, begins=None, kill_at=None, **commits):
    """Encode items, and give their rows.

    Args:
        save_dir: Where rows persist.
        log: File in which what was encoded, and what was given out, is logged with the number of this process.
        number: That number.
        items: Texts.
        batch_size: Of calls.
        window: Of a stream; None: all items are encoded in one call.
        begins: Called before.
        kill_at: Encoder call in which the process kills itself; None: it does not.
        commits: See :func:`small_commits`.
    """
    small_commits(**commits)
    encoder = LoggingEncoder()
    encoder._log = (os.fspath(log), number)
    encoder._happens = lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == kill_at else None
    cache = EmbeddingCache(encoder, save_dir)
    if begins is not None:
        begins()
    rows = []
    if window is None:
        rows = cache.encode(items, batch_size).tolist()
    else:
        for batch in cache.encode_iter(iter(items), batch_size, window):
            append(*encoder._log, YIELDED, *items[len(rows) : len(rows) + len(batch)])
            rows += batch.tolist()
    return {"rows": rows, "computed": cache.stats.computed}
