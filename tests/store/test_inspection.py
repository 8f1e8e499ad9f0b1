"""Looking at a cache: all that is there is listed, what is not as it was written is found, nothing is changed."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch

from quatcache.errors import ConfigError, StoreError
from quatcache.store import CacheDirectory, DiskStore
from quatcache.store.inspection import check_cache, inspect_cache
from quatcache.store.manifest import MANIFEST_NAME
from quatcache.store.summaries import find_store, find_table
from tests.caches_for_tests import (
    DAY,
    NOW,
    ONE,
    THREE,
    TWO,
    add_rows,
    edit_manifest,
    flip,
    picture,
    python,
    set_age,
    shards,
    store_rows,
    store_table,
)


def check(root, advance=lambda done: None):
    return check_cache(inspect_cache(root), advance)


def only_finding(root):
    (found,) = check(root).findings
    return found


def test_stores_and_datasets_are_listed_with_what_they_hold(tmp_path):
    store_rows(tmp_path, ONE, (1, 2, 3), commits=2, facts={"class": "tests.Numbers", "pooling": "mean"})
    store_rows(tmp_path, TWO, (1, 2), dtype=torch.float16)
    store_table(tmp_path, (1, 2, 2), [torch.tensor([7, 8, 8]), torch.ones(3, 4)])
    summary = inspect_cache(tmp_path)
    one, two = sorted(summary.stores, key=lambda store: store.digest)
    assert (one.digest, one.rows, one.shards, one.stored, one.manifest.row_shape) == (ONE, 3, 2, "float32", (2,))
    assert one.manifest.facts == {"class": "tests.Numbers", "pooling": "mean"}
    assert one.manifest.environment == {"torch": "0.0"}
    assert (two.digest, two.rows, two.shards, two.stored) == (TWO, 2, 1, "float16")
    (table,) = summary.tables
    assert len(table.table) == 3 and table.table.layout == "group" and list(table.table.keys) == ["default"]
    assert [tuple(column.shape) for column in table.table.targets] == [(3,), (3, 4)]
    assert not summary.strays and not summary.foreign and not summary.findings


def test_sizes_add_up_to_the_bytes_on_disk(tmp_path):
    home = store_rows(tmp_path, commits=3)
    store_table(tmp_path)
    (home / f"shard-{'a' * 16}.safetensors").write_bytes(b"orphan")
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert inspect_cache(tmp_path).bytes == on_disk


def test_a_cache_directory_and_its_path_give_the_same(tmp_path):
    store_rows(tmp_path)
    assert inspect_cache(CacheDirectory(tmp_path)) == inspect_cache(str(tmp_path))


def test_leftovers_are_told_from_what_is_in_use_and_from_what_is_not_the_caches(tmp_path):
    home = store_rows(tmp_path)
    store_table(tmp_path)
    orphan = home / f"shard-{'a' * 16}.safetensors"
    shutil.copy(shards(home)[0], orphan)
    (home / ".tmp-0123-manifest.json").write_text("{")
    (tmp_path / "datasets" / ".tmp-0123-x.safetensors").write_text("")
    empty = tmp_path / "encoders" / TWO
    empty.mkdir()
    (empty / ".fill.lock").touch()
    for foreign in (home / "notes.txt", tmp_path / "encoders" / "mine", tmp_path / "datasets" / "data.csv"):
        foreign.write_text("mine")
    summary = inspect_cache(tmp_path)
    assert len(summary.stores) == 1 and summary.stores[0].shards == 1
    assert {(stray.path.name[:5], stray.kind) for stray in summary.strays} == {
        ("shard", "orphan shard"),
        (".tmp-", "temporary file"),
        ("22222", "empty store"),
    }
    assert len(summary.strays) == 4
    assert {path.name for path in summary.foreign} == {"notes.txt", "mine", "data.csv"}


def test_looking_and_checking_change_nothing(tmp_path):
    store_rows(tmp_path, ONE, commits=2)
    damaged = store_rows(tmp_path, TWO)
    flip(damaged / MANIFEST_NAME)
    lost = store_rows(tmp_path, THREE)
    (lost / MANIFEST_NAME).unlink()
    set_age(lost, DAY)
    store_table(tmp_path)
    before = picture(tmp_path)
    assert len(inspect_cache(tmp_path).findings) == 2
    check(tmp_path)
    assert picture(tmp_path) == before


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other files"])
def test_what_is_no_cache_is_refused_in_a_sentence(tmp_path, kind):
    path = tmp_path / "somewhere"
    if kind == "file":
        path.write_text("")
    elif kind != "missing":
        path.mkdir()
    if kind == "other files":
        (path / "encoders").mkdir()
        (path / "encoders" / "encoder.py").write_text("")
        (path / "datasets").mkdir()
        (path / "datasets" / "train.safetensors").write_text("")
    with pytest.raises(StoreError, match=r"somewhere is not a (cache|directory).*; pass the save_dir of a"):
        inspect_cache(path)


def test_directory_that_may_not_be_read_is_an_error_that_names_it(tmp_path):
    store_rows(tmp_path)
    (tmp_path / "encoders").chmod(0)
    try:
        if os.access(tmp_path / "encoders", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(StoreError, match="encoders"):
            inspect_cache(tmp_path)
    finally:
        (tmp_path / "encoders").chmod(0o755)


def test_last_use_is_the_later_of_the_last_commit_and_the_last_opening(tmp_path):
    home = store_rows(tmp_path)
    set_age(home / MANIFEST_NAME, 5 * DAY)
    assert inspect_cache(tmp_path).stores[0].last_used == NOW - 5 * DAY
    (home / ".last-used").touch()
    set_age(home / ".last-used", 2 * DAY)
    assert inspect_cache(tmp_path).stores[0].last_used == NOW - 2 * DAY


def test_stores_come_in_the_order_of_their_creation(tmp_path):
    for created, digest in (("2026-01-03", ONE), ("2026-01-01", TWO), ("2026-01-02", THREE)):
        edit_manifest(store_rows(tmp_path, digest), created=created)
    assert [store.digest for store in inspect_cache(tmp_path).stores] == [TWO, THREE, ONE]
    for age, digest in ((1, TWO), (3, ONE), (2, THREE)):  # all within one second
        edit_manifest(tmp_path / "encoders" / digest, created="2026-01-01")
        set_age(tmp_path / "encoders" / digest / MANIFEST_NAME, age)
    assert [store.digest for store in inspect_cache(tmp_path).stores] == [ONE, THREE, TWO]


def test_manifest_of_a_newer_version_is_told_apart_from_a_damaged_one(tmp_path):
    home = store_rows(tmp_path)
    edit_manifest(home, version=99)
    (store,) = inspect_cache(tmp_path).stores
    assert store.newer and store.manifest is None and store.rows == 0
    assert "version 99" in store.problem.reason and "upgrade quatcache" in store.problem.remedy
    flip(shards(home)[0])  # what a shard of that version looks like, nobody knows here
    assert only_finding(tmp_path) == store.problem
    flip(home / MANIFEST_NAME, 5)
    (store,) = inspect_cache(tmp_path).stores
    assert not store.newer and "is damaged" in store.problem.reason and "made again" in store.problem.remedy


def test_directory_under_another_encoders_name_is_found(tmp_path):
    store_rows(tmp_path, ONE).rename(tmp_path / "encoders" / TWO)
    found = only_finding(tmp_path)
    assert found.path.name == MANIFEST_NAME and ONE in found.reason


def test_directory_under_another_storage_dtypes_name_is_found(tmp_path):
    home = store_rows(tmp_path, ONE, dtype=torch.float16)
    assert not check(tmp_path).findings
    home.rename(tmp_path / "encoders" / ONE)
    assert "torch.float16" in only_finding(tmp_path).reason


def test_whole_numbers_stay_as_they_are_in_a_directory_for_narrower_floats(tmp_path):
    store_rows(tmp_path, ONE, dtype=torch.float16, rows=torch.arange(6).reshape(3, 2))
    assert inspect_cache(tmp_path).stores[0].stored == "int64"
    assert not check(tmp_path).findings


def test_store_is_named_by_the_beginning_of_its_digest(tmp_path):
    for digest, dtype in ((ONE, None), (ONE, torch.float16), (TWO, None)):
        store_rows(tmp_path, digest, dtype=dtype)
    summary = inspect_cache(tmp_path)
    assert find_store(summary, "22").path.name == TWO
    assert find_store(summary, "1-float16").path.name == f"{ONE}-float16"
    assert find_store(summary, "1-float32").path.name == ONE
    assert find_store(summary, ONE).path.name == ONE
    with pytest.raises(ConfigError, match=f"'1' is the beginning of 2 names; name one of {ONE}, {ONE}-float16"):
        find_store(summary, "1")
    with pytest.raises(ConfigError, match=f"'3' is the beginning of no store's name; name one of .*{TWO}"):
        find_store(summary, "3")
    with pytest.raises(ConfigError, match="'4' names a dataset, and there is none"):
        find_table(summary, "4")
    table = store_table(tmp_path)
    assert find_table(inspect_cache(tmp_path), table.stem[:4]).path == table


def test_whole_cache_has_no_findings_and_every_byte_was_read(tmp_path):
    store_rows(tmp_path, ONE, commits=3)
    store_rows(tmp_path, TWO, rows=torch.ones(3), numbers=(1, 2, 3))
    store_table(tmp_path)
    told = []
    found = check(tmp_path, told.append)
    assert found.findings == () and found.files == 7
    assert sum(told) == found.bytes == inspect_cache(tmp_path).bytes


@pytest.mark.parametrize("place", [0, 12, -1, -40])
def test_flipped_byte_of_a_shard_is_found(tmp_path, place):
    home = store_rows(tmp_path, numbers=tuple(range(9)), commits=3)
    flip(shards(home)[1], place)
    found = only_finding(tmp_path)
    assert found.path == shards(home)[1] and "encodes its rows again" in found.remedy
    assert str(home) not in found.reason


def test_truncated_swapped_and_missing_shards_are_found_with_their_reasons(tmp_path):
    home = store_rows(tmp_path, numbers=tuple(range(8)), commits=4)
    cut, first, second, gone = shards(home)
    cut.write_bytes(cut.read_bytes()[:-1])
    first.rename(home / "x")
    second.rename(first)
    (home / "x").rename(second)
    gone.unlink()
    findings = {found.path.name: found.reason for found in check(tmp_path).findings}
    assert findings[gone.name] == "is missing"
    assert "bytes instead of" in findings[cut.name]
    assert {first.name, second.name} < set(findings) and len(findings) == 4


def test_shard_of_another_store_is_found(tmp_path):
    one, two = store_rows(tmp_path, ONE), store_rows(tmp_path, TWO)
    shutil.copy(shards(two)[0], shards(one)[0])
    assert only_finding(tmp_path).path == shards(one)[0]


@pytest.mark.parametrize("place", [0, 20, -1])
def test_flipped_byte_of_an_index_table_is_found(tmp_path, place):
    store_rows(tmp_path)
    table = store_table(tmp_path, targets=[torch.tensor([1, 2, 3])])
    flip(table, place)
    found = only_finding(tmp_path)
    assert found.path == table and "reads the dataset again" in found.remedy


def test_shards_without_their_manifest_are_judged_alone(tmp_path):
    home = store_rows(tmp_path, numbers=tuple(range(6)), commits=3)
    (home / MANIFEST_NAME).unlink()
    set_age(home, DAY)
    assert only_finding(tmp_path).path == home / MANIFEST_NAME
    flip(shards(home)[2])
    findings = check(tmp_path).findings
    assert [found.path.name for found in findings] == [MANIFEST_NAME, shards(home)[2].name]
    assert "own digest" in findings[1].reason


def test_first_commit_of_another_process_is_no_damage(tmp_path):
    store_rows(tmp_path, TWO)
    home = store_rows(tmp_path, commits=2)
    (home / MANIFEST_NAME).unlink()  # the shards are there, the manifest follows
    summary = inspect_cache(tmp_path)
    assert [store.digest for store in summary.stores] == [TWO]
    assert not summary.strays and not check(tmp_path).findings
    set_age(shards(home)[0], 120, now=time.time())
    assert only_finding(tmp_path).path == home / MANIFEST_NAME


def test_shards_that_are_committed_while_it_checks_are_checked_too(tmp_path):
    home = store_rows(tmp_path, numbers=(1,))
    late = []

    def commit_another(done):
        if not late:
            late.append(True)
            add_rows(home, 2)
            flip(next(path for path in shards(home) if path.name not in before))

    before = {path.name for path in shards(home)}
    (found,) = check(tmp_path, commit_another).findings
    assert found.path.name not in before


def test_shards_that_are_packed_while_it_checks_are_not_called_missing(tmp_path):
    home = store_rows(tmp_path, numbers=tuple(range(12)), commits=12)
    done_once = []

    def pack(done):
        if not done_once:
            done_once.append(True)
            DiskStore(home, ONE).compact()

    assert check(tmp_path, pack).findings == ()
    assert len(shards(home)) == 1  # they were packed indeed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    home, other = store_rows(tmp_path, ONE), store_rows(tmp_path, TWO)
    table = store_table(tmp_path)
    for path in (home / MANIFEST_NAME, shards(other)[0], table):
        path.unlink()
        os.mkfifo(path)
    code = (
        "import sys; from quatcache.store.inspection import check_cache, inspect_cache\n"
        "for found in check_cache(inspect_cache(sys.argv[1])).findings: print(found.path, found.reason)"
    )
    with python(code, tmp_path) as looking:  # what waits for a pipe is not stopped from within
        told, _ = looking.communicate(timeout=120)
    assert looking.returncode == 0
    for path in (home / MANIFEST_NAME, shards(other)[0], table):
        assert f"{path} is not a regular file" in told


def test_store_behind_a_link_is_shown_as_a_run_would_see_it(tmp_path):
    outside = store_rows(tmp_path / "elsewhere", ONE)
    home = tmp_path / "cache" / "encoders" / ONE
    home.parent.mkdir(parents=True)
    home.symlink_to(outside, target_is_directory=True)
    assert inspect_cache(tmp_path / "cache").stores[0].rows == 3
