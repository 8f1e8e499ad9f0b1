"""How one rank waits for another: with a clock of the test, and ranks that are moved by it."""

from __future__ import annotations

import pytest

from quatcache.store import CacheDirectory
from quatcache.store.parts import RankFolder
from quatcache.training.distributed import ARRIVAL_SECONDS, LONGEST_PAUSE, Ranks

TOKEN = "0" * 32


class Clock:
    """Time that passes by sleeping only; at given moments something happens."""

    def __init__(self):
        self.now = 100.0
        self.events = []
        self.pauses = []

    def at(self, seconds, event):
        self.events.append((100.0 + seconds, event))

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)
        assert self.now < 1e6, "waits for ever"
        for due, event in [entry for entry in self.events if entry[0] <= self.now]:
            self.events.remove((due, event))
            event()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meeting(tmp_path, clock):
    """Rank 0 of two, in the middle of a fill, and the folder of rank 1."""
    ranks = Ranks(0, 2, TOKEN, time_func=clock, sleep=clock.sleep)
    context = ranks.together(CacheDirectory(tmp_path))
    together = context.__enter__()
    other = RankFolder(tmp_path, together.folder.path.name, 1, 2)
    yield together, other
    other.leave()
    context.__exit__(None, None, None)


def test_a_rank_that_works_for_hours_is_waited_for(meeting, clock):
    together, other = meeting
    other.enter()
    clock.at(10_800, lambda: other.write("part-1", {}, {}))
    assert together.wait(1, lambda: together.folder.has("part-1"))
    assert 10_800 <= clock.now - 100.0 < 10_800 + 2 * LONGEST_PAUSE


def test_a_rank_that_died_is_waited_for_no_longer(meeting, clock):
    together, other = meeting
    other.enter()
    clock.at(500, other._lock.release)
    assert not together.wait(1, lambda: together.folder.has("part-1"))
    assert 500 <= clock.now - 100.0 < 500 + 2 * LONGEST_PAUSE


def test_what_a_rank_did_just_before_it_left_is_seen(meeting, clock):
    together, other = meeting
    other.enter()
    asked = []

    def until():
        asked.append(together.folder.has("part-1"))
        if len(asked) == 1:  # it writes and leaves right after it was looked for
            other.write("part-1", {}, {})
            other._lock.release()
        return asked[-1]

    assert together.wait(1, until)


def test_a_rank_that_never_comes_is_given_up_after_a_minute_with_a_warning(meeting, clock, caplog):
    together, _ = meeting
    with caplog.at_level("WARNING", logger="quatcache"):
        assert not together.wait(1, lambda: False)
    assert ARRIVAL_SECONDS <= clock.now - 100.0 < ARRIVAL_SECONDS + 2 * LONGEST_PAUSE
    assert [record.getMessage() for record in caplog.records] == [
        f"Rank 0 saw nothing of rank 1 in {together.folder.path.parent}, and goes on without it; see that all ranks "
        "have the same save_dir, on a file system that they share."
    ]


def test_a_rank_that_comes_late_is_waited_for(meeting, clock):
    together, other = meeting
    clock.at(ARRIVAL_SECONDS / 2, other.enter)
    clock.at(5000, lambda: other.write("part-1", {}, {}))
    assert together.wait(1, lambda: together.folder.has("part-1"))


def test_a_rank_that_is_done_is_not_waited_for(meeting, clock):
    together, other = meeting
    other.enter()
    other.write("done-1", {}, {})
    assert not together.wait(1, lambda: together.folder.has("part-1"))
    assert clock.pauses == []


def test_waiting_is_told_every_minute(meeting, clock, caplog):
    together, other = meeting
    other.enter()
    clock.at(200, lambda: other.write("part-1", {}, {}))
    with caplog.at_level("INFO", logger="quatcache"):
        together.wait(1, lambda: together.folder.has("part-1"))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["Rank 0 waits for rank 1, which is at work on its share."] * 3


def test_pauses_begin_short_and_stay_short(meeting, clock):
    together, other = meeting
    other.enter()
    clock.at(60, other._lock.release)
    together.wait(1, lambda: False)
    assert clock.pauses[0] == 0.01
    assert max(clock.pauses) == LONGEST_PAUSE


def test_ranks_leave_when_all_of_them_are_done(tmp_path, clock):
    ranks = Ranks(0, 2, TOKEN, time_func=clock, sleep=clock.sleep)
    with ranks.together(CacheDirectory(tmp_path)) as together:
        other = RankFolder(tmp_path, together.folder.path.name, 1, 2)
        other.enter()
        clock.at(10_000, lambda: other.write("done-1", {}, {}))
    assert clock.now >= 10_100
    other.leave()
    assert not together.folder.path.exists()


def test_an_error_is_not_held_up_by_others(tmp_path, clock):
    ranks = Ranks(0, 2, TOKEN, time_func=clock, sleep=clock.sleep)
    with pytest.raises(ValueError, match="mine"), ranks.together(CacheDirectory(tmp_path)) as together:
        other = RankFolder(tmp_path, together.folder.path.name, 1, 2)
        other.enter()
        raise ValueError("mine")
    assert clock.pauses == []
    assert not other.is_here(0)
    other.leave()


def test_each_fill_of_a_run_has_a_folder_of_its_own(tmp_path):
    ranks = Ranks(0, 2, TOKEN)
    with ranks.together(CacheDirectory(tmp_path)) as first:
        pass
    with ranks.together(CacheDirectory(tmp_path)) as second:
        pass
    assert first.folder.path != second.folder.path


def test_one_process_makes_no_folder(tmp_path):
    with Ranks().together(CacheDirectory(tmp_path)) as together:
        assert together is None
    assert list(tmp_path.iterdir()) == []
