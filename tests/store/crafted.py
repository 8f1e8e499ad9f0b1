"""Headers, manifests and index tables that no writer makes: each a change to what a good file says."""

from __future__ import annotations

import json
import os

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quatcache.store.files import content_digest
from tests.stores_for_tests import sealed

HUGE = 1 << 60


def with_header(change):
    """Make a file of tensors from a header that was changed in place."""

    def crafted(header, data):
        changed = change(header)
        return packed(header if changed is None else changed, data)

    return crafted


def packed(header, data, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensors_of(header):
    return [tensor for name, tensor in header.items() if name != "__metadata__"]


def each(change):
    """Change the entry of every tensor."""

    def changed(header):
        for tensor in tensors_of(header):
            change(tensor)

    return with_header(changed)


def last(change):
    """Change the entry of the last tensor of the file."""
    return with_header(lambda header: change(max(tensors_of(header), key=lambda tensor: tensor["data_offsets"])))


def first(change):
    return with_header(lambda header: change(min(tensors_of(header), key=lambda tensor: tensor["data_offsets"])))


def huge_data(tensor):
    shape = [HUGE, *tensor["shape"][1:]]
    tensor.update(shape=shape, data_offsets=[0, 8 * HUGE])


def swapped_names(header):
    (one, first_tensor), (other, second) = [item for item in header.items() if item[0] != "__metadata__"][:2]
    header.update({one: second, other: first_tensor})


CRAFTED_HEADERS = {
    "2^60 rows": each(lambda tensor: tensor.update(shape=[HUGE, *tensor["shape"][1:]])),
    "2^60 rows and bytes": each(huge_data),
    "2^63 x 2^63 rows": each(lambda tensor: tensor.update(shape=[1 << 63, 1 << 63])),
    "negative rows": each(lambda tensor: tensor.update(shape=[-1, *tensor["shape"][1:]])),
    "negative offsets": first(lambda tensor: tensor.update(data_offsets=[-8, tensor["data_offsets"][1]])),
    "offsets in reverse": each(lambda tensor: tensor["data_offsets"].reverse()),
    "overlapping offsets": last(lambda tensor: tensor.update(data_offsets=[o - 16 for o in tensor["data_offsets"]])),
    "same offsets": with_header(lambda h: [t.update(data_offsets=[0, 1024]) for t in tensors_of(h)] and h),
    "offsets beyond the end": last(lambda tensor: tensor.update(data_offsets=[o + 64 for o in tensor["data_offsets"]])),
    "another dtype of the same size": each(lambda t: t.update(dtype={"F32": "I32"}.get(t["dtype"], "F64"))),
    "an unsigned dtype": each(lambda t: t.update(dtype={"F32": "U32"}.get(t["dtype"], "U64"))),
    "an unknown dtype": each(lambda tensor: tensor.update(dtype="Q128")),
    "a smaller dtype": each(lambda tensor: tensor.update(dtype="U8")),
    "bytes as rows": each(
        lambda tensor: tensor.update(dtype="U8", shape=[tensor["data_offsets"][1] - tensor["data_offsets"][0]])
    ),
    "flat tensors": each(lambda tensor: tensor.update(shape=[torch.Size(tensor["shape"]).numel()])),
    "wider rows": each(lambda t: t.update(shape=[t["shape"][0] // 2, 2 * torch.Size(t["shape"][1:]).numel()])),
    "no rows": each(lambda tensor: tensor.update(shape=[0, *tensor["shape"][1:]])),
    "names swapped": with_header(swapped_names),
    "no tensors": with_header(lambda header: {"__metadata__": header["__metadata__"]}),
    "no metadata": with_header(lambda header: header.pop("__metadata__") and None),
    "metadata of numbers": with_header(lambda header: header.update(__metadata__={"quatcache": 1, "identity": [2]})),
    "metadata of another encoder": with_header(lambda header: header["__metadata__"].update(identity="f" * 32)),
    "a list": with_header(lambda header: b"[1, 2, 3]"),
    "deep nesting": with_header(lambda header: b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "no JSON": with_header(lambda header: b"\x80\x04K\x01." * 20),
    "no UTF-8": with_header(lambda header: json.dumps(header).encode().replace(b"keys", b"k\xffys")),
    "length 0": lambda header, data: packed(header, data, 0),
    "length 2^62": lambda header, data: packed(header, data, 1 << 62),
    "length 2^64 - 1": lambda header, data: packed(header, data, (1 << 64) - 1),
    "length of the file": lambda header, data: packed(header, data, len(json.dumps(header)) + len(data)),
    "length one beyond the file": lambda header, data: packed(header, data, len(json.dumps(header)) + len(data) + 1),
    "another tensor besides": lambda header, data: packed(
        {**header, "other": {"dtype": "U8", "shape": [8], "data_offsets": [len(data), len(data) + 8]}}, data + bytes(8)
    ),
}  # fmt: skip


def in_manifest(**changes):
    return lambda content: content.update(changes)


def in_entry(**changes):
    return lambda content: content["shards"][0].update(changes)


CRAFTED_MANIFESTS = {
    "another format": in_manifest(format="other"),
    "version 3": in_manifest(version=3),
    "version 2, which has sequences": in_manifest(version=2),
    "sequences in version 1": in_manifest(row_shape=[None, 16]),
    "sequences": in_manifest(version=2, row_shape=[None, 16]),
    "version 0": in_manifest(version=0),
    "version '1'": in_manifest(version="1"),
    "no version": lambda content: content.pop("version") and None,
    "version true": in_manifest(version=True),
    "another encoder": lambda content: content["identity"].update(digest="f" * 32),
    "no identity": lambda content: content.pop("identity") and None,
    "identity is a list": in_manifest(identity=["digest", "facts"]),
    "facts are a list": lambda content: content["identity"].update(facts=[1, 2]),
    "environment is a list": in_manifest(environment=[]),
    "verified is a number": in_manifest(verified=3),
    "shards are an object": in_manifest(shards={"file": "x"}),
    "shards are null": in_manifest(shards=None),
    "an entry is null": in_manifest(shards=[None]),
    "no shards": in_manifest(shards=[]),
    "a shard twice": lambda content: content["shards"].append(content["shards"][0]),
    "shards in reverse": lambda content: content["shards"].reverse(),
    "2^60 rows": in_entry(rows=HUGE),
    "2^64 rows": in_entry(rows=1 << 64),
    "-1 rows": in_entry(rows=-1),
    "rows in words": in_entry(rows="32"),
    "one row less": lambda content: content["shards"][0].update(rows=content["shards"][0]["rows"] - 1),
    "2^60 bytes": in_entry(bytes=HUGE),
    "-1 bytes": in_entry(bytes=-1),
    "checksum of nothing": in_entry(xxh3=""),
    "checksum is a number": in_entry(xxh3=0),
    "a path": in_entry(file="../../datasets/shard-0123456789abcdef.safetensors"),
    "an absolute path": in_entry(file="/etc/passwd"),
    "file is a number": in_entry(file=7),
    "row_shape of 2^60": in_manifest(row_shape=[HUGE]),
    "row_shape of -1": in_manifest(row_shape=[-1]),
    "row_shape of two dimensions": in_manifest(row_shape=[4, 4]),
    "row_shape null": in_manifest(row_shape=None),
    "row_shape is a number": in_manifest(row_shape=16),
    "dtype object": in_manifest(dtype="object"),
    "dtype int32": in_manifest(dtype="int32", given_dtype="int32"),
    "dtype is a list": in_manifest(dtype=["float32"]),
    "given_dtype int64": in_manifest(given_dtype="int64"),
    "given_dtype float64": in_manifest(given_dtype="float64"),
    "infinity": lambda content: json.dumps(sealed({**content, "created": "X"})).replace('"X"', "Infinity").encode(),
    "a number of 5,000 digits": lambda content: b'{"format": "quatcache", "version": 1' + b"0" * 5000 + b"}",
    "deep nesting": lambda content: b"[" * 200_000,
    "a list": lambda content: b"[]",
    "no UTF-8": lambda content: b"\xff\xfe" + json.dumps(content).encode("utf-16"),
    "zeros": lambda content: bytes(len(json.dumps(content))),
}  # fmt: skip


def in_table(**changes):
    return lambda about, tensors: about.update(changes)


def shuffled(name):
    return lambda about, tensors: tensors.update({name: tensors[name].flip(0).contiguous()})


def changed(name, change):
    return lambda about, tensors: tensors.update({name: change(tensors[name]).contiguous()})


CRAFTED_TABLES = {
    "version 2": in_table(version=2),
    "version '1'": in_table(version="1"),
    "version null": in_table(version=None),
    "no version": lambda about, tensors: about.pop("version") and None,
    "one sample more": lambda about, tensors: about.update(samples=about["samples"] + 1),
    "2^60 samples": in_table(samples=HUGE),
    "another layout": in_table(layout="pair"),
    "no known layout": in_table(layout="__import__"),
    "layout null": in_table(layout=None),
    "no encoders": in_table(encoders=[]),
    "encoders is a word": in_table(encoders="text"),
    "encoders that the model lacks": in_table(encoders=["a", "b"]),
    "three encoders": in_table(encoders=["text", "title", "third"]),
    "2^60 targets": in_table(targets=HUGE),
    "-1 targets": in_table(targets=-1),
    "targets in words": in_table(targets="1"),
    "two targets": in_table(targets=2),
    "no targets": in_table(targets=None),
    "labels in another order": shuffled("target.0"),
    "labels of another dataset": changed("target.0", torch.zeros_like),
    "labels of another dtype": changed("target.0", torch.Tensor.int),
    "one label less": changed("target.0", lambda labels: labels[1:]),
    "a single label": changed("target.0", lambda labels: labels[0]),
    "keys in another order": shuffled("keys.0"),
    "keys that no store has": changed("keys.0", lambda keys: keys + 1),
    "keys of another dtype": changed("keys.0", torch.Tensor.double),
    "keys of three parts": changed("keys.0", lambda keys: torch.cat([keys, keys[..., :1]], dim=-1)),
    "keys of no items": changed("keys.0", lambda keys: keys[:, :0]),
    "keys of two items": changed("keys.0", lambda keys: torch.cat([keys, keys], dim=1)),
    "one key less": changed("keys.0", lambda keys: keys[1:]),
    "no keys": lambda about, tensors: tensors.pop("keys.0") is None,
}  # fmt: skip


def craft(place, variant, forged, path):
    """Change what a file says about itself, and if forged, what others say about it; give the changed file."""
    if place == "manifest":
        content = json.loads(path.read_text())
        crafted = CRAFTED_MANIFESTS[variant](content)
        crafted = content if crafted is None else crafted
        path.write_bytes(crafted if isinstance(crafted, bytes) else json.dumps(sealed(crafted)).encode())
        return path
    if place == "table" and forged:
        return forge_table(variant, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    path.write_bytes(CRAFTED_HEADERS[variant](json.loads(content[8 : 8 + size]), content[8 + size :]))
    if forged:
        forge_entry(path)
    return path


def forge_entry(path):
    """Make the manifest agree with a crafted shard, down to its checksums."""
    manifest = path.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    for entry in content["shards"]:
        if entry["file"] == path.name:
            entry["bytes"] = path.stat().st_size
            entry["xxh3"] = xxhash.xxh3_128_hexdigest(path.read_bytes())
            claimed = rows_claimed(path.read_bytes())
            entry["rows"] = entry["rows"] if claimed is None else claimed
    manifest.write_text(json.dumps(sealed(content)))


def rows_claimed(content):
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return max(0, int(header["keys"]["shape"][0]))
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return None


def forge_table(variant, path):
    """Replace an index table by one whose name fits its content."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["quatcache"])
    CRAFTED_TABLES[variant](about, tensors)
    path.unlink()
    forged = path.with_name(f"{content_digest(about, tensors)}.safetensors")
    save_file(tensors, forged, {"quatcache": json.dumps(about, sort_keys=True)})
    future = path.parent.stat().st_mtime + 1000
    os.utime(forged, (future, future))  # the newest one is tried first
    return forged
