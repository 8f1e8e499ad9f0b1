"""Law 3 over the whole matrix: source of loaders x sampler x kind of sample x tier x labels x fill x processes."""

from __future__ import annotations

import pytest

from tests.processes import Job
from tests.training.distributed_runs import free_port
from tests.training.matrix_fits import SOURCES, Way, differing, differs, ways

# With two ranks one fit of a kind stands for several: where rows lie and whether labels are cached is decided before
# ranks matter, so each source and sampler is met with one tier, one way with labels and one fill.
TURNS = [("cpu", "auto", "eager"), ("disk", False, "eager"), ("cpu", False, "lazy"), ("disk", "auto", "lazy")]


def shared_ways():
    # Lightning itself refuses to share out the batches of a batch sampler that is none of torch's; and forked ranks
    # take seconds to end workers of their own, which test_distributed.py starts under Lightning's launcher instead
    left_out = ("own batches", "workers")
    whole = dict.fromkeys((way.source, way.sampler, way.kind) for way in ways() if way.sampler not in left_out)
    cells = []
    for place, (source, sampler, kind) in enumerate(whole):
        tier, labels, fill = TURNS[place % 4]
        cells.append(Way(source, sampler, kind, tier, labels, "eager" if source == "stream" else fill))
    return cells


@pytest.mark.parametrize("way", ways(), ids=lambda way: "-".join(str(part) for part in way))
def test_cached_training_is_uncached_training(way):
    assert differs(way) is None


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_cached_training_on_two_ranks_is_uncached_training(source, tmp_path):
    port, cells = free_port(), [way for way in shared_ways() if way.source == source]
    assert cells
    settings = {"size": 2, "port": port, "folder": str(tmp_path), "cells": cells}
    jobs = [Job(differing, tmp_path / f"{rank}.json", rank=rank, **settings) for rank in range(2)]
    assert [job.result() for job in jobs] == [[], []]
