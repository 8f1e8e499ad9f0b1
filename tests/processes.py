"""Real processes for tests, started in milliseconds: a fork server has imported everything once.

The imports of a training process take five seconds; what is forked from a process that has made them is a process of
its own all the same, with a pid that can be killed and a memory that can be broken.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 240.0
"""After so long a process counts as stuck."""

_IMPORTED = ["pytest", "tests.fits", "tests.training.killed_fit", "sentence_transformers"]
_ENVIRONMENT = {
    # Threads that a library starts would be missing in what is forked.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a fork server and /proc")


def context():
    """Give the multiprocessing context whose processes are forked from one that has imported everything."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_IMPORTED)
    with _environment():
        forkserver.ensure_running()
    return server


@contextmanager
def _environment():
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("COV_CORE", "COVERAGE_PROCESS")):  # tracing what is killed gives no data, only delay
            del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Job:
    """A function that runs in a process of its own and leaves its result in a file.

    Args:
        function: At the top of an importable module; it returns JSON.
        out: File for the result.
        settings: Keyword arguments of the function; they are pickled.
    """

    def __init__(self, function, out, **settings):
        self._out = Path(out)
        self._out.unlink(missing_ok=True)
        self.process = context().Process(target=_run, args=(function, str(self._out), settings), daemon=True)
        self.process.start()

    @property
    def pid(self):
        return self.process.pid

    def status(self, seconds=SECONDS):
        """Wait for the end, and give the exit status: negative is the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"process {self.pid} was stuck for {seconds:g} seconds")
        return self.process.exitcode

    def result(self):
        """Wait for the end, and give what the function returned; an error in it fails the test."""
        status = self.status()
        assert status == 0, f"process {self.pid} ended with status {status}"
        answer = json.loads(self._out.read_text())
        assert "traceback" not in answer, answer["traceback"]
        return answer["result"]


def run(function, out, **settings):
    """Run a function in a process of its own, and give what it returned."""
    return Job(function, out, **settings).result()


def first_to_end(jobs, seconds=60.0):
    """Wait until one of several processes has ended, and give it."""
    ended = connection.wait([job.process.sentinel for job in jobs], seconds)
    assert ended, f"none of {len(jobs)} processes ended within {seconds:g} seconds"
    return next(job for job in jobs if job.process.sentinel in ended)


def _run(function, out, settings):
    multiprocessing.current_process().daemon = False  # it may have workers of its own, forked as those of any process
    multiprocessing.set_start_method(None, force=True)
    try:
        answer = {"result": function(**settings)}
    except BaseException:
        answer = {"traceback": traceback.format_exc()}
    Path(out).write_text(json.dumps(answer))
