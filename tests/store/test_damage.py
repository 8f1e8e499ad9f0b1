"""A damaged or hostile file gives an error that names it, or is filled again: never a wrong row, never a dead process."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.processes import Job, linux_only, run
from tests.store import damage

pytestmark = [pytest.mark.slow, linux_only]

PROCESSES = 2


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each case: its number, and a dict."""
    folder = tmp_path_factory.mktemp("damage")
    template = folder / "template"
    made = run(damage.build, folder / "made.json", save_dir=template)
    assert made == {"shards": 8, "tables": 2}
    numbers = [case.number for case in damage.cases()]
    parts = [
        Job(
            damage.endure, folder / f"{part}.json",
            numbers=numbers[part::PROCESSES], template=template, folder=folder, results=folder / f"{part}.jsonl",
        )
        for part in range(PROCESSES)
    ]  # fmt: skip
    statuses = [part.status() for part in parts]
    found = [json.loads(line) for part in range(PROCESSES) for line in (folder / f"{part}.jsonl").open()]
    done = {outcome["number"]: outcome for outcome in found}
    died = [next((str(case) for case in damage.cases() if case.number not in done), None)]
    assert statuses == [0] * PROCESSES, f"the interpreter died, the first case without an outcome is {died}"
    for part in parts:
        part.result()
    return done


def test_no_damage_gives_a_wrong_row_or_label_or_an_unnamed_error(outcomes):
    bad = [(str(case), outcomes[case.number]) for case in damage.cases() if outcomes[case.number]["problems"]]
    assert not bad, "\n\n".join(f"{name}\n  {outcome}" for name, outcome in bad)


def test_every_place_was_hit_in_200_cases(outcomes):
    assert len(outcomes) == len(damage.cases()) >= 200
    noticed = Counter(case.place for case in damage.cases() if outcomes[case.number]["outcome"] != "unharmed")
    assert set(noticed) == {*damage.PLACES, "shard", "table"}
    assert all(times >= 10 for times in noticed.values()), noticed


def test_damage_is_mended_and_refusing_is_the_exception(outcomes):
    table = Counter((case.place, outcomes[case.number]["outcome"]) for case in damage.cases())
    print("\n".join(f"{place:24} {outcome:12} {times}" for (place, outcome), times in sorted(table.items())))
    refused = {
        str(case): outcomes[case.number]["error"]
        for case in damage.cases()
        if outcomes[case.number]["outcome"] == "error"
    }
    print("\n".join(f"{name}: {error}" for name, error in refused.items()))
    assert len(refused) <= 0.1 * len(outcomes)
