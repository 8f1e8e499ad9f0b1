"""What two ranks lack in their steps is dealt out among them, and no rank waits for one that will not answer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from quatcache.keys import content_keys
from quatcache.sequences import PaddedSequences
from quatcache.store import CacheDirectory, TensorStore
from quatcache.training.distributed import Ranks
from quatcache.training.shared_steps import SharedSteps
from tests.training.test_distributed_waiting import Clock

CPU = torch.device("cpu")
TOKEN = "0" * 32
STORE = "f" * 32


class Rank:
    """One rank: its own view of the stores, and of the folder."""

    def __init__(self, path, rank, clock):
        self.directory = CacheDirectory(path)
        self.store = self.directory.store(STORE, {})
        self.together = Ranks(rank, 2, TOKEN, time_func=clock, sleep=clock.sleep).in_steps(self.directory)
        self.folder = self.together.folder
        self.steps = SharedSteps(self.together, CPU)

    def claim(self, *words, kept=None):
        keys = content_keys(list(words))
        return self.steps.claim(self.store, keys, np.arange(len(words)) if kept is None else np.array(kept))

    def put(self, turn):
        """Encode what is this rank's: a row is made of its key."""
        if len(turn.own):
            self.store.put_many(turn.keys[turn.own], rows_of(turn.keys[turn.own]))

    def take_turn(self, *words):
        turn = self.claim(*words)
        self.put(turn)
        self.steps.hand_on(turn)
        return turn

    def from_others(self, turn):
        """Check the rows that others give, and say of which positions they were."""
        positions = []
        for which, rows in self.steps.rows_of_others(turn):
            assert torch.equal(rows, rows_of(turn.keys[which]))
            positions += which.tolist()
        return sorted(positions), turn.lost.tolist()


def rows_of(keys):
    return torch.from_numpy(keys).double()


class ShortClock(Clock):
    """What is waited for in a step comes soon, or never."""

    def sleep(self, seconds):
        super().sleep(seconds)
        assert self.now < 400, "waits for ever"


@pytest.fixture
def clock():
    return ShortClock()


@pytest.fixture
def ranks(tmp_path, clock):
    both = [Rank(tmp_path, rank, clock) for rank in range(2)]
    yield both
    for rank in both:
        rank.steps.leave()


def files(rank):
    return sorted(path.name for path in rank.folder.path.glob("*.safetensors"))


def test_who_claims_first_encodes_and_hands_on(ranks, clock):
    one, other = ranks
    mine, theirs = one.take_turn("a", "b", "c"), other.take_turn("x", "b", "a", "y")
    assert mine.own.tolist() == [0, 1, 2]
    assert theirs.own.tolist() == theirs.claimed.tolist() == [0, 3]
    assert other.from_others(theirs) == ([1, 2], [])
    assert one.from_others(mine) == ([], [])
    assert clock.pauses == []


def test_a_row_that_is_being_encoded_is_waited_for(ranks, clock):
    one, other = ranks
    mine, theirs = one.claim("a"), other.take_turn("a", "b")

    def hand_on():
        one.put(mine)
        one.steps.hand_on(mine)

    clock.at(100, hand_on)
    assert other.from_others(theirs) == ([0], [])
    assert 100 <= clock.now - 100.0 < 101
    assert max(clock.pauses) < 0.1


def test_a_rank_that_leaves_with_claims_is_waited_for_no_longer(ranks, clock):
    one, other = ranks
    one.claim("a")
    theirs = other.take_turn("a", "b")
    clock.at(100, one.steps.leave)
    assert other.from_others(theirs) == ([], [0])
    assert clock.now - 100.0 < 101


def test_what_was_handed_on_before_a_rank_left_is_taken(ranks, clock):
    one, other = ranks
    one.take_turn("a")
    one.steps.leave()
    assert one.claim("b") is None
    assert other.from_others(other.take_turn("a", "b")) == ([0], [])
    assert clock.pauses == []


def test_what_was_claimed_and_is_lacking_in_its_file_is_encoded_by_who_needs_it(ranks):
    one, other = ranks
    one.steps.hand_on(one.claim("a"))  # a budget declined it
    theirs = other.take_turn("a")
    assert other.from_others(theirs) == ([], [0])
    again = one.claim("a")
    assert (again.own.tolist(), again.claimed.tolist()) == ([0], [])  # it waits for nobody, itself least of all


def test_a_damaged_file_is_as_good_as_none(ranks):
    one, other = ranks
    one.take_turn("a")
    (one.folder.path / "step-0-1.safetensors").write_bytes(b"\0" * 100)
    assert other.from_others(other.take_turn("a")) == ([], [0])


def test_rows_are_handed_on_until_they_are_committed_and_are_in_the_store_from_then_on(ranks, clock):
    one, other = ranks
    one.take_turn("a", "b")
    theirs = other.take_turn("b")
    one.take_turn("c")
    assert files(one) == ["step-0-1.safetensors", "step-0-2.safetensors"]
    one.store.flush()
    one.take_turn("d")
    assert files(one) == ["committed-0.safetensors", "step-0-3.safetensors"]
    assert other.from_others(theirs) == ([0], [])
    assert other.from_others(other.take_turn("a", "c", "d")) == ([0, 1, 2], [])
    assert clock.pauses == []


def test_what_is_not_kept_is_not_claimed(ranks):
    one, other = ranks
    mine = one.claim("a", "b", kept=[1])
    assert (mine.own.tolist(), mine.claimed.tolist()) == ([0, 1], [1])
    assert one.claim("c", kept=[]) is None
    theirs = other.claim("a", "b", kept=[0])
    assert (theirs.own.tolist(), theirs.claimed.tolist()) == ([0, 1], [0])


def test_sequences_are_handed_on(ranks):
    one, other = ranks
    mine = one.claim("a", "b")
    mask = torch.tensor([[True, True, False], [True, True, True]])
    one.store.put_many(mine.keys, PaddedSequences(torch.arange(6.0).reshape(2, 3), mask))
    one.steps.hand_on(mine)
    theirs = other.take_turn("b", "a")
    ((which, rows),) = other.steps.rows_of_others(theirs)
    assert which.tolist() == [0, 1]
    assert rows.lengths.tolist() == [3, 2]
    assert rows.elements.tolist() == [3.0, 4.0, 5.0, 0.0, 1.0]


def test_rows_of_one_process_alone_are_not_shared(ranks):
    assert ranks[0].steps.claim(TensorStore(), content_keys(["a"]), np.arange(1)) is None


def test_a_folder_that_disappears_ends_the_sharing_with_a_warning_and_nothing_else(ranks, caplog):
    one, other = ranks
    mine = one.claim("a")
    one.put(mine)
    shutil.rmtree(one.folder.path)
    one.folder.path.write_text("a file in its place")
    with caplog.at_level("WARNING", logger="quatcache"):
        one.steps.hand_on(mine)
        assert other.claim("a") is None
    assert [record.getMessage().rsplit(". ", 1)[1] for record in caplog.records] == [
        "Until then each rank encodes what it meets."
    ] * 2
    assert one.claim("b") is None
    one.folder.path.unlink()


def test_a_device_has_done_its_work_before_anything_is_claimed(ranks, monkeypatch):
    # else a sum of gradients that waits for another rank could be ahead of the encoder, while that rank waits for it
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append(list(ranks[0].folder.path.glob("claims-*"))))
    steps = SharedSteps(ranks[0].together, torch.device("cuda"))
    assert steps.claim(ranks[0].store, content_keys(["a"]), np.arange(1)) is not None
    assert seen == [[]]


def test_one_process_and_ranks_without_a_directory_share_nothing(tmp_path):
    assert Ranks().in_steps(CacheDirectory(tmp_path)) is None
    assert Ranks(0, 2, TOKEN).in_steps(None) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "filling").write_text("")
    assert Ranks(0, 2, TOKEN).in_steps(CacheDirectory(tmp_path)) is None
