"""Pruning: only what was chosen goes, only what is of the format, and never from under a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from quatcache.errors import ConfigError
from quatcache.store import CacheDirectory, DiskStore
from quatcache.store.inspection import inspect_cache
from quatcache.store.manifest import MANIFEST_NAME
from quatcache.store.pruning import choose, remove
from tests.caches_for_tests import (
    DAY,
    HOUR,
    NOW,
    ONE,
    THREE,
    TWO,
    add_rows,
    edit_manifest,
    flip,
    keys_of,
    picture,
    python,
    rows_of,
    set_age,
    shards,
    store_rows,
    store_table,
)


def chosen(root, **limits):
    """What would go, by path and reason."""
    plan = choose(inspect_cache(root), now=NOW, **limits)
    return {str(removal.path.relative_to(root)): removal.reason for removal in plan.removals}


def prune(root, **limits):
    return remove(choose(inspect_cache(root), now=NOW, **limits))


def store_of_age(root, digest, days, **options):
    home = store_rows(root, digest, **options)
    set_age(home, days * DAY)
    return home


def store_names(root):
    return [store.path.name for store in inspect_cache(root).stores]


def test_a_cache_in_use_loses_nothing(tmp_path):
    store_of_age(tmp_path, ONE, 1000)
    set_age(store_table(tmp_path), 1000 * DAY)
    before = picture(tmp_path)
    assert prune(tmp_path) == ()
    assert picture(tmp_path) == before


def test_choosing_removes_nothing(tmp_path):
    store_of_age(tmp_path, ONE, 100)
    before = picture(tmp_path)
    assert chosen(tmp_path, unused_days=1, max_bytes=0)
    assert picture(tmp_path) == before


def test_stores_and_tables_that_no_run_used_for_long_go_and_the_others_stay(tmp_path):
    store_of_age(tmp_path, ONE, 31)
    store_of_age(tmp_path, TWO, 29)
    old, young = store_table(tmp_path, (1,)), store_table(tmp_path, (2,))
    set_age(old, 40 * DAY)
    set_age(young, 1 * DAY)
    assert chosen(tmp_path, unused_days=30) == {
        f"encoders/{ONE}": "unused for 31 days",
        f"datasets/{old.name}": "unused for 40 days",
    }
    outcomes = prune(tmp_path, unused_days=30)
    assert [outcome.note for outcome in outcomes] == ["", ""]
    assert store_names(tmp_path) == [TWO]
    assert [table.path for table in inspect_cache(tmp_path).tables] == [young]


def test_opening_a_store_keeps_it(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    (home / ".last-used").touch()
    set_age(home / ".last-used", 1)
    assert chosen(tmp_path, unused_days=30) == {}


def test_least_recently_used_stores_go_until_the_rest_fits(tmp_path):
    homes = [store_of_age(tmp_path, digest, days) for digest, days in ((ONE, 3), (TWO, 9), (THREE, 6))]
    sizes = {store.path: store.bytes for store in inspect_cache(tmp_path).stores}
    total = sum(sizes.values())
    assert chosen(tmp_path, max_bytes=total) == {}
    assert list(chosen(tmp_path, max_bytes=total - 1)) == [f"encoders/{TWO}"]
    assert list(chosen(tmp_path, max_bytes=sizes[homes[0]])) == [f"encoders/{TWO}", f"encoders/{THREE}"]
    assert set(chosen(tmp_path, max_bytes=total - 1).values()) == {"over the budget"}
    assert sum(outcome.freed_bytes for outcome in prune(tmp_path, max_bytes=total - 1)) == sizes[homes[1]]


def test_what_goes_for_its_age_counts_towards_the_budget(tmp_path):
    store_of_age(tmp_path, ONE, 100)
    store_of_age(tmp_path, TWO, 2)
    left = inspect_cache(tmp_path).stores[0].bytes
    assert list(chosen(tmp_path, unused_days=30, max_bytes=left)) == [f"encoders/{ONE}"]


def test_tables_go_after_all_stores(tmp_path):
    store_of_age(tmp_path, ONE, 1)
    table = store_table(tmp_path)
    set_age(table, 50 * DAY)
    assert list(chosen(tmp_path, max_bytes=table.stat().st_size)) == [f"encoders/{ONE}"]
    assert list(chosen(tmp_path, max_bytes=0)) == [f"encoders/{ONE}", f"datasets/{table.name}"]


def test_budget_that_cannot_be_met_is_told(tmp_path):
    home = store_of_age(tmp_path, ONE, 1)
    edit_manifest(home, version=99)
    plan = choose(inspect_cache(tmp_path), max_bytes=10, now=NOW)
    assert plan.removals == () and plan.kept_bytes > 10
    assert any(f"encoders/{ONE} was written by a newer version" in note for note in plan.notes)
    assert any("more than the budget of 10" in note for note in plan.notes)


@pytest.mark.parametrize("limits", [{"unused_days": -1}, {"max_bytes": -1}, {"unused_days": float("nan")}])
def test_limit_that_makes_no_sense_is_refused(tmp_path, limits):
    store_rows(tmp_path)
    with pytest.raises(ConfigError, match="at least 0"):
        choose(inspect_cache(tmp_path), now=NOW, **limits)


def leave_behind(root, seconds):
    """An orphan shard, and temporary files beside a store and beside tables, all of one age."""
    home = root / "encoders" / ONE
    orphan = home / f"shard-{'a' * 16}.safetensors"
    left = [orphan, home / ".tmp-0123-manifest.json", root / "datasets" / ".tmp-0123-x.safetensors"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("left")
        set_age(path, seconds)
    return left


def test_leftovers_go_after_an_hour_and_not_before(tmp_path):
    home = store_of_age(tmp_path, ONE, 1)
    left = leave_behind(tmp_path, HOUR - 1)
    assert chosen(tmp_path) == {}
    left = leave_behind(tmp_path, HOUR + 1)
    assert set(chosen(tmp_path)) == {str(path.relative_to(tmp_path)) for path in left}
    assert [outcome.freed_bytes for outcome in prune(tmp_path)] == [4, 4, 4]
    assert not any(path.exists() for path in left)
    assert len(DiskStore(home, ONE)) == 3


def test_shard_that_was_committed_since_it_was_chosen_stays(tmp_path):
    home = store_rows(tmp_path, ONE, (1,))
    keep = (home / MANIFEST_NAME).read_bytes()
    add_rows(home, 2)
    committed = (home / MANIFEST_NAME).read_bytes()
    (home / MANIFEST_NAME).write_bytes(keep)  # as it was between the shard and the manifest
    for path in shards(home):
        set_age(path, 2 * HOUR)
    plan = choose(inspect_cache(tmp_path), now=NOW)
    assert [removal.kind for removal in plan.removals] == ["orphan shard"]
    (home / MANIFEST_NAME).write_bytes(committed)
    (outcome,) = remove(plan)
    assert "changed" in outcome.note and not outcome.failed
    assert len(DiskStore(home, ONE)) == 2


def test_store_and_table_that_were_used_since_they_were_chosen_stay(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    table = store_table(tmp_path)
    set_age(table, 100 * DAY)
    plan = choose(inspect_cache(tmp_path), unused_days=30, now=NOW)
    DiskStore(home, ONE).mark_used()
    table.touch()
    assert [("changed" in outcome.note, outcome.freed_bytes) for outcome in remove(plan)] == [(True, 0), (True, 0)]
    assert len(DiskStore(home, ONE)) == 3 and table.exists()


def test_what_is_gone_already_is_no_failure(tmp_path):
    store_of_age(tmp_path, ONE, 100)
    set_age(store_table(tmp_path), 100 * DAY)
    plan = choose(inspect_cache(tmp_path), unused_days=30, now=NOW)
    remove(plan)
    assert [(outcome.failed, "gone already" in outcome.note) for outcome in remove(plan)] == [(False, True)] * 2


def test_store_that_another_process_fills_stays_whole(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    leave_behind(tmp_path, 2 * HOUR)
    code = (
        "import sys\n"
        "from quatcache.store import CacheDirectory\n"
        "cache = CacheDirectory(sys.argv[1])\n"
        f"with cache.filling([cache.store('{ONE}', {{}})]):\n"
        "    print('filling', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with python(code, tmp_path) as other:
        assert other.stdout.readline() == "filling\n"
        before = picture(home)
        in_store = [outcome for outcome in prune(tmp_path) if outcome.removal.path.parent == home]
        (whole,) = [outcome for outcome in prune(tmp_path, unused_days=30) if outcome.removal.kind == "store"]
        assert {outcome.note for outcome in (*in_store, whole)} == {"another process fills it"} and len(in_store) == 2
        assert not any(outcome.failed for outcome in (*in_store, whole))
        after = picture(home)
        assert {name: what for name, what in after.items() if name in before} == before
        other.communicate("")
    assert [outcome.note for outcome in prune(tmp_path, unused_days=30)] == [""]
    assert store_names(tmp_path) == []


def test_locks_are_held_while_a_store_is_emptied(tmp_path, monkeypatch):
    home = store_of_age(tmp_path, ONE, 100)
    free = []
    unlink = Path.unlink

    def watching(self, missing_ok=False):
        code = (
            "import sys; from filelock import FileLock, Timeout\n"
            "for name in sys.argv[1:]:\n"
            "    try:\n        FileLock(name).acquire(timeout=0); print(name)\n"
            "    except Timeout: pass\n"
        )
        with python(code, home / ".fill.lock", home / ".manifest.lock") as asking:
            free.append(asking.communicate()[0])
        assert asking.returncode == 0
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watching)
    prune(tmp_path, unused_days=30)
    assert free == ["", ""]  # the manifest and a shard


def test_manifest_goes_first(tmp_path, monkeypatch):
    home = store_of_age(tmp_path, ONE, 100, commits=3)
    order = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: (order.append(self.name), unlink(self)))
    prune(tmp_path, unused_days=30)
    assert order[0] == MANIFEST_NAME and len(order) == 4
    assert shards(home) == []


def test_reader_keeps_the_rows_that_it_has_open_and_the_next_run_encodes_them_again(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    reader = DiskStore(home, ONE)
    prune(tmp_path, unused_days=30)
    assert torch.equal(reader.get_many(keys_of(1, 2, 3)).values, rows_of(1, 2, 3))
    assert len(DiskStore(home, ONE)) == 0
    assert not reader.refresh()
    reader.put_many(keys_of(4), rows_of(4))
    reader.flush()
    again = DiskStore(home, ONE)
    assert again.get_many(keys_of(1, 4)).positions.tolist() == [1]


@pytest.mark.parametrize("deleted", [0, 1, 2, 3])
def test_pruning_that_breaks_off_leaves_each_row_whole_or_not_at_all(tmp_path, monkeypatch, deleted):
    home = store_of_age(tmp_path, ONE, 100, commits=3)
    unlink, done = Path.unlink, []

    def interrupted(self, missing_ok=False):
        if len(done) == deleted:
            raise KeyboardInterrupt
        done.append(self.name)
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", interrupted)
        prune(tmp_path, unused_days=30)
    found = DiskStore(home, ONE).get_many(keys_of(1, 2, 3))
    assert len(found.positions) == min(3, 4 - deleted)
    assert torch.equal(found.values, rows_of(*(1 + found.positions).tolist()))
    assert {outcome.note for outcome in remove(choose(inspect_cache(tmp_path), max_bytes=0, now=NOW))} == {""}
    assert len(DiskStore(home, ONE)) == 0


def test_emptied_store_leaves_its_locks_for_an_hour(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    prune(tmp_path, unused_days=30)
    assert sorted(path.name for path in home.iterdir()) == [".fill.lock", ".manifest.lock"]
    set_age(home, HOUR - 1)
    assert chosen(tmp_path) == {}
    set_age(home, HOUR + 1)
    assert chosen(tmp_path) == {f"encoders/{ONE}": "left of a store that was removed"}
    assert [outcome.note for outcome in prune(tmp_path)] == [""]
    assert not home.exists()


def test_emptied_store_that_waits_for_a_fill_or_has_files_of_others_stays(tmp_path):
    store_rows(tmp_path, TWO)
    home = tmp_path / "encoders" / ONE
    home.mkdir()
    cache = CacheDirectory(tmp_path)
    with cache.filling([cache.store(ONE, {})]):
        set_age(home, 2 * HOUR)
        assert [outcome.note for outcome in prune(tmp_path)] == ["another process fills it"]
    plan = choose(inspect_cache(tmp_path), now=NOW)
    (home / "notes.txt").write_text("mine")
    assert [("changed" in outcome.note, outcome.failed) for outcome in remove(plan)] == [(True, False)]
    assert (home / ".fill.lock").exists()
    set_age(home, 2 * HOUR)
    assert prune(tmp_path) == ()
    assert (home / "notes.txt").read_text() == "mine"


def test_files_of_the_user_stay_where_they_are(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    table = store_table(tmp_path)
    set_age(table, 100 * DAY)
    mine = [
        tmp_path / "thesis.tex",
        tmp_path / ".tmp-thesis",
        home / "manifest.json.bak",
        home / "shard-1.safetensors",
        home / f"shard-{'A' * 16}.safetensors",
        home / f"shard-{'a' * 16}.safetensors.old",
        tmp_path / "encoders" / "model.safetensors",
        tmp_path / "encoders" / f"{TWO}x" / MANIFEST_NAME,
        tmp_path / "datasets" / "train.safetensors",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        set_age(path, 100 * DAY)
    set_age(home, 100 * DAY)
    outcomes = prune(tmp_path, unused_days=30, max_bytes=0)
    assert {outcome.removal.kind for outcome in outcomes} == {"store", "index table"}
    assert all(path.read_text() == "mine" for path in mine)
    assert {path for path in home.iterdir() if path not in mine} == {home / ".fill.lock", home / ".manifest.lock"}


def test_store_without_a_readable_manifest_goes_when_it_is_due_and_its_shards_are_no_orphans(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    flip(home / MANIFEST_NAME)
    set_age(home, 10 * DAY)
    assert chosen(tmp_path) == {}
    assert list(chosen(tmp_path, unused_days=9)) == [f"encoders/{ONE}"]
    (home / MANIFEST_NAME).unlink()
    set_age(home, 10 * DAY)
    assert chosen(tmp_path) == {}
    assert [outcome.note for outcome in prune(tmp_path, unused_days=9)] == [""]
    assert shards(home) == []


def test_store_of_a_newer_version_stays_with_everything_in_it(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    leave_behind(tmp_path, 10 * DAY)
    edit_manifest(home, version=99)
    set_age(home, 10 * DAY)
    before = picture(home)
    plan = choose(inspect_cache(tmp_path), unused_days=1, now=NOW)
    remove(plan)
    assert picture(home) == before
    assert len(plan.notes) == 1 and "newer version" in plan.notes[0]


@pytest.fixture
def outside(tmp_path):
    """A store, a table and leftovers somewhere else, all of them old, which no pruning of the cache may touch."""
    root = tmp_path / "outside"
    store_rows(root, ONE)
    store_table(root)
    leave_behind(root, 0)
    for path in root.rglob("*"):
        set_age(path, 100 * DAY)
    return root


@pytest.mark.parametrize("place", ["encoders", "encoders/" + ONE, "datasets"])
def test_directory_behind_a_link_is_left_alone(tmp_path, outside, place):
    root = tmp_path / "cache"
    store_of_age(root, TWO, 1)
    if place == "encoders":
        shutil.rmtree(root / "encoders")
    (root / place).symlink_to(outside / place, target_is_directory=True)
    before = picture(outside)
    plan = choose(inspect_cache(root), unused_days=30, max_bytes=0, now=NOW)
    assert any("behind a symbolic link" in note for note in plan.notes)
    assert not any(root / place in (removal.path, *removal.path.parents) for removal in plan.removals)
    remove(plan)
    assert picture(outside) == before


def test_directory_that_became_a_link_since_it_was_chosen_is_left_alone(tmp_path, outside):
    root = tmp_path / "cache"
    home = store_of_age(root, ONE, 100)
    plan = choose(inspect_cache(root), unused_days=30, now=NOW)
    shutil.rmtree(home)
    home.symlink_to(outside / "encoders" / ONE, target_is_directory=True)
    before = picture(outside)
    (outcome,) = remove(plan)
    assert outcome.freed_bytes == 0 and outcome.note
    assert picture(outside) == before


def test_link_in_the_place_of_a_file_is_neither_followed_nor_deleted(tmp_path, outside):
    root = tmp_path / "cache"
    home = store_of_age(root, ONE, 100)
    mine = outside / "mine.txt"
    mine.write_text("mine")
    links = [home / f"shard-{'a' * 16}.safetensors", home / ".tmp-0-x", root / "datasets" / f"{'b' * 32}.safetensors"]
    for link in links:
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(mine)
    before = picture(outside)
    for path in (home, *links):
        set_age(path, 100 * DAY)
    outcomes = prune(root, unused_days=30, max_bytes=0)
    assert picture(outside) == before
    assert all(link.is_symlink() for link in links)
    assert shards(home) == [links[0]]  # the real one is gone
    (whole,) = [outcome for outcome in outcomes if outcome.removal.kind == "store"]
    assert "2 of its files cannot be deleted" in whole.note and whole.failed and whole.freed_bytes > 0


@pytest.mark.parametrize("name", [".fill.lock", ".manifest.lock", MANIFEST_NAME])
def test_store_with_a_link_for_a_lock_or_manifest_is_left_alone(tmp_path, outside, name):
    root = tmp_path / "cache"
    home = store_of_age(root, ONE, 100)
    (home / name).touch()
    (home / name).rename(outside / "theirs")
    (home / name).symlink_to(outside / "theirs")
    set_age(home, 100 * DAY)
    before, rows = picture(outside), shards(home)
    (outcome,) = [outcome for outcome in prune(root, max_bytes=0) if outcome.removal.kind == "store"]
    assert outcome.failed and ("symbolic link" in outcome.note or "no regular file" in outcome.note)
    assert picture(outside) == before and shards(home) == rows


def test_cache_whose_own_directory_is_a_link_is_pruned(tmp_path):
    store_of_age(tmp_path / "real", ONE, 100)
    (tmp_path / "cache").symlink_to(tmp_path / "real", target_is_directory=True)
    assert [outcome.note for outcome in prune(tmp_path / "cache", unused_days=30)] == [""]
    assert store_names(tmp_path / "real") == []


def test_what_cannot_be_deleted_is_told_and_the_others_go(tmp_path, monkeypatch):
    stuck = store_of_age(tmp_path, ONE, 100)
    store_of_age(tmp_path, TWO, 90)
    table = store_table(tmp_path)
    set_age(table, 100 * DAY)
    unlink = Path.unlink

    def refuse(self, missing_ok=False):
        if self.parent == stuck or self == table:
            raise PermissionError(13, "Permission denied")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    outcomes = {outcome.removal.path: outcome for outcome in prune(tmp_path, unused_days=30)}
    for path in (stuck, table):
        assert outcomes[path].failed and outcomes[path].note == "cannot be removed: Permission denied"
    assert outcomes[tmp_path / "encoders" / TWO].note == ""
    assert store_names(tmp_path) == [ONE]


def test_read_only_cache_says_so_and_stays(tmp_path):
    home = store_of_age(tmp_path, ONE, 100)
    home.chmod(0o555)
    try:
        if os.access(home, os.W_OK):
            pytest.skip("this user may write everywhere")
        (outcome,) = prune(tmp_path, unused_days=30)
        assert outcome.failed and "ermi" in outcome.note
        assert len(DiskStore(home, ONE)) == 3
    finally:
        home.chmod(0o755)


def orphan_of(home, size, seconds):
    """Leave a shard that no manifest names beside a store, without making the store look younger."""
    orphan = home / f"shard-{'a' * 16}.safetensors"
    orphan.write_bytes(b"x" * size)
    set_age(orphan, seconds)
    return orphan


@pytest.mark.parametrize("age", [HOUR - 1, HOUR + 1], ids=["young", "old"])
def test_leftovers_of_a_store_that_goes_are_freed_with_it_and_counted_once(tmp_path, age):
    for digest, days in ((ONE, 1), (TWO, 9), (THREE, 5)):
        store_of_age(tmp_path, digest, days)
    orphan_of(tmp_path / "encoders" / TWO, 1000, age)
    for lock in (".fill.lock", ".manifest.lock"):
        (tmp_path / "encoders" / TWO / lock).write_text("a lock that stays")
    before = inspect_cache(tmp_path)
    store = next(store for store in before.stores if store.digest == TWO).bytes
    for limits, removed in (
        ({"max_bytes": before.bytes - 1000 - store}, [TWO]),  # with its orphan, the store is enough
        ({"max_bytes": before.bytes - 1000 - store - 1}, [TWO, THREE]),
        ({"unused_days": 7}, [TWO]),
    ):
        plan = choose(inspect_cache(tmp_path), now=NOW, **limits)
        assert [removal.path.name for removal in plan.removals] == removed
        assert plan.kept_bytes == before.bytes - plan.freed_bytes
    outcomes = remove(plan)
    assert [(outcome.note, outcome.freed_bytes) for outcome in outcomes] == [("", store + 1000)]
    assert inspect_cache(tmp_path).bytes == plan.kept_bytes


def test_old_leftovers_go_before_any_store(tmp_path):
    store_of_age(tmp_path, ONE, 1)
    store_of_age(tmp_path, TWO, 9)
    orphan = orphan_of(tmp_path / "encoders" / ONE, 1000, 2 * HOUR)
    total = inspect_cache(tmp_path).bytes
    plan = choose(inspect_cache(tmp_path), max_bytes=total - 1, now=NOW)
    assert [removal.path for removal in plan.removals] == [orphan]
    assert sum(outcome.freed_bytes for outcome in remove(plan)) == plan.freed_bytes == 1000


def test_leftovers_that_are_too_young_are_told_of(tmp_path):
    store_of_age(tmp_path, ONE, 1)
    leave_behind(tmp_path, HOUR - 1)
    plan = choose(inspect_cache(tmp_path), now=NOW)
    assert plan.removals == ()
    assert plan.notes == (
        "3 leftovers are younger than an hour, so a process may still use them: left alone until then.",
    )
    orphan_of(tmp_path / "encoders" / ONE, 10, 2 * HOUR)
    (tmp_path / "datasets" / ".tmp-0123-x.safetensors").unlink()
    (note,) = choose(inspect_cache(tmp_path), now=NOW).notes
    assert note.startswith("1 leftover is younger than an hour, so a process may still use it")
    assert choose(inspect_cache(tmp_path), max_bytes=0, now=NOW).notes == ()  # it goes with its store
