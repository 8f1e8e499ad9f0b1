"""What ranks fill together is what one process fills, for every kind of data."""

from __future__ import annotations

import pytest

from tests.committed import committed_rows
from tests.processes import linux_only
from tests.training.distributed_fit import BUDGET, VARIANTS, fit_variant
from tests.training.distributed_runs import Runs, steps

pytestmark = [pytest.mark.slow, linux_only]

COUNT = 60
COUNT_READ = {"fewer samples than ranks": 2, "data that grows in the second epoch": COUNT + 20 + 20}


@pytest.fixture
def made(tmp_path):
    """Runs of one variant: on one process, on two ranks, and on two ranks without a cache."""

    def made(variant):
        settings = {"function": fit_variant, "variant": variant, "count": COUNT}
        alone, together, plain = (Runs(tmp_path / name) for name in ("alone", "together", "plain"))
        for runs in (alone, together, plain):
            runs.path.mkdir()
        alone.run(1, **settings)
        results = together.run(2, **settings)
        warm = plain.run(2, **{**settings, "save_dir": alone.save_dir})
        assert steps(results) == steps(warm)
        if "extracted" not in variant:  # items that share a row train as such
            assert steps(results) == steps(plain.run(2, cache=False, save_dir=None, **settings))
        return alone, together, results, lambda size: together.run(size, **settings)

    return made


def tables(runs):
    return sorted(path.name for path in runs.save_dir.glob("datasets/*"))


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"budget", "items without keys"}))
def test_ranks_leave_the_rows_and_index_tables_of_one_process(variant, made):
    alone, together, results, again = made(variant)
    assert committed_rows(together.save_dir) == committed_rows(alone.save_dir)
    assert together.encoded() == alone.encoded()
    assert tables(together) == tables(alone)
    assert results[0]["labels"] == results[1]["labels"] == (variant != "no targets")
    assert together.left_behind() == []
    assert sum(result["encoded"] for result in again(2)) == 0
    if "extracted" not in variant:
        assert sum(result["read"] for result in results) == COUNT_READ.get(variant, COUNT + 20)  # each sample once
    if variant not in {"fewer samples than ranks", "pairs, two encoders"}:  # one rank may meet all of these texts first
        assert all(result["encoded"] for result in results)


def test_ranks_keep_to_a_budget_together(made):
    _, together, results, again = made("budget")
    (rows,) = committed_rows(together.save_dir).values()
    assert len(rows) == BUDGET
    assert all(result["encoded"] for result in results)
    assert steps(again(2)) == steps(results)


def test_items_without_keys_are_encoded_by_each_rank(made):
    _, together, results, _ = made("items without keys")
    assert set(together.encoded().values()) >= {2}
    assert committed_rows(together.save_dir) == {}
    assert all(result["encoded"] == COUNT + 20 for result in results)
