"""Values that outlive the process: found by the next one, computed once in all of them, never stale, never code."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from quatcache import BatchFunctionError, memoize_batch
from quatcache.errors import ConfigError, StoreError
from quatcache.memoize.stored import StoredValues
from quatcache.store import CacheDirectory, DiskStore, Found
from quatcache.store.files import FILL_LOCK

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("hammering.py")


def upper(batch, suffix=""):
    CALLS.append(list(batch))
    return [{"text": item.upper() + suffix, "size": len(item) / 3} for item in batch]


def as_array(batch):
    CALLS.append(list(batch))
    return np.array([[len(item), 0.5] for item in batch], np.float16)


def as_arrays(batch):
    CALLS.append(list(batch))
    return [np.full(3, len(item)) for item in batch]


def as_tensor(batch):
    CALLS.append(list(batch))
    return torch.tensor([[len(item), 0.5] for item in batch], dtype=torch.bfloat16)


def as_tensors(batch):
    CALLS.append(list(batch))
    return [torch.full((2, 2), len(item)) for item in batch]


def as_numbers(batch):
    CALLS.append(list(batch))
    return np.array([len(item) for item in batch])


CALLS: list = []


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def stored(function, folder, version="1", **settings):
    """The function as a new process has it."""
    return memoize_batch("batch", save_dir=folder, version=version, **settings)(function)


def plain(answer):
    whole = answer.float() if isinstance(answer, torch.Tensor) else answer
    return [plain(one) for one in whole] if isinstance(whole, list) else getattr(whole, "tolist", lambda: whole)()


@pytest.mark.parametrize("function", [upper, as_array, as_arrays, as_tensor, as_tensors, as_numbers])
def test_next_process_finds_what_was_computed_as_it_was(function, tmp_path):
    first = stored(function, tmp_path)(["oak", "elms", "oak"])
    again = stored(function, tmp_path)
    found = again(["elms", "oak"])
    assert CALLS == [["oak", "elms"]]
    assert type(found) is type(first) and plain(found) == plain(function(["elms", "oak"]))
    assert getattr(found, "dtype", None) == getattr(first, "dtype", None)
    if isinstance(found, list):
        assert [type(one) for one in found] == [type(one) for one in first[:2]]
    assert again.cache_info() == (2, 0, None, 2)
    assert again(["oak", "ash"])[1:] is not None and CALLS[-1] == ["ash"]


@pytest.mark.parametrize("value", ["", "ü \ud800", 3, 2.5, True, None, [], {}, [1, [2, {"a": None}]], float("inf")])
def test_json_values_come_back_as_they_were(value, tmp_path):
    stored(lambda_free(value), tmp_path)(["a"])
    (found,) = stored(lambda_free(value), tmp_path)(["a"])
    assert found == value and type(found) is type(value)


def lambda_free(value):
    def one_value(batch):
        CALLS.append(batch)
        return [value for _ in batch]

    one_value.__qualname__ = "one_value"
    return one_value


def test_version_and_other_arguments_decide(tmp_path):
    stored(upper, tmp_path)(["a"])
    stored(upper, tmp_path, version="2")(["a"])
    stored(upper, tmp_path)(["a"], suffix="!")
    assert CALLS == [["a"]] * 3
    assert (
        stored(upper, tmp_path)(["a"], "!")[0]["text"] == "A!" and stored(upper, tmp_path)(["a"], "")[0]["text"] == "A"
    )
    assert len(CALLS) == 3


def test_item_types_are_told_apart(tmp_path):
    def named(batch):
        return [repr(item) for item in batch]

    named.__qualname__ = "named"
    asked = [1, 1.0, True, "1", (1,), [1]]
    assert stored(named, tmp_path)(asked) == stored(named, tmp_path)(asked) == list(map(repr, asked))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((1, 2), "holds a tuple"),
        ({1: 2}, "holds a dict"),
        (np.float32(1), "holds a float32"),
        ({"a": {1}}, "holds a set"),
    ],
)
def test_what_would_come_back_as_something_else_is_refused(value, said, tmp_path):
    function = stored(lambda_free(value), tmp_path)
    with pytest.raises(BatchFunctionError, match=said):
        function(["a"])
    assert function.cache_info().currsize == 0


def test_arrays_of_several_shapes_are_refused_and_name_the_function(tmp_path):
    def growing(batch):
        return [np.zeros(len(item)) for item in batch]

    growing.__qualname__ = "growing"
    with pytest.raises(BatchFunctionError, match=r"growing returned .* cannot be stored as a list of arrays"):
        stored(growing, tmp_path)(["a", "ab"])


def test_finished_batches_are_stored_when_a_later_one_fails(tmp_path):
    def fails(batch):
        CALLS.append(batch)
        if "c" in batch:
            raise RuntimeError("boom")
        return list(batch)

    fails.__qualname__ = "fails"
    with pytest.raises(RuntimeError):
        stored(fails, tmp_path, batch_size=2)(["a", "b", "c"])
    assert stored(fails, tmp_path)(["b", "a"]) == ["b", "a"]
    assert CALLS == [["a", "b"], ["c"]]


def test_peek_reads_what_is_stored(tmp_path):
    stored(upper, tmp_path)(["a"])
    function = stored(upper, tmp_path)
    assert function.cache_peek(["b", "a"]) == {1: {"text": "A", "size": 1 / 3}}
    assert function.cache_info().hits == 0


def test_many_commits_are_packed(tmp_path):
    function = stored(upper, tmp_path)
    for number in range(70):
        function([str(number)])
    assert len(list(tmp_path.glob("encoders/*/shard-*"))) < 66
    assert len(stored(upper, tmp_path)([str(number) for number in range(70)])) == 70 and len(CALLS) == 70


def test_damaged_values_are_computed_again(tmp_path):
    stored(upper, tmp_path)(["a"])
    (shard,) = tmp_path.glob("encoders/*/shard-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert stored(upper, tmp_path)(["a"])[0]["text"] == "A" and len(CALLS) == 2


def test_lost_manifest_is_no_stale_value(tmp_path):
    stored(upper, tmp_path)(["a"])
    (manifest,) = tmp_path.glob("encoders/*/manifest.json")
    manifest.unlink()
    assert stored(upper, tmp_path)(["a"]) == [{"text": "A", "size": 1 / 3}]


def test_threads_of_one_process_share_the_lock(tmp_path):
    function = stored(upper, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        asked = [[str(number + shift) for number in range(5)] for shift in range(4)]
        for batch, answer in zip(asked, pool.map(function, asked), strict=True):
            assert [one["text"] for one in answer] == batch
    assert sorted(item for batch in CALLS for item in batch) == sorted(map(str, range(8)))


async def tasks(batch):
    CALLS.append(list(batch))
    await asyncio.sleep(0)
    return [item.upper() for item in batch]


def test_async_function_is_stored(tmp_path):
    async def main():
        function = stored(tasks, tmp_path)
        return await asyncio.gather(function(["a", "b"]), function(["b", "c"]))

    assert asyncio.run(main()) == [["A", "B"], ["B", "C"]]
    assert asyncio.run(stored(tasks, tmp_path)(["c", "a"])) == ["C", "A"]
    assert sorted(item for batch in CALLS for item in batch) == ["a", "b", "c"]


def test_directory_that_cannot_be_written_serves_what_it_has(tmp_path):
    stored(upper, tmp_path / "cache")(["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file; name a directory"):
        stored(upper, tmp_path / "file")(["a"])
    assert CALLS == [["a"]]  # refused before it is computed


# what is refused when it is decorated


class Model:
    def predict(self, batch):
        return batch


@pytest.mark.parametrize(
    ("function", "settings", "said"),
    [
        (upper, {"version": None}, "version is None, and save_dir keeps what .*upper returns beyond this process"),
        (upper, {"version": ""}, "version is ''"),
        (lambda batch: batch, {}, "no name that another process would know it by"),
        (upper, {"maxsize": 3}, "keeps every value, so maxsize, max_bytes and ttl have no place"),
        (upper, {"ttl": 3.0}, "have no place"),
    ],
)
def test_what_cannot_be_stored_is_refused(function, settings, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        stored(function, tmp_path, **settings)


def test_version_without_a_directory_is_refused():
    with pytest.raises(ConfigError, match="give both or neither"):
        memoize_batch("batch", version="1")(upper)


def test_methods_are_refused(tmp_path):
    class Stored:
        predict = stored(Model.predict, tmp_path)

    with pytest.raises(ConfigError, match="is a method, and save_dir cannot tell its instances"):
        Stored().predict([1])


def test_clearing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give another version, or delete that directory"):
        stored(upper, tmp_path).cache_clear()


def test_argument_without_content_is_refused(tmp_path):
    with pytest.raises(BatchFunctionError, match=r"of its other arguments \(suffix\) one has no content"):
        stored(upper, tmp_path)(["a"], suffix=Model())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([np.zeros(2), [0, 0]], "beside it is a list; return only such values"),
        ([np.zeros(2), torch.zeros(2)], "beside it is a Tensor"),
        ([np.zeros(2, np.float32), np.zeros(2)], "dtypes float32, float64; return one dtype"),
        ([torch.zeros(2), torch.zeros(2).double()], r"dtypes torch.float32, torch.float64"),
        (np.zeros(2, np.uint16), "its dtype is torch.uint16; return one of float64"),
        (torch.zeros(2, dtype=torch.complex64), "its dtype is torch.complex64"),
        ([10**5000, 1], "which cannot be stored as a list of json"),
        ([np.zeros(2), np.zeros(3)], "must have the same shape"),
    ],
)
def test_values_that_would_come_back_otherwise_are_refused(values, said, tmp_path):
    def all_of_them(batch):
        return values

    all_of_them.__qualname__ = "all_of_them"
    function = stored(all_of_them, tmp_path)
    with pytest.raises(BatchFunctionError, match=said):
        function(["a", "b"])
    assert function.cache_info().currsize == 0 and not list(tmp_path.glob("encoders/*/shard-*"))


def test_values_that_are_there_are_not_written_again(tmp_path):
    values = StoredValues(CacheDirectory(tmp_path), {"class": "module.function", "version": "1"})
    values.kind = list
    with values.alone():
        for new in (2, 3):
            values.put_many([(1, new), (1, 1)], ["new", "known"])
    assert [row.rows for row in values._rows.manifest.shards] == [2, 1]


def test_one_long_value_does_not_make_all_others_as_long(tmp_path, monkeypatch):
    widths, put, get = [], DiskStore.put_many, DiskStore.get_many

    def noted(sequences):
        widths.append(sequences.mask.numel())
        return sequences

    monkeypatch.setattr(DiskStore, "put_many", lambda store, keys, values: put(store, keys, noted(values)))
    monkeypatch.setattr(
        DiskStore, "get_many", lambda store, keys: Found((found := get(store, keys)).positions, noted(found.values))
    )

    def repeated(batch):
        return ["x" * item for item in batch]

    repeated.__qualname__ = "repeated"
    asked = [*range(150), 5000, *range(150, 300)]
    assert stored(repeated, tmp_path)(asked) == repeated(asked) == stored(repeated, tmp_path)(asked)
    more = [*asked[::-1], 1000, *asked]
    assert stored(repeated, tmp_path)(more) == repeated(more)
    assert max(widths) <= 32 * 5002 and len(widths) > 20


def test_async_function_needs_no_thread_of_the_loop_and_gives_its_turn_back(tmp_path):
    async def main():
        busy = ThreadPoolExecutor(1)
        opened = threading.Event()
        busy.submit(opened.wait, 20)
        asyncio.get_running_loop().set_default_executor(busy)
        try:
            return await asyncio.wait_for(stored(tasks, tmp_path)(["a"]), 20)
        finally:
            opened.set()

    assert asyncio.run(main()) == ["A"]
    (lock,) = tmp_path.glob(f"encoders/*/{FILL_LOCK}")
    with FileLock(lock, timeout=0):
        pass


# processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_four_processes_compute_each_key_once_in_all(kind, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "cache"), kind]
    running = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True, cwd=ROOT) for seed in range(4)
    ]
    computed: list[int] = []
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found = json.loads(output)
        assert len(found) == len(set(found))  # once in each process
        computed += found
    assert sorted(computed) == list(range(300))
