"""A save_dir: what lies where, who may write, and that nothing leads out of it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
import torch

from quatcache.errors import StoreError
from quatcache.keys import content_keys
from quatcache.store import CacheDirectory, DatasetTable, environment

DIGEST = "0123456789abcdef" * 2


def filling(path, digest=DIGEST):
    directory = CacheDirectory(path)
    return directory.filling([directory.store(digest, {})])


def put(store, *names):
    store.put_many(content_keys(list(names)), torch.ones(len(names), 2))
    store.flush()


def test_nothing_is_made_by_looking(tmp_path):
    directory = CacheDirectory(tmp_path / "cache")
    assert len(directory.store(DIGEST, {})) == 0
    assert list(directory.manifests()) == [] and list(directory.tables(["text"])) == []
    assert list(tmp_path.iterdir()) == []


def test_each_identity_and_storage_dtype_has_its_own_rows(tmp_path):
    directory = CacheDirectory(tmp_path)
    put(directory.store(DIGEST, {"pooling": "mean"}), "a")
    put(directory.store(DIGEST, {}, torch.float16), "b")
    put(directory.store("f" * 32, {}), "c")
    keys = content_keys(["a", "b", "c"])
    assert directory.store(DIGEST, {}).missing(keys).tolist() == [1, 2]
    assert directory.store(DIGEST, {}, torch.float16).missing(keys).tolist() == [0, 2]
    assert directory.store(DIGEST, {}, torch.bfloat16).missing(keys).tolist() == [0, 1, 2]
    assert directory.store("f" * 32, {}).missing(keys).tolist() == [0, 1]
    assert sorted(path.name for path in (tmp_path / "encoders").iterdir()) == [DIGEST, f"{DIGEST}-float16", "f" * 32]


def test_manifests_tell_what_is_there_and_pass_over_the_damaged(tmp_path):
    directory = CacheDirectory(tmp_path)
    put(directory.store(DIGEST, {"pooling": "mean"}), "a")
    put(directory.store("f" * 32, {"pooling": "cls"}), "a")
    put(directory.store("e" * 32, {}), "a")
    (tmp_path / "encoders" / ("e" * 32) / "manifest.json").write_text("{")
    (tmp_path / "encoders" / "notes.txt").write_text("mine")
    (tmp_path / "encoders" / "empty").mkdir()
    manifests = list(directory.manifests())
    assert [manifest.facts["pooling"] for manifest in manifests] == ["mean", "cls"]
    assert manifests[0].environment == environment()


@pytest.mark.parametrize("digest", ["../elsewhere", "/etc", "a/b", "", "..", "a\0", "a b"])
def test_digest_that_could_lead_elsewhere_is_refused(tmp_path, digest):
    with pytest.raises(StoreError, match="is not a digest; identities are 32 hexadecimal characters"):
        CacheDirectory(tmp_path).store(digest, {})


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert CacheDirectory("~/cache").path == tmp_path / "cache"


def test_tables_are_kept_beside_the_rows(tmp_path):
    directory = CacheDirectory(tmp_path)
    keys = content_keys(["a", "b"]).reshape(2, 1, 2)
    path = directory.write_table(DatasetTable({"text": keys}, None, "group"))
    assert path.parent == tmp_path / "datasets"
    (table,) = directory.tables(["text"])
    assert (table.keys["text"] == keys).all()


def test_environment_names_hardware_and_libraries():
    known = environment()
    assert {"hardware", "torch", "numpy"} <= known.keys()
    assert known["torch"] and all(isinstance(value, str) for value in known.values())


def test_unwritable_directory_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "taken").write_text("")
    named = r"cannot write into save_dir .*taken.*leads through a file; name another save_dir"
    with pytest.raises(StoreError, match=named), filling(tmp_path / "taken" / "below"):
        raise AssertionError("the fill must not start")
    with pytest.raises(StoreError, match=r"save_dir .*taken is a file; name a directory"), filling(tmp_path / "taken"):
        raise AssertionError("the fill must not start")


def test_one_process_fills_while_others_wait_and_say_so(tmp_path, caplog):
    inside, release, order = threading.Event(), threading.Event(), []
    waits = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record):
            order.append(record.getMessage())
            waits.set()

    def first():
        with filling(tmp_path):
            inside.set()
            release.wait(30)
            order.append("first done")

    def second():
        with filling(tmp_path):
            order.append("second")

    logger, listener = logging.getLogger("quatcache.store.directory"), Listener(logging.INFO)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    try:
        threads = [threading.Thread(target=first), threading.Thread(target=second)]
        threads[0].start()
        assert inside.wait(30)
        threads[1].start()
        assert waits.wait(30)
        release.set()
        for thread in threads:
            thread.join(30)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    waiting = f"Another process is filling {tmp_path / 'encoders' / DIGEST}: waiting for its rows (0 so far)."
    assert order == [waiting, "first done", "second"]


def test_directory_with_other_files_is_used_and_told(tmp_path, caplog):
    (tmp_path / "thesis.tex").write_text("mine")
    with caplog.at_level("INFO", "quatcache"):
        for _ in range(2):
            with filling(tmp_path):
                pass
        with filling(tmp_path / "fresh"):
            pass
    (message,) = caplog.messages
    assert message == f"save_dir {tmp_path} holds other files; encoders/ and datasets/ are put beside them."


def test_fills_of_other_encoders_do_not_wait(tmp_path):
    with filling(tmp_path), filling(tmp_path, "f" * 32):
        pass


def test_fills_of_several_encoders_take_them_in_one_order(tmp_path, monkeypatch):
    taken = []
    directory = CacheDirectory(tmp_path)
    monkeypatch.setattr(CacheDirectory, "_acquire", lambda self, lock, directory: taken.append(directory.name))
    stores = [directory.store(digest, {}) for digest in ("b" * 32, "a" * 32, "b" * 32, "c" * 32)]
    with directory.filling(stores):
        assert taken == ["a" * 32, "b" * 32, "c" * 32]


def test_waiting_is_told_again_with_the_rows_that_are_there(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("quatcache.store.directory.SECONDS_BETWEEN_MESSAGES", 0.01)
    store = CacheDirectory(tmp_path).store(DIGEST, {})
    real, messages = logging.Logger.info, []

    with filling(tmp_path) as _, monkeypatch.context() as patched:

        def info(logger, text, *args):
            messages.append(text % args)
            if len(messages) == 1:
                put(store, "a", "b")
            if len(messages) == 2:
                raise KeyboardInterrupt

        patched.setattr(logging.Logger, "info", info)
        with pytest.raises(KeyboardInterrupt), filling(tmp_path):
            raise AssertionError("two processes fill")
    assert real is logging.Logger.info
    assert [text.rpartition("(")[2] for text in messages] == ["0 so far).", "2 so far)."]


def test_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), filling(tmp_path):
        raise KeyboardInterrupt
    with filling(tmp_path):
        pass


def test_error_of_the_fill_itself_is_not_taken_for_one_of_the_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="an image"), filling(tmp_path):
        raise FileNotFoundError("an image of the dataset")


def test_killed_fill_does_not_block_the_next(tmp_path):
    code = (
        "import os, signal, sys; from quatcache.store import CacheDirectory; d = CacheDirectory(sys.argv[1])\n"
        "with d.filling([d.store(sys.argv[2], {})]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), DIGEST], env={"PYTHONPATH": ":".join(sys.path)})
    assert killed.returncode < 0 and list(tmp_path.glob("encoders/*/.fill.lock"))
    with filling(tmp_path):
        pass
