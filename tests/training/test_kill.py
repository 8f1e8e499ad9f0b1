"""Interrupted is uninterrupted: a fill that is killed at any instant ends with the same rows, and repeats no shard.

Real processes run real fits and die of SIGKILL, in two ways: sent from outside after a random time, and by their own
hand at each kind of file operation that a fill makes, so that every window of a commit is hit.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
from functools import partial

import numpy as np
import pytest

from quatcache.store.files import FILL_LOCK, MANIFEST_LOCK
from quatcache.store.unfinished import is_temporary
from tests.committed import made_elsewhere, only_store, texts_by_key
from tests.processes import Job, linux_only, run
from tests.training.killed_fit import (
    ENCODED,
    FILLED,
    KILLED,
    SAID,
    logged,
    run_fit,
    run_fit_until_a_file_is_too_big,
    samples,
    steps,
)

pytestmark = [pytest.mark.slow, linux_only]

KILLS = 50
CANARY = 8
"""Rows that are encoded again to be compared, where it is not known where they were made."""


class Fill:
    """A fill that is killed and started again, in one cache directory after the other, until a test has seen enough.

    Args:
        folder: For everything.
        tolerance: By how much a row may differ from that of the uninterrupted fill: nothing, or what padding does.
        settings: Of :func:`run_fit`.
    """

    def __init__(self, folder, tolerance=0.0, **settings):
        self.kills = []  # the moments of those that hit a fill
        self.directories = 1
        self.resumed = 0  # attempts that found some rows, but not all
        self._folder = folder
        self._tolerance = tolerance
        self._settings = settings
        self._log = folder / "log"
        self._texts = texts_by_key(samples(settings["count"])[2])
        self._attempts = 0
        self._committed = {}
        self._compared = 0  # rows that the running attempt may encode again, to compare them
        self.whole = run(
            run_fit, folder / "whole.json", save_dir=folder / "whole", log=folder / "l", attempt=0, **settings
        )
        self._rows = only_store(folder / "whole")
        assert self._rows.keys() == self._texts.keys()

    @property
    def save_dir(self):
        return self._folder / f"cache-{self.directories}"

    def attempt(self, kill=None, delay=None):
        """Start the fill once more.

        Args:
            kill: See :class:`FileOperations`.
            delay: Seconds after which the process is killed.

        Returns:
            Whether it was killed while it filled. When it comes to its end instead, the cache is checked and left, and
            the next attempt gets an empty directory.
        """
        self._attempts += 1
        self.resumed += 0 < len(self._committed) < len(self._rows)
        self._compared = CANARY if made_elsewhere(self.save_dir) else 0
        here, there = multiprocessing.Pipe()
        job = self._start(kill=kill, begins=partial(there.send_bytes, b"now"))
        assert here.poll(60), "the fit did not begin"
        if delay is not None:
            job.process.join(delay)
            job.process.kill()
        killed = job.status() == -signal.SIGKILL
        self._look()
        if not killed:
            self._check(job.result())
        elif self._attempts not in logged(self._log, FILLED):
            self.kills += logged(self._log, KILLED).get(self._attempts, ["a random instant"])
            return True
        return False

    def kill(self, **instant):
        """Start the fill until it was killed at this instant; where it is done before, in an empty directory."""
        for _ in range(10):
            if self.attempt(**instant):
                return
            if "delay" in instant:  # a machine is not always as slow as when the whole fill was timed
                instant["delay"] /= 2
        raise AssertionError(f"no fill was killed {instant}")

    def finish(self):
        """Run to the end, if the last attempt did not."""
        directory = self.directories
        self.attempt()
        assert self.directories == directory + 1

    def _start(self, **settings):
        return Job(
            run_fit,
            self._folder / "result.json",
            **{**self._settings, "save_dir": self.save_dir, "log": self._log, "attempt": self._attempts, **settings},
        )

    def _look(self):
        """Hold what is committed now against what was committed before, and against the uninterrupted fill."""
        committed = only_store(self.save_dir)
        assert self._committed.keys() <= committed.keys(), "rows that were committed are gone"
        assert committed.keys() <= self._rows.keys()
        for key, row in committed.items():
            assert row == self._committed.get(key, row), f"the row of {self._texts[key]!r} was replaced"
            difference = np.abs(np.frombuffer(row, np.float32) - np.frombuffer(self._rows[key], np.float32)).max()
            assert difference <= self._tolerance, f"the row of {self._texts[key]!r} is another"
        before = {self._texts[key] for key in self._committed}
        again = before & set(logged(self._log, ENCODED).get(self._attempts, ()))
        assert len(again) <= self._compared, f"{len(again)} items were encoded again although their rows were committed"
        self._committed = committed

    def _check(self, result):
        """Hold a fill that came to its end, and a run after it, against the uninterrupted one."""
        assert self._committed.keys() == self._rows.keys()
        self._attempts += 1
        warm = self._start().result()
        assert (warm["encoded"], warm["read"], logged(self._log, ENCODED).get(self._attempts)) == (0, 0, None)
        for fitted in (result, warm):
            assert np.abs(np.subtract(steps(fitted), steps(self.whole))).max() <= 100 * self._tolerance
        self.directories += 1
        self._committed = {}


def each_moment(moments, generator):
    """Give every kind of moment once, in random order, each with one of its occurrences: mostly an early one."""
    order = sorted(moments)
    generator.shuffle(order)
    return [(moment, generator.randint(1, max(1, moments[moment] // 5))) for moment in order]


@pytest.mark.parametrize(
    "commits",
    [
        {"shard_bytes": 4096, "batch_size": 16},  # when a shard is full: after 64 rows
        {"commit_seconds": 0.0, "batch_size": 32},  # when time has passed: after each encoder call
    ],
    ids=["full shards", "shards of one call"],
)
def test_fill_killed_at_fifty_instants_equals_the_uninterrupted_one_and_repeats_no_shard(commits, tmp_path):
    generator = random.Random(50)
    fill = Fill(tmp_path, count=2000, **commits)
    plain = run(run_fit, tmp_path / "plain.json", save_dir=None, log=tmp_path / "l", attempt=0, count=2000)
    assert steps(plain) == steps(fill.whole) and len(plain["losses"][0]) > 10
    instants = [{"kill": kill} for kill in each_moment(fill.whole["moments"], generator)]
    for _ in range(max(KILLS - len(instants), KILLS // 3)):
        longest = fill.whole["seconds"] * generator.choice([0.1, 0.3, 1.0])
        instants.append({"delay": generator.uniform(0, longest)})
    generator.shuffle(instants)
    for instant in instants:
        fill.kill(**instant)
    while fill.resumed < KILLS / 2:  # so often there must be something that could be recomputed
        fill.kill(kill=("before renaming the manifest", 2))
    fill.finish()
    assert len(fill.kills) >= KILLS
    assert set(fill.whole["moments"]) <= set(fill.kills)
    for moment in ("before renaming a shard", "after flushing a shard", "before renaming the manifest"):
        assert moment in fill.kills
    assert fill.kills.count("a random instant") >= KILLS // 3


def test_killed_fill_of_a_padded_transformer_ends_with_the_same_rows(minilm_path, tmp_path):
    generator = random.Random(5)
    settings = {"encoder": str(minilm_path), "count": 200, "batch_size": 8, "shard_bytes": 24 * 384 * 4}
    fill = Fill(tmp_path, tolerance=1e-6, **settings)
    for instant in (
        {"kill": ("before renaming a shard", 2)},
        {"delay": generator.uniform(0, fill.whole["seconds"])},
        {"kill": ("before renaming the manifest", 2)},
        {"kill": ("before flushing the directory of a store", 3)},
        {"delay": generator.uniform(0, fill.whole["seconds"])},
    ):
        fill.kill(**instant)
    fill.finish()
    assert len(fill.kills) == 5 and fill.resumed >= 3


def test_what_is_left_of_a_file_whose_writing_was_killed_is_known_as_temporary_and_harms_nobody(tmp_path):
    settings = {"save_dir": tmp_path / "cache", "log": tmp_path / "log", "count": 2000, "batch_size": 64}
    killed = Job(run_fit_until_a_file_is_too_big, tmp_path / "0.json", limit=100_000, attempt=0, **settings)
    assert killed.status() == -signal.SIGXFSZ
    (store,) = tmp_path.glob("cache/encoders/*")
    left = {path.name for path in store.iterdir()} - {FILL_LOCK, MANIFEST_LOCK}
    assert left and all(is_temporary(name) for name in left), left
    filled = run(run_fit, tmp_path / "1.json", attempt=1, **settings)
    assert filled["encoded"] == len(samples(2000)[2]) == len(only_store(tmp_path / "cache"))
    assert [warning for warning in logged(tmp_path / "log", SAID)[1] if warning.startswith("WARNING")] == []
