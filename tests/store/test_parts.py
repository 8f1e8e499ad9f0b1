"""What ranks leave for each other: whole or not at all, noticed when its owner is gone, and never left lying."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import torch
from filelock import FileLock

from quatcache.errors import StoreError
from quatcache.keys import content_keys
from quatcache.store import CacheDirectory
from quatcache.store.parts import Claims, RankFolder, remove_leftovers

TOKEN, OTHER = "0" * 31 + "1", "0" * 31 + "2"


@pytest.fixture
def folders(tmp_path):
    """Folders of ranks, all left in the end."""
    made = []

    def folder(rank, size=2, token=TOKEN):
        made.append(RankFolder(tmp_path, token, rank, size))
        return made[-1]

    yield folder
    for one in made:
        one.leave()


def keys_of(*words):
    return content_keys(list(words))


def test_a_rank_is_here_from_the_moment_it_enters_until_it_leaves(folders):
    one, other = folders(0, size=3), folders(1, size=3)
    one.enter()
    assert (one.came(1), one.is_here(1)) == (False, False)
    other.enter()
    assert (one.came(1), one.is_here(1), other.is_here(0)) == (True, True, True)
    other.leave()
    assert (one.came(1), one.is_here(1)) == (True, False)


def test_asking_for_a_rank_makes_no_file(folders, tmp_path):
    one = folders(0)
    one.enter()
    assert not one.is_here(1)
    assert [path.name for path in one.path.iterdir()] == ["rank-0.lock"]


def test_the_last_rank_removes_the_folder_and_a_rank_that_never_came_keeps_it(folders):
    first, last = folders(0), folders(1)
    first.enter()
    last.enter()
    first.write("plan", {"a": 1}, {})
    first.leave()
    assert last.read("plan") == ({"a": 1}, {})
    last.leave()
    assert not last.path.exists()
    lonely = folders(0, token=OTHER)
    lonely.enter()
    lonely.leave()
    assert lonely.path.exists()
    remove_leftovers(lonely.path.parents[1])
    assert not lonely.path.exists()


def test_what_was_left_is_read_as_it_was_written(folders):
    one = folders(0)
    one.enter()
    tensors = {"keys": torch.arange(6).reshape(3, 2), "bits": torch.tensor([True, False])}
    one.write("part-0", {"layout": "group", "reason": None}, tensors)
    about, read = folders(1).read("part-0")
    assert about == {"layout": "group", "reason": None}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("place", [-1, 40, 9])
def test_a_damaged_file_counts_as_absent(folders, place):
    one = folders(0)
    one.enter()
    one.write("part-0", {"layout": "group"}, {"keys": torch.arange(6).reshape(3, 2)})
    path = one.path / "part-0.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    assert one.has("part-0")
    assert one.read("part-0") is None


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_what_is_no_part_counts_as_absent(folders, content):
    one = folders(0)
    one.enter()
    (one.path / "part-1.safetensors").write_bytes(content)
    assert one.read("part-1") is None


def test_a_file_that_is_not_needed_any_more_is_removed_once(folders):
    one = folders(0)
    one.enter()
    one.write("step-0-1", {}, {})
    one.remove("step-0-1")
    assert not one.has("step-0-1")
    one.remove("step-0-1")


def test_a_file_of_another_version_counts_as_absent(folders, monkeypatch):
    one = folders(0)
    one.enter()
    monkeypatch.setattr("quatcache.store.parts.PARTS_VERSION", 2)
    one.write("plan", {}, {})
    monkeypatch.undo()
    assert one.read("plan") is None


def test_a_token_cannot_lead_out_of_the_directory(tmp_path):
    with pytest.raises(StoreError, match="is not a token"):
        RankFolder(tmp_path, "../" * 10 + "ab", 0, 2)


def test_a_rank_cannot_enter_twice(folders):
    folders(0).enter()
    with pytest.raises(StoreError, match="cannot enter"):
        folders(0).enter()


def test_a_directory_that_is_a_file_cannot_be_entered(tmp_path, folders):
    (tmp_path / "filling").write_text("")
    with pytest.raises(StoreError, match="permit writing"):
        folders(0).enter()


def test_who_claims_a_key_first_has_it(tmp_path):
    one, other = Claims(tmp_path / "claims-x"), Claims(tmp_path / "claims-x")
    assert one.take(keys_of("a", "b", "c")).tolist() == [0, 1, 2]
    assert other.take(keys_of("c", "d", "a", "e")).tolist() == [1, 3]
    assert one.take(keys_of("e", "f")).tolist() == [1]
    assert one.take(keys_of("a")).tolist() == []
    assert other.take(keys_of()).tolist() == []
    stored = np.frombuffer((tmp_path / "claims-x").read_bytes(), "<i8").reshape(-1, 3)
    assert np.array_equal(stored[:, :2], keys_of("a", "b", "c", "d", "e", "f"))


def test_a_claim_says_where_its_row_will_be(tmp_path):
    one, other = Claims(tmp_path / "claims-x"), Claims(tmp_path / "claims-x")
    assert one.deal(keys_of("a", "b"), 5).tolist() == [-1, -1]
    assert other.deal(keys_of("c", "b"), 7 << 32 | 1).tolist() == [-1, 5]
    assert one.deal(keys_of("b", "c", "d"), 9).tolist() == [5, 7 << 32 | 1, -1]


def test_half_a_claim_of_a_rank_that_died_is_no_claim_and_shifts_no_other(tmp_path):
    one = Claims(tmp_path / "claims-x")
    one.take(keys_of("a"))
    with (tmp_path / "claims-x").open("ab") as file:
        file.write(keys_of("b").tobytes()[:9])
    assert one.take(keys_of("b")).tolist() == [0]
    assert Claims(tmp_path / "claims-x").take(keys_of("a", "b", "c")).tolist() == [2]
    assert (tmp_path / "claims-x").stat().st_size == 72


def test_claims_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "claims-x").mkdir()
    with pytest.raises(StoreError, match="permit writing there"):
        Claims(tmp_path / "claims-x").take(keys_of("a"))


def test_leftovers_of_processes_that_died_are_removed_and_nothing_else(tmp_path, folders):
    dead = folders(0, size=3, token=OTHER)
    dead.enter()
    dead.write("plan", {}, {})
    dead.write("step-0-4294967295", {}, {})
    dead.claims("f" * 32 + "-float16").take(keys_of("a"))
    (dead.path / ".tmp-abc").write_text("half a file")
    dead._lock.release()  # as the system does it when a process dies
    alive = folders(0)
    alive.enter()
    (tmp_path / "filling" / "mine").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "plan.safetensors").write_text("")
    (tmp_path / "filling" / ("f" * 32)).symlink_to(tmp_path / "outside")
    strange = tmp_path / "filling" / ("e" * 32)
    strange.mkdir()
    (strange / "notes.txt").write_text("")
    remove_leftovers(tmp_path)
    assert not dead.path.exists()
    assert alive.path.exists()
    assert (tmp_path / "filling" / "mine").exists()
    assert (strange / "notes.txt").exists()
    assert (tmp_path / "outside" / "plan.safetensors").exists()


def test_every_fill_removes_leftovers(tmp_path, folders):
    dead = folders(0)
    dead.enter()
    dead._lock.release()
    directory = CacheDirectory(tmp_path)
    with directory.filling([directory.store("f" * 32, {})]):
        assert not dead.path.exists()


def test_the_folder_of_ranks_is_not_taken_for_files_of_the_user(tmp_path, folders, caplog):
    folders(0).enter()
    directory = CacheDirectory(tmp_path)
    with caplog.at_level("INFO", logger="quatcache"), directory.filling([directory.store("f" * 32, {})]):
        assert caplog.records == []


def test_a_lock_is_no_link_to_elsewhere(tmp_path, folders):
    one = folders(0)
    one.enter()
    target = tmp_path / "elsewhere"
    target.write_text("")
    (one.path / "rank-1.lock").symlink_to(target)
    with FileLock(target):
        assert not one.is_here(1)


def test_files_are_as_open_to_others_as_the_umask_says(folders):
    one = folders(0)
    before = os.umask(0o022)
    try:
        one.enter()
        one.write("plan", {}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((one.path / "plan.safetensors").stat().st_mode) == 0o644
