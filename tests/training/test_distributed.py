"""Two processes under DDP train as they do without a cache, and encode each distinct item once in total."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out, cached, save_dir=""):
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    script = ROOT / "tests" / "training" / "distributed_fit.py"
    command = [sys.executable, str(script), str(out), str(save_dir), cached]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_train_as_they_do_uncached(tmp_path):
    plain = run(tmp_path / "plain", "uncached")
    shared = run(tmp_path / "shared", "cached", tmp_path / "cache")
    warm = run(tmp_path / "warm", "cached", tmp_path / "cache")
    alone = run(tmp_path / "alone", "cached")
    for name in ("train", "val", "head"):
        for runs in (shared, warm, alone):
            assert [rank[name] for rank in runs] == [rank[name] for rank in plain], name
    assert plain[0]["train"] != plain[1]["train"]
    assert sum(rank["encoded"] for rank in shared) == 41
    assert sum(rank["encoded"] for rank in warm) == 0
