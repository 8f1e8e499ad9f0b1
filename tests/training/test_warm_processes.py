"""A warm fit in a fresh process imports no sentence-transformers, and opens no weights but to hash them once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import linux_only
from tests.training.distributed_runs import free_port

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


def run(tmp_path, folder, adapter="SentenceTransformerEncoder", devices=1):
    script = Path(__file__).with_name("warm_fit.py")
    arguments = [str(tmp_path), str(folder), str(tmp_path / "cache"), adapter, str(devices)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=given, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(devices)]


@pytest.fixture
def folder(request, tmp_path, minilm_path):
    if request.param == "minilm":
        return minilm_path
    wordllama = request.getfixturevalue("wordllama")
    wordllama.save(str(tmp_path / "static"), create_model_card=False)
    return tmp_path / "static"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "adapter"),
    [
        ("minilm", "SentenceTransformerEncoder"),
        ("minilm", "TransformersEncoder"),
        ("static", "SentenceTransformerEncoder"),
    ],
    indirect=["folder"],
)
def test_warm_fit_imports_no_library_and_opens_no_weights(tmp_path, folder, adapter):
    (cold,), (warm,) = run(tmp_path, folder, adapter), run(tmp_path, folder, adapter)
    assert cold["encoded"] == 20 and cold["loaded"] == [True] and WEIGHTS in cold["opened"]
    assert warm["encoded"] == 0 and warm["loaded"] == [False]
    assert not warm["imported"]
    if folder.name != "static":  # the size of static embeddings stands in the header of their file
        assert WEIGHTS not in warm["opened"]
    for what in ("losses", "head", "after"):
        assert warm[what] == cold[what]


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["minilm"], indirect=True)
def test_ranks_of_a_warm_fit_load_nothing(tmp_path, folder):
    cold, warm = run(tmp_path, folder, devices=2), run(tmp_path, folder, devices=2)
    assert sum(result["encoded"] for result in cold) == 20
    for rank in range(2):
        assert warm[rank]["loaded"] == [False] and warm[rank]["encoded"] == 0
        assert not warm[rank]["imported"] and WEIGHTS not in warm[rank]["opened"]
        assert warm[rank]["losses"] == cold[rank]["losses"] and warm[rank]["head"] == cold[rank]["head"]
