"""Damage to shards of sequences, and what is read from them then; for a process of its own."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quatcache.errors import QuatcacheError
from quatcache.keys import content_keys
from quatcache.sequences import PaddedSequences
from quatcache.store import DiskStore
from quatcache.store.files import content_digest
from tests.store.crafted import CRAFTED_HEADERS, forge_entry
from tests.stores_for_tests import sealed

DIGEST = "5" * 32
NAMES = [f"name {number}" for number in range(24)]
LENGTHS = [(7 * number) % 5 for number in range(24)]
HUGE = 1 << 60


def offsets(change):
    return lambda tensors, about: tensors.update(offsets=change(tensors["offsets"].clone()).contiguous())


def at(place, value):
    def changed(old):
        old[place] = value
        return old

    return offsets(changed)


CRAFTED = {
    "falling offsets": offsets(lambda old: torch.cat([old[:3], old[2:3] - 1, old[4:]])),
    "offsets in reverse": offsets(lambda old: old.flip(0)),
    "an offset beyond the end": at(4, 10_000),
    "the last offset beyond the end": at(-1, 10_000),
    "the last offset before the end": at(-1, 3),
    "an offset of 2^60": at(4, HUGE),
    "a negative offset": at(4, -1),
    "the first offset below zero": at(0, -4),
    "the first offset above zero": at(0, 1),
    "the smallest number": at(4, torch.iinfo(torch.int64).min),
    "one offset less": offsets(lambda old: old[:-1]),
    "one offset more": offsets(lambda old: torch.cat([old, old[-1:]])),
    "a single offset": offsets(lambda old: old[:1]),
    "no offset": offsets(lambda old: old[:0]),
    "offset without a dimension": offsets(lambda old: old[0]),
    "offsets of two dimensions": offsets(lambda old: old[:, None]),
    "offsets of int32": offsets(torch.Tensor.int),
    "offsets of float64": offsets(torch.Tensor.double),
    "no offsets": lambda tensors, about: tensors.pop("offsets") is None,
    "no values": lambda tensors, about: tensors.pop("values") is None,
    "values without a dimension": lambda tensors, about: tensors.update(values=torch.tensor(1.0)),
    "one element less": lambda tensors, about: tensors.update(values=tensors["values"][:-1].contiguous()),
    "one element more": lambda tensors, about: tensors.update(values=torch.cat([tensors["values"]] * 2)),
    "wider elements": lambda tensors, about: tensors.update(values=tensors["values"].repeat(1, 2)),
    "elements without a shape": lambda tensors, about: tensors.update(values=tensors["values"][:, 0].contiguous()),
    "another dtype": lambda tensors, about: tensors.update(values=tensors["values"].int()),
    "rows of one shape by name": lambda tensors, about: about.update(quatcache="shard"),
    "another name": lambda tensors, about: about.update(quatcache="os.system"),
    "rows of one shape": lambda tensors, about: (
        about.update(quatcache="shard"),
        tensors.update(values=torch.full((len(tensors["keys"]), 2), 9.0)),
    ),
    "one key less": lambda tensors, about: tensors.update(keys=tensors["keys"][1:].contiguous()),
}
MANIFESTS = {
    "version 1": {"version": 1},
    "rows of one shape": {"version": 1, "row_shape": [2]},
    "rows of one shape in version 2": {"row_shape": [2]},
    "wider elements": {"row_shape": [None, 3]},
    "elements without a shape": {"row_shape": [None]},
    "null behind": {"row_shape": [2, None]},
    "null twice": {"row_shape": [None, None]},
    "null twice and a size": {"row_shape": [None, None, 2]},
    "half as wide": {"dtype": "float16"},
}


def truth():
    """Give each name's sequence, ``(length, 2)``."""
    return {
        name: torch.arange(2.0 * length).reshape(length, 2) + 100 * place
        for place, (name, length) in enumerate(zip(NAMES, LENGTHS, strict=True))
    }


def build(directory):
    """Fill a store of three shards."""
    store, sequences = DiskStore(directory, DIGEST), truth()
    for start in range(0, 24, 8):
        names = NAMES[start : start + 8]
        values, mask = torch.zeros(8, 5, 2), torch.zeros(8, 5, dtype=torch.bool)
        for place, name in enumerate(names):
            mask[place, : len(sequences[name])] = True
            values[place, : len(sequences[name])] = sequences[name]
        store.put_many(content_keys(names), PaddedSequences(values, mask))
        store.flush()


def wrong(directory, checksums=True):
    """Read everything in every way; name what is neither absent nor right."""
    expected, problems = truth(), []
    for memory_map in (True, False):
        opened = DiskStore(directory, DIGEST, verify_checksums=checksums, memory_map=memory_map)
        for store in (opened, opened.load()):
            found = store.get_many(content_keys(NAMES))
            if len(found.positions) and not isinstance(found.values, PaddedSequences):
                problems.append(f"rows of shape {found.values.shape}")
                continue
            for place, position in enumerate(found.positions.tolist()):
                given = found.values.values[place][found.values.mask[place]]
                if not torch.equal(given, expected[NAMES[position]]):
                    problems.append(NAMES[position])
    return problems, len(opened)


def endure(folder):
    """Do every damage to a copy of the store; give what came of each by name."""
    folder = Path(folder)
    template, outcomes = folder / "template", {}
    build(template)

    def tried(name, damage, checksums=True):
        directory = folder / "copy"
        shutil.copytree(template, directory)
        shard = sorted(directory.glob("shard-*"))[1]
        try:
            damage(shard)
            problems, rows = wrong(directory, checksums)
            outcomes[name] = {"rows": rows, "problems": problems if checksums else []}
        except QuatcacheError as error:
            outcomes[name] = {"rows": -1, "problems": [], "error": f"{type(error).__name__}: {error}"}
        except Exception as error:
            outcomes[name] = {"rows": -1, "problems": [f"{type(error).__name__}: {error}"]}
        shutil.rmtree(directory)

    for name, change in CRAFTED.items():
        for without_manifest in (False, True):
            tried(
                f"{name}{', no manifest' * without_manifest}",
                partial(craft, change=change, without_manifest=without_manifest),
            )
        tried(f"{name}, trusting", partial(craft, change=change, without_manifest=False), checksums=False)
    for name, changes in MANIFESTS.items():
        tried(f"manifest: {name}", partial(edit, changes=changes))
        tried(f"manifest: {name}, trusting", partial(edit, changes=changes), False)
    for name, crafted in CRAFTED_HEADERS.items():
        tried(f"header: {name}", partial(recast, crafted=crafted))
        tried(f"header: {name}, forged", partial(recast, crafted=crafted, forged=True))
    for seed in range(60):
        tried(f"flip {seed}", partial(flip, seed=seed))
        tried(f"flip {seed}, trusting", partial(flip, seed=seed), checksums=False)
        tried(f"cut {seed}", partial(cut, seed=seed))
    return outcomes


def craft(shard, change, without_manifest):
    """Rewrite a shard, with digests that fit what it says then."""
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    about = {"quatcache": "sequences", "identity": DIGEST, "given_dtype": "float32"}
    change(tensors, about)
    shard.unlink()
    save_file(tensors, shard, {**about, "xxh3": content_digest(about, tensors)})
    if without_manifest:
        shard.with_name("manifest.json").unlink()
    else:
        forge_entry(shard)


def edit(shard, changes):
    manifest = shard.with_name("manifest.json")
    manifest.write_text(json.dumps(sealed({**json.loads(manifest.read_text()), **changes})))


def recast(shard, crafted, forged=False):
    content = shard.read_bytes()
    size = int.from_bytes(content[:8], "little")
    shard.write_bytes(crafted(json.loads(content[8 : 8 + size]), content[8 + size :]))
    if forged:
        forge_entry(shard)


def flip(shard, seed):
    content = bytearray(shard.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    shard.write_bytes(bytes(content))


def cut(shard, seed):
    content = shard.read_bytes()
    shard.write_bytes(content[: random.Random(seed).randrange(len(content))])
