"""Notes of models: what is kept, what is passed over, and how they are looked after."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from quatcache.keys import content_keys
from quatcache.store import CacheDirectory, KnownModels, known
from quatcache.store.inspection import inspect_cache
from quatcache.store.pruning import choose, remove

DIGEST, MARK = "1" * 32, "0" * 32
FACTS = {"class": "Table", "size": 3}


@pytest.fixture
def cache(tmp_path):
    """A cache with rows of one encoder, and a note of it."""
    cache = CacheDirectory(tmp_path / "cache")
    store = cache.store(DIGEST, FACTS)
    store.put_many(content_keys(["a"]), torch.ones(1, 3))
    store.flush()
    cache.models.remember(MARK, DIGEST, FACTS)
    return cache


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * (known._LARGE + 1))
    (folder / "part" / "config.json").write_text("{}")
    return folder


def test_what_is_remembered_is_recalled_and_can_be_forgotten(cache):
    assert KnownModels(cache.path).recall(MARK) == FACTS
    assert cache.models.recall("2" * 32) is None
    cache.models.forget(MARK)
    cache.models.forget(MARK)
    assert cache.models.recall(MARK) is None


def test_digest_is_of_content_and_relative_names(folder, tmp_path):
    models = KnownModels(tmp_path)
    before = models.digest([folder])
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("hidden")
    (folder / ".gitattributes").write_text("hidden")
    moved = folder.rename(tmp_path / "moved")
    assert models.digest([moved]) == before
    (moved / "part" / "config.json").rename(moved / "config.json")
    assert models.digest([moved]) != before
    assert models.digest([moved]) != models.digest([moved, moved])


def test_folder_that_cannot_be_read_whole_has_no_digest(folder, tmp_path):
    models = KnownModels(tmp_path)
    assert models.digest([folder / "absent"]) is None
    (tmp_path / "other").mkdir()
    (folder / "link").symlink_to(tmp_path / "other")
    assert models.digest([folder]) is None
    (folder / "link").unlink()
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    assert models.digest([folder]) is None
    (folder / "dangling").unlink()
    os.mkfifo(folder / "pipe")
    assert models.digest([folder]) is None


def test_checksum_of_a_large_file_is_kept_once_it_is_settled(folder, tmp_path, monkeypatch):
    for settled, reads in ((10**18, 2), (-(10**18), 1)):
        monkeypatch.setattr(known, "_SETTLED_NS", settled)
        read = []
        checksum = known.checksum
        monkeypatch.setattr(known, "checksum", lambda path, read=read, c=checksum: read.append(path.name) or c(path))
        first = KnownModels(tmp_path)
        digest = first.digest([folder])
        first.remember(MARK, DIGEST, FACTS)
        assert KnownModels(tmp_path).digest([folder]) == digest
        assert read.count("weights") == reads
        (note,) = (tmp_path / "models").iterdir()
        assert "weights" not in note.read_text()


def test_orphans_and_damaged_notes_are_leftovers_and_are_pruned(cache):
    models = cache.path / "models"
    cache.models.remember("2" * 32, "3" * 32, FACTS)
    (models / ("4" * 32 + ".json")).write_text("{")
    (models / ".tmp-1").write_text("")
    (models / "readme.txt").write_text("mine")
    summary = inspect_cache(cache)
    kinds = {stray.path.name: stray.kind for stray in summary.strays}
    assert kinds == {"2" * 32 + ".json": "orphan note", "4" * 32 + ".json": "orphan note", ".tmp-1": "temporary file"}
    assert [path.name for path in summary.foreign] == ["readme.txt"]
    young = max(stray.modified for stray in summary.strays) + 60
    assert choose(summary, now=young).removals == ()
    plan = choose(summary, now=young + 7200)
    assert {removal.reason for removal in plan.removals} >= {"the rows of its encoder are gone"}
    assert all(not outcome.note for outcome in remove(plan))
    assert sorted(path.name for path in models.iterdir()) == [MARK + ".json", "readme.txt"]
    assert inspect_cache(cache).strays == ()


def test_note_becomes_an_orphan_when_its_store_is_gone(cache):
    other = cache.store("5" * 32, {})
    other.put_many(content_keys(["a"]), torch.ones(1, 3))
    other.flush()
    assert inspect_cache(cache).strays == ()
    shutil.rmtree(cache.path / "encoders" / DIGEST)
    assert [stray.kind for stray in inspect_cache(cache).strays] == ["orphan note"]


def test_directory_of_notes_alone_is_no_cache(tmp_path):
    KnownModels(tmp_path).remember(MARK, DIGEST, FACTS)
    with pytest.raises(OSError, match="is not a cache"):
        inspect_cache(tmp_path)


def test_note_in_a_link_or_pipe_is_passed_over(cache):
    note = cache.path / "models" / f"{MARK}.json"
    note.unlink()
    os.mkfifo(note)
    assert cache.models.recall(MARK) is None
    assert [stray.kind for stray in inspect_cache(cache).strays] == ["orphan note"]


def test_facts_survive_as_they_are(cache):
    facts = {"ü": [1, 2.5, None, True, {"a": "b"}], "weights.x": "0" * 32}
    cache.models.remember(MARK, DIGEST, facts)
    assert cache.models.recall(MARK) == facts
    assert json.loads((cache.path / "models" / f"{MARK}.json").read_text())["format"] == "quatcache-model"
