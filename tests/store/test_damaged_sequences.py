"""A damaged shard of sequences is left out: no wrong sequence, no place outside the file, no dead process."""

from __future__ import annotations

import pytest

from tests.processes import linux_only, run
from tests.store import damaged_sequences

pytestmark = linux_only

WHOLE_IN_THEMSELVES = {"rows of one shape", "wider elements", "elements without a shape", "another dtype"}
"""Without a manifest the oldest shard decides what the others must be like."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each damage, in a process that would have died of a place outside the file."""
    folder = tmp_path_factory.mktemp("damaged")
    return run(damaged_sequences.endure, folder / "outcomes.json", folder=str(folder / "stores"))


def test_no_damage_gives_a_wrong_sequence_or_an_unforeseen_error(outcomes):
    assert len(outcomes) > 300
    assert not {name: outcome for name, outcome in outcomes.items() if outcome["problems"]}


@pytest.mark.parametrize("how", ["", ", no manifest", ", trusting"])
@pytest.mark.parametrize("name", damaged_sequences.CRAFTED)
def test_shard_with_crafted_tensors_is_left_out_and_the_others_are_read(outcomes, name, how):
    whole = how == ", no manifest" and name in WHOLE_IN_THEMSELVES
    assert outcomes[name + how]["rows"] in ({8, 16} if whole else {16})


def test_flipped_and_cut_shards_are_left_out(outcomes):
    found = {outcome["rows"] for name, outcome in outcomes.items() if name.split()[0] in ("flip", "cut")
             and not name.endswith("trusting")}  # fmt: skip
    assert found == {16}


@pytest.mark.parametrize("name", damaged_sequences.MANIFESTS)
def test_manifest_that_contradicts_its_shards_is_made_again_or_gives_no_row(outcomes, name):
    assert outcomes[f"manifest: {name}"]["rows"] in {0, 24}
