"""Index tables: a dataset's keys and targets, found again, or refused when they are not what was written."""

from __future__ import annotations

import json
import logging
import os
import warnings

import numpy as np
import pytest
import torch

from quatcache.errors import StoreError
from quatcache.keys import content_keys
from quatcache.store import CacheDirectory
from quatcache.store.files import content_digest, write_tensors
from quatcache.store.tables import DatasetTable, read_tables, write_table


def table(*names, targets=True, encoders=("text",), width=1):
    keys = content_keys([f"{name}" for name in names for _ in range(width)]).reshape(len(names), width, 2)
    columns = (torch.arange(len(names)), torch.ones(len(names), 3).bfloat16()) if targets else None
    return DatasetTable(dict.fromkeys(encoders, keys), columns, "group")


def read(directory, encoders=("text",)):
    return list(read_tables(directory, encoders, set()))


def assert_same(one, other):
    assert one.layout == other.layout and one.keys.keys() == other.keys.keys()
    for name in one.keys:
        assert one.keys[name].dtype == np.int64 and np.array_equal(one.keys[name], other.keys[name])
    assert (one.targets is None) == (other.targets is None)
    for mine, yours in zip(one.targets or (), other.targets or (), strict=True):
        assert mine.dtype == yours.dtype and torch.equal(mine, yours)


@pytest.mark.parametrize(
    "written",
    [
        table("a", "b", "c"),
        table("a", "b", targets=False),
        table("a", width=2, encoders=("b", "a")),
        DatasetTable({"text": table("a").keys["text"]}, (), "pair"),
        table(),
    ],
    ids=["targets", "no-targets", "pairs-of-two-encoders", "no-target-columns", "empty"],
)
def test_table_is_read_back_as_written(tmp_path, written):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_table(tmp_path, written)
        (found,) = read(tmp_path, tuple(written.keys))
    assert_same(found, written)
    assert len(found) == len(written)


def test_same_dataset_writes_the_same_file_once(tmp_path):
    path = write_table(tmp_path, table("a", "b"))
    before = path.stat().st_mtime_ns
    assert write_table(tmp_path, table("a", "b")) == path
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "other",
    [
        table("a", "c"),
        table("b", "a"),
        table("a"),
        table("a", "b", targets=False),
        table("a", "b", encoders=("image",)),
        DatasetTable(table("a", "b").keys, table("a", "b").targets, "pair"),
        DatasetTable(table("a", "b").keys, (torch.arange(2), torch.zeros(2, 3).bfloat16()), "group"),
        DatasetTable(table("a", "b").keys, (torch.arange(2, dtype=torch.int32), torch.ones(2, 3).bfloat16()), "group"),
    ],
    ids=["edited", "reordered", "shrunk", "unlabelled", "other-encoder", "other-layout", "relabelled", "other-dtype"],
)
def test_other_dataset_writes_another_file(tmp_path, other):
    assert write_table(tmp_path, table("a", "b")) != write_table(tmp_path, other)
    assert len(list(tmp_path.iterdir())) == 2


def test_tables_come_newest_first(tmp_path):
    tables = [table("a"), table("b"), table("c")]
    for age, written in zip((2, 3, 1), tables, strict=True):
        os.utime(write_table(tmp_path, written), (1000 - age, 1000 - age))
    for found, expected in zip(read(tmp_path), [tables[2], tables[0], tables[1]], strict=True):
        assert_same(found, expected)


def test_only_tables_that_know_all_encoders_are_given(tmp_path):
    both = table("a", encoders=("text", "image"))
    write_table(tmp_path, both)
    write_table(tmp_path, table("a"))
    assert len(read(tmp_path)) == 2
    (found,) = read(tmp_path, ("image", "text"))
    assert_same(found, both)
    assert read(tmp_path, ("sound",)) == []


def test_no_directory_has_no_tables(tmp_path):
    assert read(tmp_path / "nowhere") == []


def test_head_cuts_keys_and_targets():
    assert_same(table("a", "b", "c", targets=False).head(2), table("a", "b", targets=False))
    head = table("a", "b", "c").head(2)
    assert len(head) == 2 and [len(column) for column in head.targets] == [2, 2]


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "value": lambda path: flip(path, -1),
    "key": lambda path: flip(path, path.read_bytes().index(content_keys(["a"]).tobytes()) + 3),
    "header": lambda path: flip(path, path.read_bytes().index(b"group") + 1),
    "metadata": lambda path: flip(path, path.read_bytes().index(b"quatcache")),
    "length": lambda path: flip(path, 2),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: path.write_bytes(b""),
    "of-another": lambda path: path.write_bytes(write_table(path.parent / "other", table("x")).read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_table_is_passed_over_with_a_warning_and_written_again(tmp_path, caplog, damage):
    path = write_table(tmp_path, table("a", "b"))
    write_table(tmp_path, table("c"))
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING, "quatcache"):
        (found,) = read(tmp_path)
    assert_same(found, table("c"))
    (record,) = caplog.records
    assert path.name in record.getMessage() and "The dataset is read again." in record.getMessage()
    assert write_table(tmp_path, table("a", "b")) == path
    assert len(read(tmp_path)) == 2


def craft(directory, tensors, **about):
    """Write a table whose content does hash to its name, as an attacker would."""
    about = {"version": 1, "samples": 2, "layout": "group", "encoders": ["text"], "targets": 1} | about
    path = directory / f"{content_digest(about, tensors)}.safetensors"
    write_tensors(path, tensors, {"quatcache": json.dumps(about, sort_keys=True)})


KEYS, TARGET = torch.arange(4).reshape(2, 1, 2), torch.arange(2)


def test_crafted_table_without_fault_is_read(tmp_path):
    craft(tmp_path, {"keys.0": KEYS, "target.0": TARGET})
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({"target.0": TARGET}, {}),
        ({"keys.0": KEYS}, {}),
        ({"keys.0": KEYS.float(), "target.0": TARGET}, {}),
        ({"keys.0": KEYS.bfloat16(), "target.0": TARGET}, {}),
        ({"keys.0": KEYS.reshape(2, 2), "target.0": TARGET}, {}),
        ({"keys.0": KEYS.reshape(2, 2, 1), "target.0": TARGET}, {}),
        ({"keys.0": KEYS[:1], "target.0": TARGET}, {}),
        ({"keys.0": torch.tensor(1), "target.0": TARGET}, {}),
        ({"keys.0": KEYS, "target.0": TARGET[:1]}, {}),
        ({"keys.0": KEYS, "target.0": torch.tensor(1)}, {}),
        ({"keys.0": KEYS, "keys.1": KEYS.repeat(1, 2, 1), "target.0": TARGET}, {"encoders": ["text", "image"]}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"samples": 2**60}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"samples": "2"}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"targets": 2**60}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"targets": "1"}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"encoders": []}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"encoders": None}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"version": 2}),
        ({"keys.0": KEYS, "target.0": TARGET}, {"version": "1"}),
    ],
)
def test_crafted_table_with_a_fault_is_passed_over(tmp_path, caplog, tensors, about):
    craft(tmp_path, tensors, **about)
    assert list(read_tables(tmp_path, (), set())) == []
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", "[" * 100_000], ids=["none", "list", "null", "object", "deep"]
)
def test_metadata_that_describes_no_table_is_passed_over(tmp_path, caplog, text):
    write_tensors(tmp_path / f"{'0' * 32}.safetensors", {"keys.0": KEYS}, {"quatcache": text})
    assert list(read_tables(tmp_path, (), set())) == []
    assert len(caplog.records) == 1


def test_temporary_files_of_other_writers_are_not_tables(tmp_path, caplog):
    path = write_table(tmp_path, table("a"))
    path.rename(tmp_path / f".tmp-0123456789ab-{path.name}")
    (tmp_path / "notes.safetensors").write_text("mine")
    assert read(tmp_path) == [] and not caplog.records


def test_table_that_vanishes_meanwhile_is_passed_over(tmp_path):
    for name in "ab":
        write_table(tmp_path, table(name))
    tables = read_tables(tmp_path, ("text",), set())
    next(tables)
    for path in tmp_path.iterdir():
        path.unlink()
    assert list(tables) == []


def test_unwritable_directory_is_a_store_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_table(tmp_path / "taken", table("a"))


def test_damaged_table_is_told_once_and_removed_with_the_next_that_is_written(tmp_path, caplog):
    directory = CacheDirectory(tmp_path)
    (tmp_path / "datasets").mkdir()
    forged = tmp_path / "datasets" / f"{'0' * 32}.safetensors"
    forged.write_bytes(b"no table")
    newer = tmp_path / "datasets" / f"{'1' * 32}.safetensors"
    write_tensors(newer, {}, {"quatcache": json.dumps({"version": 2})})
    for _ in range(2):
        assert list(directory.tables(["text"])) == []
    assert sorted(forged.name in text for text in caplog.messages) == [False, False, True]
    assert forged.exists(), "looking removes nothing"
    directory.write_table(table("a", "b"))
    assert not forged.exists() and newer.exists()
