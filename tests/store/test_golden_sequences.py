"""Version 2 of the format, held to its words: sequences written once are read by every later version.

``golden/version-2`` was written by ``golden/make.py``. Half of these tests read it with this package, the other half
with JSON and safetensors alone, as FORMAT.md says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quatcache.keys import content_keys
from quatcache.store import CacheDirectory, DiskStore
from tests.store.golden import make
from tests.store.test_golden import digest_of_content, entry_of, header, quoted, read, rows_of_tables, seal

GOLDEN = Path(__file__).parent / "golden" / "version-2"
SPELT = [*make.TEXTS, ""]
SEQUENCES = {  # directory: items, their sequences as lists, dtype
    "5" * 32: (SPELT, [[[ord(c) / 8, i / 8] for i, c in enumerate(text)] for text in SPELT], torch.float32),
    "6" * 32: (
        SPELT,
        [[[torch.tensor(ord(c) / 8).bfloat16().item(), i / 8] for i, c in enumerate(text)] for text in SPELT],
        torch.bfloat16,
    ),
    "7" * 32: (SPELT, [[1] * len(text) for text in SPELT], torch.int64),
    "9" * 32: (
        [str(number) for number in range(8)],
        [
            [[torch.tensor((4.0 * row + step) / 7).item()] for step in range(min(row + 1, 4))] for row in range(8)
        ],
        torch.float32,
    ),
}  # fmt: skip


@pytest.fixture
def golden(tmp_path):
    """A copy of the golden directory, to be used as a run uses it."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


@pytest.fixture(scope="module", params=["golden", "written today"])
def root(request, tmp_path_factory):
    """The golden directory, and one with the same content that was written just now."""
    if request.param == "golden":
        return GOLDEN
    written = tmp_path_factory.mktemp("written")
    make.write_sequences(written)
    return written


def lists_of(sequences):
    return [row[mask].tolist() for row, mask in zip(sequences.values, sequences.mask, strict=True)]


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize("name", SEQUENCES)
def test_every_store_gives_the_sequences_that_were_put(golden, name, memory_map, caplog):
    items, expected, dtype = SEQUENCES[name]
    store = CacheDirectory(golden, memory_map=memory_map).store(name, {})
    for rows in (store, store.load()):
        found = rows.get_many(content_keys([*reversed(items), "never seen"]))
        assert found.positions.tolist() == list(range(len(items)))
        assert found.values.dtype == dtype
        assert lists_of(found.values) == expected[::-1]
        assert found.values.shape[1] == max(map(len, expected)) and not found.values.values[~found.values.mask].any()
    assert not caplog.records
    assert {path.name: path.read_bytes() for path in golden.rglob("*.*")} == {
        path.name: path.read_bytes() for path in GOLDEN.rglob("*.*")
    }


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_manifest_that_is_lost_is_made_again_from_its_shards(golden, name):
    items, expected, _ = SEQUENCES[name]
    (golden / "encoders" / name / "manifest.json").unlink()
    store = DiskStore(golden / "encoders" / name, name)
    assert lists_of(store.get_many(content_keys(items)).values) == expected
    made, before = (read(path / "encoders" / name / "manifest.json") for path in (golden, GOLDEN))
    for field in ("version", "row_shape", "dtype", "given_dtype", "shards"):
        assert made[field] == before[field]


def test_what_stands_in_the_manifests_is_what_the_section_on_sequences_says(root):
    for name, (_, expected, _) in SEQUENCES.items():
        content = read(root / "encoders" / name / "manifest.json")
        assert content["version"] == 2 and content["xxh3"] == seal(content)
        assert content["row_shape"] == [None, *torch.tensor(expected[1]).shape[1:]]
        (entry,) = content["shards"]
        shard = root / "encoders" / name / entry["file"]
        assert entry == {**entry_of(shard, len(expected)), "longest": max(map(len, expected))}


def test_shards_are_read_without_quatcache(root):
    described = {quoted(row[0])[0]: row[1:3] for row in rows_of_tables("Sequences") if len(row) == 4}
    assert described == {
        "keys": ["int64", "`(rows, 2)`"],
        "offsets": ["int64", "`(rows + 1,)`"],
        "values": ["`dtype` of the manifest", "`(elements, *row_shape[1:])`"],
    }
    for name, (items, expected, dtype) in SEQUENCES.items():
        (shard,) = (root / "encoders" / name).glob("shard-*")
        tensors = load_file(shard)
        assert set(tensors) == set(described)
        with safe_open(shard, "pt") as file:
            about = file.metadata()
        assert (about["quatcache"], about["identity"]) == ("sequences", name)
        own = about.pop("xxh3")
        if dtype is not torch.bool:
            assert own == digest_of_content(shard, about)
        keys = content_keys(items).tolist()
        offsets = tensors["offsets"].tolist()
        assert offsets[0] == 0 and offsets[-1] == len(tensors["values"]) == sum(map(len, expected))
        for place, key in enumerate(tensors["keys"].tolist()):
            elements = tensors["values"][offsets[place] : offsets[place + 1]]
            assert elements.tolist() == expected[keys.index(key)]
        assert header(shard)["values"]["shape"] == [offsets[-1], *read(shard.parent / "manifest.json")["row_shape"][1:]]


def test_rows_of_one_shape_are_written_as_version_1(tmp_path):
    make.put(tmp_path, "1" * 32, make.TEXTS, torch.ones(5, 2, 3))
    content = json.loads((tmp_path / "encoders" / ("1" * 32) / "manifest.json").read_text())
    assert content["version"] == 1 and content["row_shape"] == [2, 3] and "longest" not in content["shards"][0]
