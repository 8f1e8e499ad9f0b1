"""What a cache directory holds, read as FORMAT.md says, with json and safetensors alone."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from quatcache.keys import content_keys


def committed_rows(save_dir):
    """The committed rows: for each store directory by name, a dict of keys (16 bytes) to rows (bytes)."""
    stores = {}
    for path in sorted(save_dir.glob("encoders/*/manifest.json")):
        rows = stores.setdefault(path.parent.name, {})
        for entry in json.loads(path.read_text())["shards"]:
            shard = load_file(path.parent / entry["file"])
            keys = shard["keys"].numpy()
            values = shard["values"].contiguous().numpy()
            assert len(keys) == len(values) == entry["rows"]
            rows.update((key.tobytes(), row.tobytes()) for key, row in zip(keys, values, strict=True))
    return stores


def only_store(save_dir):
    """The committed rows of a directory that holds those of one encoder; none before its first commit."""
    stores = committed_rows(save_dir)
    assert len(stores) <= 1
    return next(iter(stores.values()), {})


def made_elsewhere(save_dir):
    """Whether a manifest does not say where its rows were made: it was lost, and made again from the shards."""
    manifests = save_dir.glob("encoders/*/manifest.json")
    return any(not json.loads(path.read_text())["environment"] for path in manifests)


def texts_by_key(texts):
    """A dict of keys (16 bytes) to the texts that they stand for."""
    distinct = sorted(set(texts))
    return {key.tobytes(): text for key, text in zip(content_keys(distinct), distinct, strict=True)}
