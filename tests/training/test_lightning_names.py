"""Lightning has two names, whose classes refuse each other: quatcache takes the one that the user has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("pytorch_lightning", "lightning.pytorch")

pytestmark = pytest.mark.skipif(
    find_spec("lightning") is None, reason="needs both names: pip install --no-deps lightning"
)


def run(name, save_dir, **environment):
    script = Path(__file__).with_name("named_fit.py")
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, str(script), name, str(save_dir)], env=given, capture_output=True, text=True, timeout=300
    )
    return done, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@pytest.mark.slow
def test_a_fit_runs_under_each_name_and_both_share_a_cache(tmp_path):
    results = []
    for number, name in enumerate(NAMES):
        done, result = run(name, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert result["names"] == [name] and result["is module"]
        assert result["encoded"] == (7 if number == 0 else 0)
        assert result["encoder"] == "LengthEncoder"
        results.append(result["head"])
    assert results[0] == results[1]


@pytest.mark.slow
def test_environment_variable_decides_against_what_is_imported(tmp_path):
    done, result = run("lightning.pytorch", tmp_path, QUATCACHE_LIGHTNING="lightning.pytorch")
    assert done.returncode == 0 and result["names"] == ["lightning.pytorch"]
    done, _ = run("lightning.pytorch", tmp_path, QUATCACHE_LIGHTNING="pytorch_lightning")
    assert done.returncode != 0 and "LightningModule" in done.stderr  # the trainer of the other name refuses it
    done, _ = run("pytorch_lightning", tmp_path, QUATCACHE_LIGHTNING="flash")
    assert "QUATCACHE_LIGHTNING is 'flash'; set it to one of pytorch_lightning or lightning.pytorch" in done.stderr
