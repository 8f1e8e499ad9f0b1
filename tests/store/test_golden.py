"""The format, held to its words: a directory written once is read by every later version, and by others without us.

``golden/version-1`` was written by ``golden/make.py``. Half of these tests read it with this package, the other half
with xxhash, JSON and safetensors alone, as FORMAT.md says.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import nn

import quatcache.store
from quatcache.keys import content_keys, extracted_keys
from quatcache.losses import MultipleNegativesRankingLoss
from quatcache.store import CacheDirectory, DiskStore
from quatcache.store.manifest import FORMAT_VERSION
from quatcache.store.safetensors_writer import DTYPES
from tests.store.golden import make

GOLDEN = Path(__file__).parent / "golden" / "version-1"
FORMAT = (Path(quatcache.store.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")

LETTERS = "6f02a160f65f6bac608bbea37d59b971"  # identity of tests.store.golden.make.Letters; it must not change
ROWS = torch.tensor(  # length, first and last code point, times the weights
    [
        [2.5, 24.25, 14.25],
        [2.5, 24.5, 13.0],
        [2.5, 17.75, 12.625],
        [4.0, 27.5, 2517.5],
        [1.5, 25.25, 13.625],
    ]
)
THIRDS = torch.tensor(  # of the same letters, as bfloat16 has them
    [
        [1.6640625, 32.25, 38.0],
        [1.6640625, 32.75, 34.75],
        [1.6640625, 23.625, 33.75],
        [2.671875, 36.75, 6720.0],
        [1.0, 33.75, 36.25],
    ]
)


def whole_numbers():
    return torch.tensor([[len(text), ord(text[0]), ord(text[-1])] for text in make.TEXTS]) * -1_099_511_627_776


STORES = {  # directory: items, rows, storage dtype, dtype of look-ups
    LETTERS: (make.TEXTS, ROWS, "float32", "float32"),
    f"{LETTERS}-float16": (make.TEXTS, ROWS.to(torch.float16).to(torch.float32), "float16", "float32"),
    "b" * 32: (make.TEXTS, THIRDS.to(torch.bfloat16), "bfloat16", "bfloat16"),
    "1" * 32: (make.TEXTS, whole_numbers(), "int64", "int64"),
    "2" * 32: (make.ITEMS, torch.arange(36.0).reshape(6, 2, 3) / 7, "float32", "float32"),
    "8" * 32: ([str(number) for number in range(8)], torch.arange(8.0)[:, None] / 7, "float32", "float32"),
}


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
    make.write(written)
    return written


def shards(root):
    return sorted(root.glob("encoders/*/shard-*.safetensors"))


def manifests(root):
    return sorted(root.glob("encoders/*/manifest.json"))


def tables(root):
    return sorted(root.glob("datasets/*.safetensors"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# --- what this package makes of it ---


def test_there_is_a_golden_directory_for_every_version():
    assert list(make.WRITERS) == [f"version-{version}" for version in range(1, FORMAT_VERSION + 1)]
    assert all((GOLDEN.parent / name).is_dir() for name in make.WRITERS)
    assert {path.parent.name for path in manifests(GOLDEN)} == set(STORES)


def test_what_is_written_today_has_the_names_that_content_decides(root):
    assert {path.parent.name for path in manifests(root)} == set(STORES)
    assert {path.name for path in tables(root)} == {path.name for path in tables(GOLDEN)}


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize("name", STORES)
def test_every_store_gives_the_rows_that_were_put(golden, name, memory_map, caplog):
    items, rows, _, given = STORES[name]
    digest, _, dtype = name.partition("-")
    directory = CacheDirectory(golden, memory_map=memory_map)
    store = directory.store(digest, {}, DTYPES[dtype] if dtype else None)
    asked = [*reversed(items), "never seen"]
    for rows_of in (store, store.load()):
        found = rows_of.get_many(content_keys(asked))
        assert found.positions.tolist() == list(range(len(items)))
        assert found.values.dtype == DTYPES[given]
        assert torch.equal(found.values, rows.flip(0))
    assert not caplog.records  # nothing had to be mended
    assert files_of(golden) == files_of(GOLDEN)


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_rows_of_extracted_keys_are_found_by_the_row_keys_beside_them(golden):
    directory = CacheDirectory(golden)
    (table,) = directory.tables(["default", "default#content", "default#row"])
    found = directory.store(LETTERS, {}).get_many(table.keys["default#row"].reshape(-1, 2))
    assert torch.equal(found.values, ROWS)
    assert (table.keys["default"].reshape(-1, 2)[[4, 0]] == extracted_keys([("e", 3), ("a", 5)])).all()


def test_a_run_of_today_trains_from_it_without_encoding(golden, monkeypatch):
    expected = {path.name for path in tables(golden)}
    asked = []
    monkeypatch.setattr(make.Letters, "collate", lambda encoder, items: asked.extend(items))
    cross_entropy, ranking = nn.CrossEntropyLoss(), MultipleNegativesRankingLoss()
    reports = [
        make.fit(golden, make.groups(), cross_entropy, verify=0),
        make.fit(golden, make.pairs(), ranking, verify=0),
        make.fit(golden, make.groups(), cross_entropy, verify=0, key_extractors=make.first_letter, labels=True),
        make.fit(golden, make.groups(), cross_entropy, verify=0, dtype="float16", labels=False),
    ]
    assert [(report.encoded, report.read) for report in reports] == [(0, 0)] * 4
    assert asked == []
    assert {path.name for path in golden.glob("datasets/*")} == expected


@pytest.mark.parametrize("name", STORES)
def test_a_manifest_that_is_lost_is_made_again_from_its_shards(golden, name):
    items, rows, _, _ = STORES[name]
    (golden / "encoders" / name / "manifest.json").unlink()
    store = DiskStore(golden / "encoders" / name, name.partition("-")[0])
    assert torch.equal(store.get_many(content_keys(items)).values, rows)
    made, before = (read(root / "encoders" / name / "manifest.json") for root in (golden, GOLDEN))
    for field in ("row_shape", "dtype", "given_dtype"):
        assert made[field] == before[field]
    assert sorted(made["shards"], key=str) == sorted(before["shards"], key=str)


def seal(content):
    """Give a manifest its checksum: of all other fields, as JSON with sorted keys and without spaces."""
    rest = {name: value for name, value in content.items() if name != "xxh3"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def rewritten(directory, content):
    (directory / "manifest.json").write_text(json.dumps({**content, "xxh3": seal(content)}), encoding="utf-8")


def entry_of(path, rows):
    data = path.read_bytes()
    return {"file": path.name, "rows": rows, "bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}


def test_what_others_may_add_or_leave_out_is_ignored(golden):
    directory = golden / "encoders" / LETTERS
    content = read(directory / "manifest.json")
    del content["verified"]
    entry = content["shards"][0]
    path = directory / entry["file"]
    save_file(
        {**load_file(path), "another": torch.ones(3)},
        path,
        {"quatcache": "shard", "identity": LETTERS, "given_dtype": "float32", "another": "entry"},
    )
    entry.update(entry_of(path, 5), another=1)
    rewritten(directory, {**content, "another": {"field": [None]}})
    store = CacheDirectory(golden).store(LETTERS, {})
    assert torch.equal(store.get_many(content_keys(make.TEXTS)).values, ROWS)


@pytest.mark.parametrize("last", [True, False])
def test_of_two_shards_with_one_key_the_one_named_last_counts(golden, last):
    directory = golden / "encoders" / LETTERS
    content = read(directory / "manifest.json")
    path = directory / "shard-00000000000000ff.safetensors"
    key = torch.tensor([struct.unpack("<qq", bytes.fromhex(KEYS["alder"]))])
    about = {"quatcache": "shard", "identity": LETTERS, "given_dtype": "float32"}
    save_file({"keys": key, "values": torch.full((1, 3), 7.0)}, path, about)
    content["shards"].insert(len(content["shards"]) if last else 0, entry_of(path, 1))
    rewritten(directory, content)
    store = CacheDirectory(golden).store(LETTERS, {})
    expected = torch.cat([torch.full((1, 3), 7.0), ROWS[1:]]) if last else ROWS
    assert torch.equal(store.get_many(content_keys(make.TEXTS)).values, expected)


# --- what anybody makes of it ---


KEYS = {  # as hexadecimal digits, by item; a dict by its name in CANONICAL
    "alder": "bf2bf270ff5fba2474305f6cd48b9cbd",
    "birch": "df237150cada07f455dea1136e1591ab",
    "Größe": "5a3153f0fd2077732e88949b9d773856",
    "naïve 東京": "b4af61da17ac9d84694e8fafd55154eb",
    "elm": "9fbe665b962d7c9533a67390cf26fc12",
    ("alder", 3): "311ab527d6157c2d0186754c4cd3e0fc",
    "a mapping": "6218f44e38f4bbbc097d23fce805d85d",
    b"\x00\xff": "08be428dcf7ea4d94072be4a30176559",
    2.5: "8eb98896c8670dde5d7a95ddac157c53",
    True: "37e5d74cd560929c144a92236fdb7fa2",
    None: "9b77532bdbba3b27f07ef26ee250f62b",
}
EXTRACTED_KEYS = {
    ("a", 5): "d6ab02149eb9c0c877be269c92e57c67",
    ("b", 5): "cb8cc2fc0491896dd0e163e5a3f47d59",
    ("G", 5): "4fa51ec9b59a999649346145f0d5f6e9",
    ("n", 8): "969fced18cec8543f98b4d75cf2e51e6",
    ("e", 3): "6e3ab95dff86ef3aea7c7ff21f1f3f71",
}


def sized(payload):
    return struct.pack("<Q", len(payload)) + payload


def pair(first, second):
    return b"(" + struct.pack("<Q", 2) + first + second


CANONICAL = {  # canonical bytes, written out: kind, tags, lengths
    "alder": b"talder",
    "birch": b"tbirch",
    "Größe": b"tGr\xc3\xb6\xc3\x9fe",
    "naïve 東京": b"tna\xc3\xafve \xe6\x9d\xb1\xe4\xba\xac",
    "elm": b"telm",
    ("alder", 3): b"c" + pair(b"S" + sized(b"alder"), b"I" + sized(b"3")),
    "a mapping": b"c{"
    + struct.pack("<Q", 2)
    + (b"S" + sized(b"text") + b"S" + sized(b"birch") + b"S" + sized(b"year") + b"I" + sized(b"-7")),
    b"\x00\xff": b"cB" + sized(b"\x00\xff"),
    2.5: b"cD" + struct.pack("<d", 2.5),
    True: b"cT",
    None: b"cN",
}


def hexadecimal(keys):
    """Give 128 bits, stored as two little-endian int64, as 32 digits."""
    return [struct.pack("<qq", *key).hex() for key in keys.reshape(-1, 2).tolist()]


def test_keys_are_xxh3_128_of_canonical_bytes():
    for item, digits in KEYS.items():
        assert xxhash.xxh3_128_hexdigest(CANONICAL[item]) == digits
    for (letter, length), digits in EXTRACTED_KEYS.items():
        canonical = b"e" + pair(b"S" + sized(letter.encode()), b"I" + sized(f"{length:x}".encode()))
        assert xxhash.xxh3_128_hexdigest(canonical) == digits


def test_every_shard_is_read_by_safetensors_alone(root):
    found = {}
    for path in shards(root):
        tensors = load_file(path)
        found.setdefault(path.parent.name, []).append(tensors)
        _, _, dtype, _ = STORES[path.parent.name]
        assert (tensors["keys"].dtype, tensors["values"].dtype) == (torch.int64, DTYPES[dtype])
    assert set(found) == set(STORES)
    for name, parts in found.items():
        items, expected, dtype, _ = STORES[name]
        if items is make.TEXTS:
            digits = [KEYS[text] for text in items]
        elif items is make.ITEMS:
            digits = [KEYS["a mapping" if isinstance(item, dict) else item] for item in items]
        else:
            digits = [xxhash.xxh3_128_hexdigest(b"t" + item.encode()) for item in items]
        rows = {}
        for tensors in parts:
            keys = hexadecimal(tensors["keys"])
            assert len(set(keys)) == len(keys)
            rows.update(zip(keys, tensors["values"], strict=True))
        assert all(torch.equal(rows.pop(key), row.to(DTYPES[dtype])) for key, row in zip(digits, expected, strict=True))
        assert not rows


def test_index_tables_hold_keys_and_targets_in_the_order_of_the_dataset(root):
    found = {}
    for path in tables(root):
        about = json.loads(header(path)["__metadata__"]["quatcache"])
        found[about["layout"], len(about["encoders"]), about["targets"]] = about, load_file(path)
    assert set(found) == {("group", 1, 1), ("group", 1, None), ("group", 3, 1), ("pair", 1, 2)}
    texts = [KEYS[text] for text in make.TEXTS]
    for kind, (about, tensors) in found.items():
        layout, count, targets = kind
        assert (about["version"], about["samples"]) == (1, 3 if layout == "pair" else 5)
        assert about["encoders"] == ["default", "default#content", "default#row"][:count]
        assert set(tensors) == {f"keys.{n}" for n in range(count)} | {f"target.{n}" for n in range(targets or 0)}
        for n in range(count):
            assert tensors[f"keys.{n}"].shape == (about["samples"], 2 if layout == "pair" else 1, 2)
        keys = hexadecimal(tensors["keys.0"])
        if layout == "pair":
            assert keys == [KEYS[text] for first, second, *_ in make.PAIRS for text in (first, second)]
            assert tensors["target.0"].tolist() == [score for *_, score, _ in make.PAIRS]
            assert tensors["target.1"].tolist() == [subgroup for *_, subgroup in make.PAIRS]
            continue
        assert keys == (texts if count == 1 else list(EXTRACTED_KEYS.values()))
        if count == 3:  # no two texts share an extracted key, so each has the row of its own content
            assert hexadecimal(tensors["keys.1"]) == hexadecimal(tensors["keys.2"]) == texts
        if targets:
            assert tensors["target.0"].tolist() == make.LABELS


# --- checksums, from the words of FORMAT.md ---


CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def header(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def digest_of_content(path, described):
    """Hash the JSON of what is described, then name, dtype, shape and bytes of each tensor in the order of names."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    digest = xxhash.xxh3_128(json.dumps(described, sort_keys=True).encode())
    for name, about in sorted(header(path).items()):
        if name != "__metadata__":
            first, last = about["data_offsets"]
            digest.update(f"{name} torch.{CODES[about['dtype']]} {tuple(about['shape'])}".encode())
            digest.update(data[8 + size + first : 8 + size + last])
    return digest.hexdigest()


def test_checksums_of_manifests_and_shards_can_be_computed_anew(root):
    for path in manifests(root):
        content = read(path)
        assert content["xxh3"] == seal(content)
        digest, _, dtype = path.parent.name.partition("-")
        assert content["identity"]["digest"] == digest
        assert dtype in ("", content["dtype"])
        assert {entry["file"] for entry in content["shards"]} == {one.name for one in path.parent.glob("shard-*")}
        for entry in content["shards"]:
            shard = path.parent / entry["file"]
            assert entry == entry_of(shard, header(shard)["keys"]["shape"][0])
            metadata = header(shard)["__metadata__"]
            own = metadata.pop("xxh3")
            assert own == digest_of_content(shard, metadata)
            assert (metadata["identity"], metadata["given_dtype"]) == (digest, content["given_dtype"])


def test_index_tables_are_named_by_the_digest_of_their_content(root):
    for path in tables(root):
        assert path.stem == digest_of_content(path, json.loads(header(path)["__metadata__"]["quatcache"]))


# --- FORMAT.md names what is there, and what it names is there ---


def section(title):
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", FORMAT, re.M | re.S)
    return text


def rows_of_tables(title):
    """Give the rows of all tables in a section, less their heads."""
    rows = [line.strip().strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    rules = [place for place, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for place, row in enumerate(cells) if place not in rules and place + 1 not in rules]


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


HEX = re.compile(r"[0-9a-f]{32}")
TYPES = {  # what the type column of the manifest's table may say
    '`"quatcache"`': lambda value: value == "quatcache",
    "int": lambda value: type(value) is int,
    "32 hex": lambda value: HEX.fullmatch(value) is not None,
    "object": lambda value: isinstance(value, dict),
    "object of strings": lambda value: all(isinstance(part, str) for item in value.items() for part in item),
    "list of such objects": lambda value: all(TYPES["object of strings"](part) for part in value),
    "ISO 8601, UTC": lambda value: re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", value) is not None,
    "list of int, or null": lambda value: all(type(part) is int for part in value),
    "string, or null": lambda value: value in DTYPES,
    "list": lambda value: isinstance(value, list),
}


def test_manifest_has_the_fields_of_its_table_and_no_others(root):
    described = {field: kind for names, kind, _ in rows_of_tables("manifest.json") for field in quoted(names)}
    for path in manifests(root):
        content = read(path)
        flat = {field: value for field, value in content.items() if field != "identity"}
        flat.update({f"identity.{field}": value for field, value in content["identity"].items()})
        assert set(flat) == set(described)
        for field, value in flat.items():
            assert TYPES[described[field]](value), field
    (entry,) = (meaning for names, _, meaning in rows_of_tables("manifest.json") if names == "`shards`")
    assert all(set(one) == set(quoted(entry)) for path in manifests(root) for one in read(path)["shards"])
    (dtypes,) = (meaning for names, _, meaning in rows_of_tables("manifest.json") if "`dtype`" in names)
    (listed,) = re.findall(r"one of ([a-z0-9, ]+);", dtypes)
    assert set(listed.split(", ")) == set(DTYPES)


def test_shards_have_the_tensors_and_metadata_of_their_tables_and_no_others(root):
    described = rows_of_tables("Shards")
    tensors = {quoted(row[0])[0]: row[1:3] for row in described if len(row) == 4}
    metadata = {quoted(row[0])[0] for row in described if len(row) == 2}
    assert tensors == {"keys": ["int64", "`(rows, 2)`"], "values": ["`dtype` of the manifest", "`(rows, *row_shape)`"]}
    for path in shards(root):
        content, about = read(path.parent / "manifest.json"), header(path)
        about.pop("__metadata__")
        (rows,) = (entry["rows"] for entry in content["shards"] if entry["file"] == path.name)
        assert {name: one["shape"] for name, one in about.items()} == {
            "keys": [rows, 2],
            "values": [rows, *content["row_shape"]],
        }
        assert CODES[about["values"]["dtype"]] == content["dtype"]
    found = [set(header(path)["__metadata__"]) for path in shards(root)]
    assert set.union(*found) == metadata
    assert set.intersection(*found) == metadata - {"repacked"}


def test_index_tables_have_the_tensors_and_entries_that_are_described_and_no_others(root):
    patterns = [quoted(row[0])[0] for row in rows_of_tables("Index tables")]
    described = set(quoted(section("Index tables").split("one metadata entry")[1].split("The name of the file")[0]))
    names, entries = set(), set()
    for path in tables(root):
        about = header(path)
        metadata = about.pop("__metadata__")
        assert set(metadata) == {"quatcache"}
        entries |= set(json.loads(metadata["quatcache"]))
        names |= {re.sub(r"\d+$", "<n>", name) for name in about}
    assert names == set(patterns)
    assert entries <= described
    assert described - entries == {"quatcache", '"group"', '"pair"', "x", "x#content", "x#row"}


def test_every_file_of_a_run_stands_in_the_layout(golden):
    named = {"<16 hex>": "[0-9a-f]{16}", "<32 hex>": HEX.pattern, "<digest>": HEX.pattern, "<dtype>": "[a-z]+[0-9]+"}
    patterns = []
    for line in section("Layout").splitlines():
        if line.strip().startswith("filling/"):  # the rest is there for several processes and for some encoders only
            break
        match = re.match(r"^ {6,}((?:[^\s<]|<[^>]*>)+)", line)
        if match and re.search(r"[/.<]", match[1]):
            pattern = re.escape(match[1].rstrip("/"))
            for name, expression in named.items():
                pattern = pattern.replace(re.escape(name), expression)
            patterns.append(pattern)
    make.fits(golden)
    make.fit(golden, [("oak", 0), ("fir", 1)], nn.CrossEntropyLoss())
    seen = {part for path in golden.rglob("*") for part in path.relative_to(golden).parts}
    for pattern in patterns:
        assert any(re.fullmatch(pattern, part) for part in seen), pattern
    for part in seen:
        assert any(re.fullmatch(pattern, part) for pattern in patterns), part
