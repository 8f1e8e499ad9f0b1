"""Safetensors files, written piece by piece: what safetensors reads, hashed and flushed on the way."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from quatcache.errors import StoreError
from quatcache.store import safetensors_writer
from quatcache.store.files import checksum, write_tensors
from quatcache.store.safetensors_writer import DTYPES, write_safetensors


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(safetensors_writer, "PIECE_BYTES", 7)  # not a multiple of any element
    monkeypatch.setattr(safetensors_writer, "FLUSH_BYTES", 20)


def test_pieces_make_the_file_that_safetensors_reads(tmp_path, small_pieces):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randint(0, 2, (5, 3), generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"none": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    path = tmp_path / "x.safetensors"
    with path.open("xb") as file:
        written = write_safetensors(file, tensors, {"note": 'ü "quoted"'})
    assert written == (path.stat().st_size, xxh3_128_hexdigest(path.read_bytes()))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": 'ü "quoted"'}


def test_every_tensor_begins_at_a_multiple_of_its_elements(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5, dtype=torch.float64)})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert size % 8 == 0 and header["b"]["data_offsets"] == [0, 40] and header["a"]["data_offsets"] == [40, 43]


def test_what_was_written_is_what_its_checksum_says(tmp_path, small_pieces):
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, {"keys": torch.arange(40), "values": torch.randn(20, 3)}, {"a": "b"})
    assert written == (path.stat().st_size, checksum(path))


def test_the_device_gets_pieces_while_others_are_written_and_the_last_before_the_rename(
    tmp_path, small_pieces, monkeypatch
):
    path, flushed, fsync = tmp_path / "x.safetensors", [], os.fsync

    def recorded(descriptor):
        fsync(descriptor)
        flushed.append((threading.current_thread() is threading.main_thread(), path.exists()))

    monkeypatch.setattr(os, "fsync", recorded)
    write_tensors(path, {"a": torch.arange(1000)})
    assert flushed[0] == (False, False)
    assert flushed[-2:] == [(True, False), (True, True)]  # the file as a whole, and the directory after the rename


def test_an_error_that_only_an_early_flush_is_told_fails_the_file(tmp_path, small_pieces, monkeypatch):
    fsync = os.fsync

    def fails_once(descriptor):  # so does Linux: a lost page is reported to the first who asks
        if threading.current_thread() is not threading.main_thread() and not failed:
            failed.append(True)
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    failed = []
    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(StoreError, match="Input/output error"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(1000)})
    assert failed and list(tmp_path.iterdir()) == []


def test_without_a_further_thread_the_file_is_flushed_at_the_end(tmp_path, small_pieces, monkeypatch):
    def refuses(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(safetensors_writer.ThreadPoolExecutor, "submit", refuses)
    write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(1000)})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.arange(1000))


def test_a_dtype_that_no_reader_takes_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"a has dtype torch\.complex64; a cache stores float64, .*bool\."):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
