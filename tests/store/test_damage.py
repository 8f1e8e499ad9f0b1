"""A damaged or hostile file gives an error that names it or is filled again: no wrong row, no dead process."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.processes import Job, linux_only, run
from tests.store import damage

pytestmark = [pytest.mark.slow, linux_only]

PROCESSES = 2


@pytest.fixture(scope="module")
def endured(tmp_path_factory):
    """Run cases in processes of their own, and give what came of each: a dict by its number."""
    folder = tmp_path_factory.mktemp("damage")
    template = folder / "template"
    made = run(damage.build, folder / "made.json", save_dir=template)
    assert made == {"shards": 8, "tables": 2}

    def start(cases, name, **settings):
        numbers = [case.number for case in cases]
        results = [folder / f"{name}-{part}.jsonl" for part in range(PROCESSES)]
        parts = [
            Job(
                damage.endure, folder / f"{name}-{part}.json",
                numbers=numbers[part::PROCESSES], template=template, folder=folder, results=results[part], **settings,
            )
            for part in range(PROCESSES)
        ]  # fmt: skip
        statuses = [part.status(seconds=500) for part in parts]
        found = [json.loads(line) for file in results for line in file.read_text().splitlines()]
        done = {outcome["number"]: outcome for outcome in found}
        first = next((str(case) for case in cases if case.number not in done), None)
        assert statuses == [0] * PROCESSES, f"an interpreter died; the first case without an outcome is {first}"
        for part in parts:
            part.result()
        return done

    return start


@pytest.fixture(scope="module")
def outcomes(endured):
    return endured(damage.cases(), "all")


def bad(cases, outcomes):
    """Describe what went wrong, in a few lines for each case."""
    return [f"{case}\n  {outcomes[case.number]}" for case in cases if outcomes[case.number]["problems"]]


def test_no_damage_gives_a_wrong_row_or_label_or_an_unnamed_error(outcomes):
    wrong = bad(damage.cases(), outcomes)
    assert not wrong, "\n\n".join(wrong)


def test_every_place_was_hit_in_200_cases(outcomes):
    assert len(outcomes) == len(damage.cases()) >= 200
    noticed = Counter(case.place for case in damage.cases() if outcomes[case.number]["outcome"] != "unharmed")
    assert set(noticed) == {*damage.PLACES, "shard", "table"}
    assert all(times >= 10 for times in noticed.values()), noticed


def test_damage_is_mended_and_refusing_is_the_exception(outcomes):
    table = Counter((case.place, outcomes[case.number]["outcome"]) for case in damage.cases())
    print("\n".join(f"{place:24} {outcome:12} {times}" for (place, outcome), times in sorted(table.items())))
    refused = [case for case in damage.cases() if outcomes[case.number]["outcome"] == "error"]
    print("\n".join(f"{case}: {outcomes[case.number]['error']}" for case in refused))
    assert {case.place for case in refused} <= {"manifest"}  # of a newer version, or of another encoder
    assert len(refused) <= 0.05 * len(outcomes)


def test_damage_ends_no_process_that_trusts_its_files(endured):
    cases = [case for case in damage.cases() if case.place.startswith("shard")]
    outcomes = endured(cases, "trusting", checksums=False)
    assert len(outcomes) >= 100
    wrong = bad(cases, outcomes)
    assert not wrong, "\n\n".join(wrong)
