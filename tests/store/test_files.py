"""Files: wholly there or not at all, and never mapped before they were found sound."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from quatcache.errors import FormatError, StoreError
from quatcache.store import files
from quatcache.store.files import checksum, open_tensors, read_json, write_json, write_tensors
from quatcache.store.safetensors_writer import DTYPES, tensor_bytes


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"turned": torch.arange(6.0).reshape(2, 3).t(), "empty": torch.empty(0, 3), "single": torch.tensor(2.0)}
    write_tensors(path, tensors, {"note": "ü"})
    read, metadata = open_tensors(path, path.stat().st_size)
    assert metadata == {"note": "ü"} and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_tensors_that_share_memory_are_written_each(tmp_path):
    whole = torch.arange(6)
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"whole": whole, "again": whole, "part": whole[2:4]})
    assert {name: tensor.tolist() for name, tensor in open_tensors(path)[0].items()} == {
        "whole": whole.tolist(),
        "again": whole.tolist(),
        "part": [2, 3],
    }


def test_json_comes_back_and_replaces_the_old(tmp_path):
    path = tmp_path / "m.json"
    write_json(path, {"b": 1, "a": "ü"})
    write_json(path, {"a": [None, 2.5]})
    assert read_json(path) == {"a": [None, 2.5]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.json"]


def test_json_writes_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "m.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(2)})

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr(files, "write_safetensors", fails)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    else:
        monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(
        StoreError, match=r"cannot write .*x\.safetensors: No space left on device; free space .* kept\."
    ):
        write_tensors(path, {"a": torch.ones(2)})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    assert open_tensors(path)[0]["a"].tolist() == [0.0, 0.0]


def test_read_only_file_system_is_a_store_error(tmp_path, monkeypatch):
    def refuses(*args, **kwargs):  # such a file system refuses to unlink even what is not there
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuses)
    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(StoreError, match="Read-only file system; free space or permit writing"):
        write_json(tmp_path / "m.json", {})


def test_file_in_place_of_the_directory_is_a_store_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_tensors(tmp_path / "taken" / "x.safetensors", {"a": torch.ones(1)})


def test_file_and_directory_are_flushed_in_order_around_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor):
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(self, target):
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    write_json(tmp_path / "m.json", {})
    assert events == ["file", "rename", "directory"] * 2


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_are_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
        write_json(tmp_path / "m.json", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "[:12]])
def test_what_is_no_safetensors_file_is_a_format_error(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.safetensors is damaged"):
        open_tensors(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "EVIL", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
    ],
    ids=str,
)
def test_crafted_header_is_a_format_error(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(FormatError, match="is damaged"):
        open_tensors(path)


def test_other_size_than_recorded_is_a_format_error(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1)})
    size = path.stat().st_size
    with pytest.raises(FormatError, match=f"has {size} bytes instead of {size + 1}; delete it"):
        open_tensors(path, size + 1)


def test_missing_file_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="is missing"):
        open_tensors(tmp_path / "x.safetensors")


def test_missing_json_is_left_to_the_caller(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "m.json")


def test_checksum_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "x"
    content = bytes(range(256)) * 70_000  # more than one block
    path.write_bytes(content)
    assert checksum(path) == xxh3_128_hexdigest(content)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor(1.5),
        torch.arange(10.0).reshape(2, 5)[:1, 3],
        torch.empty(0, 3),
        torch.ones(2).bfloat16(),
        torch.tensor([True, False]),
        torch.ones(3, requires_grad=True),
        torch.arange(10)[4:6],
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_bytes_of_a_tensor_are_those_of_its_elements_in_order(tensor):
    plain = tensor.detach().contiguous().clone(memory_format=torch.contiguous_format)
    expected = plain.reshape(-1).clone().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    assert bytes(tensor_bytes(tensor)) == expected
