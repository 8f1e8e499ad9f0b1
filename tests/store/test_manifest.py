"""The manifest: written and read back whole; whatever else it says is refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from quatcache.errors import FormatError, StoreError
from quatcache.store.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from quatcache.store.shards import RowKind, ShardEntry
from tests.stores_for_tests import sealed

SHARD = ShardEntry("shard-0123456789abcdef.safetensors", rows=3, bytes=100, xxh3="0" * 32)
OTHER = ShardEntry("shard-fedcba9876543210.safetensors", rows=1, bytes=100, xxh3="0" * 32)
ONE = {"file": SHARD.file, "rows": 3, "bytes": 100, "xxh3": "0" * 32}
FULL = Manifest("d" * 32, {"pooling": "mean", "layers": [1, 2]}, {"torch": "2.13"}).with_shard(
    SHARD, RowKind((4, 2), torch.bfloat16, torch.float32)
)


@pytest.fixture
def content(tmp_path):
    FULL.write(tmp_path)
    return json.loads((tmp_path / MANIFEST_NAME).read_text())


def read(directory, content):
    (directory / MANIFEST_NAME).write_text(content if isinstance(content, str) else json.dumps(sealed(content)))
    return Manifest.read(directory)


def test_manifest_is_read_back_as_written(tmp_path):
    FULL.write(tmp_path)
    assert Manifest.read(tmp_path) == FULL
    assert FULL.rows == 3 and FULL.created.endswith("+00:00")


def test_empty_manifest_is_read_back_as_written(tmp_path):
    empty = Manifest("d" * 32, {}, {})
    empty.write(tmp_path)
    assert Manifest.read(tmp_path) == empty and empty.rows == 0


@pytest.mark.parametrize("shape", [(), (0,), (384,), (3, 224, 224)], ids=str)
def test_any_row_shape_is_read_back(tmp_path, shape):
    Manifest("d" * 32, {}, {}).with_shard(SHARD, RowKind(shape, torch.int64, torch.int64)).write(tmp_path)
    assert Manifest.read(tmp_path).row_shape == shape


def test_no_manifest_is_none(tmp_path):
    assert Manifest.read(tmp_path) is None
    assert Manifest.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "other",
    [
        ((4, 3), torch.bfloat16, torch.float32),
        ((4, 2), torch.float16, torch.float32),
        ((4, 2), torch.bfloat16, torch.float64),
    ],
    ids=["shape", "dtype", "given-dtype"],
)
def test_shard_of_other_rows_is_refused(other):
    with pytest.raises(FormatError, match=f"encoder {'d' * 32} holds RowKind.* delete its directory"):
        FULL.with_shard(OTHER, RowKind(*other))


def test_dropped_shards_are_gone_and_make_room_for_other_rows():
    assert FULL.without({"another"}) == FULL
    emptied = FULL.without({SHARD.file})
    assert emptied.shards == () and emptied.facts == FULL.facts
    assert emptied.with_shard(SHARD, RowKind((9,), torch.float32, torch.float32)).row_shape == (9,)


def test_unknown_entries_of_the_same_version_are_ignored(tmp_path, content):
    content["note"] = "added by a later release"
    assert read(tmp_path, content) == FULL


def test_newer_version_is_refused_with_the_remedy(tmp_path, content):
    content["version"] = FORMAT_VERSION + 1
    content["shards"] = "whatever a newer version writes"
    with pytest.raises(FormatError, match=rf"version {FORMAT_VERSION + 1}, .* up to {FORMAT_VERSION}; upgrade"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "change",
    [{"version": "1"}, {"version": None}, {"version": True}, {"version": 0}, {"version": 1.0}, {"format": "other"}],
    ids=str,
)
def test_file_of_another_kind_is_refused(tmp_path, content, change):
    with pytest.raises(FormatError, match="is not a quatcache manifest"):
        read(tmp_path, content | change)


@pytest.mark.parametrize(
    "name",
    [
        "../shard-0123456789abcdef.safetensors",
        "/etc/passwd",
        "shard-0123456789abcdef.safetensors/../../x",
        "sub/shard-0123456789abcdef.safetensors",
        "..",
        "",
        "shard-0123456789abcdef.safetensors\n",
        "shard-0123456789abcdef.safetensors\0",
        "shard-0123456789ABCDEF.safetensors",
        "shard-0123456789abcdef.pt",
        "manifest.json",
        17,
        None,
    ],
)
def test_shard_name_that_could_lead_elsewhere_is_refused(tmp_path, content, name):
    content["shards"][0]["file"] = name
    with pytest.raises(FormatError, match=r"manifest.json is damaged .* made again when the cache is next used"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": None}, {"identity": {"digest": "d"}}, {"identity": {"digest": "d", "facts": "text"}},
        {"environment": []}, {"environment": 3},
        {"row_shape": 384}, {"row_shape": "384"}, {"row_shape": [-1]}, {"row_shape": [1.0]}, {"row_shape": [True]},
        {"row_shape": [2**62]}, {"row_shape": [None]}, {"row_shape": None},
        {"dtype": "torch.float32"}, {"dtype": "os.system"}, {"dtype": 3}, {"dtype": ["float32"]}, {"dtype": None},
        {"given_dtype": "int64"}, {"given_dtype": "bool"}, {"given_dtype": None}, {"dtype": "int64"},
        {"shards": None}, {"shards": {"a": 1}}, {"shards": [[]]}, {"shards": ["shard"]}, {"shards": [{}]},
        {"shards": [ONE | {"rows": -1}]}, {"shards": [ONE | {"rows": 2**63}]}, {"shards": [ONE | {"rows": "3"}]},
        {"shards": [ONE | {"bytes": 1.5}]}, {"shards": [ONE | {"bytes": False}]}, {"shards": [ONE | {"xxh3": 7}]},
    ],
    ids=lambda change: json.dumps(change)[-50:],
)  # fmt: skip
def test_values_of_wrong_types_and_sizes_are_refused(tmp_path, content, change):
    with pytest.raises(FormatError, match="damaged"):
        read(tmp_path, content | change)


@pytest.mark.parametrize(
    "missing", ["identity", "environment", "row_shape", "dtype", "given_dtype", "shards", "created"]
)
def test_missing_entries_are_refused(tmp_path, content, missing):
    del content[missing]
    with pytest.raises(FormatError, match=f"damaged .*{missing}"):
        read(tmp_path, content)


@pytest.mark.parametrize("change", [{"given_dtype": "float64"}, {"environment": {}}, {"note": 1}, {"xxh3": "0" * 32}])
def test_an_entry_that_was_changed_by_hand_or_by_a_flipped_bit_is_refused(tmp_path, content, change):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content | change))
    with pytest.raises(FormatError, match=r"damaged .*does not match its checksum"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", '{"format": NaN}'],
    ids=["empty", "cut", "list", "null", "number", "deep", "long-number", "nan"],
)
def test_text_that_is_no_manifest_is_refused(tmp_path, text):
    with pytest.raises(FormatError, match=r"manifest\.json"):
        read(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="damaged"):
        Manifest.read(tmp_path)


def test_directory_in_its_place_is_a_store_error(tmp_path):
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*manifest\.json: Is a directory; permit reading"):
        Manifest.read(tmp_path)
