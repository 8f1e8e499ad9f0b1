"""Runs of several ranks for tests: each rank is a process of its own, forked in milliseconds."""

from __future__ import annotations

import socket
from collections import Counter

from tests.processes import Job
from tests.training.distributed_fit import fit_rank
from tests.training.killed_fit import ENCODED, logged

MANY = 400
"""Samples of a run."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Runs:
    """Starts runs of several ranks in one directory."""

    def __init__(self, path):
        self.path = path
        self.log = path / "log"
        self.save_dir = path / "cache"
        self._number = 0

    def start(self, size, settings=lambda rank: {}, function=fit_rank, **shared):
        """Start a run, and give the job of each rank."""
        self._number += 1
        port = free_port()
        shared = {"save_dir": self.save_dir, "log": self.log, "count": MANY, **shared}
        return [
            Job(function, self.path / f"{self._number}-{rank}.json", rank=rank, size=size, port=port,
                **{**shared, **settings(rank)})
            for rank in range(size)
        ]  # fmt: skip

    def run(self, size, settings=lambda rank: {}, **shared):
        """Start a run, and give the result of each rank."""
        return [job.result() for job in self.start(size, settings, **shared)]

    def encoded(self):
        """How often each text was encoded so far, by all ranks together."""
        return sum(map(Counter, logged(self.log, ENCODED).values()), Counter())

    def forget(self):
        self.log.unlink(missing_ok=True)

    def left_behind(self):
        return sorted(path.name for path in self.save_dir.glob("filling/*") if path.name != ".lock")


def steps(results):
    return [(result["train"], result["val"], result["head"]) for result in results]
