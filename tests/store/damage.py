"""Damage of every kind, done in every place of a cache directory, and what real fits make of it.

Everything here runs in a process of its own: a memory map of a damaged file can kill an interpreter.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from quatcache import CacheConfig
from quatcache.encoders import identify
from quatcache.errors import QuatcacheError
from quatcache.keys import content_keys
from quatcache.store import CacheDirectory
from tests.fits import HashingEncoder, Model, Texts, fit, loader, texts
from tests.store.crafted import CRAFTED_HEADERS, CRAFTED_MANIFESTS, CRAFTED_TABLES, craft, forge_entry
from tests.training.killed_fit import small_commits

ENCODERS = {"text": 0, "title": 1}  # seeds
ROWS = 120  # of each encoder
ROWS_PER_SHARD = 32
READING = (("cpu", True), ("disk", True), ("cpu", False))  # tier and memory_map, in turn

SHARD_PLACES = ("shard: header length", "shard: header", "shard: keys", "shard: values")
TABLE_PLACES = ("table: header length", "table: header", "table: keys", "table: labels")
PLACES = (*SHARD_PLACES, "manifest", *TABLE_PLACES)


@dataclass(frozen=True)
class Case:
    """One piece of damage.

    Attributes:
        number: Seed of what is random about it.
        place: Where, or in which kind of file.
        kind: "flip", "truncate", "swap", "garbage", "empty", "delete", "append", or "craft".
        variant: Which of several of its kind, for "craft" by name.
        forged: Whether the sizes and checksums that refer to the file were made to agree with the damage.
    """

    number: int
    place: str
    kind: str
    variant: str = ""
    forged: bool = False

    def __str__(self):
        return f"{self.number}: {self.kind} {self.variant} {'(forged) ' if self.forged else ''}in {self.place}"


def cases():
    """List all cases."""
    wanted = []
    for place in PLACES:
        for kind, times in (("flip", 30 if place == "manifest" else 7), ("truncate", 4), ("swap", 3), ("garbage", 3)):
            wanted += [(place, kind, str(turn)) for turn in range(times)]
    for place in ("shard", "manifest", "table"):
        wanted += [(place, kind, str(turn)) for kind in ("empty", "delete", "append") for turn in range(2)]
    wanted += [("shard", "swap", "with another encoder's", True)] * 3
    for name in CRAFTED_HEADERS:
        wanted += [("shard", "craft", name), ("shard", "craft", name, True), ("table", "craft", name)]
    wanted += [("manifest", "craft", name, True) for name in CRAFTED_MANIFESTS]
    wanted += [("table", "craft", name, True) for name in CRAFTED_TABLES]
    return [Case(number, *case) for number, case in enumerate(wanted)]


# The cache directory ---------------------------------------------------------------------------------------------


def datasets():
    """Give texts for training and for validation, each with its label; they overlap."""
    return Texts(texts(100), [i % 5 for i in range(100)]), Texts(texts(120)[80:], [i % 3 for i in range(40)])


def build(save_dir):
    """Fill a cache directory: two encoders, several shards each, two datasets."""
    small_commits(shard_bytes=ROWS_PER_SHARD * 64)
    outcome = train(save_dir, 0)
    assert outcome["encoded"] == 2 * ROWS and not outcome["problems"]
    return {"shards": len(list(save_dir.rglob("shard-*"))), "tables": len(list(save_dir.glob("datasets/*")))}


def encoders():
    return {name: HashingEncoder(seed) for name, seed in ENCODERS.items()}


@functools.cache
def _row(name, word):
    encoder = HashingEncoder(ENCODERS[name])
    return encoder(encoder.collate([word]))


def truth(words):
    """Give the rows of texts, each encoded alone and far from any cache."""
    return {name: torch.cat([_row(name, word) for word in words]) for name in ENCODERS}


class _Served(pl.Callback):
    """Keeps the rows and labels that training and validation were given, in order."""

    def __init__(self):
        self.batches = {"train": [], "val": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches["train"].append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.batches["val"].append(batch)


class _Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def train(save_dir, number, checksums=True):
    """Fit once, and compare all that was served, and all that a store holds then, with the truth."""
    train_data, val_data = datasets()
    model, served, warnings = None, _Served(), _Warnings()
    logging.getLogger("quatcache").addHandler(warnings)
    try:
        tier, memory_map = READING[number % len(READING)]
        cache = CacheConfig(tier, save_dir=save_dir, batch_size=8, memory_map=memory_map, checksums=checksums)
        model = Model(encoders(), cache)
        settings = {"max_epochs": 1, "callbacks": [served]}
        fit(model, loader(train_data, batch_size=32), loader(val_data, batch_size=32), **settings)
    finally:
        logging.getLogger("quatcache").removeHandler(warnings)
    problems = []
    for stage, data in (("train", train_data), ("val", val_data)):
        expected, batches = truth(data.texts), served.batches[stage]
        for name in ENCODERS:
            rows = torch.cat([batch.inputs[name].reshape(-1, 16) for batch in batches])
            if rows.dtype != torch.float32 or not torch.equal(rows, expected[name]):
                problems.append(f"{stage} was served wrong rows of encoder {name}")
        if torch.cat([batch.targets[0] for batch in batches]).tolist() != data.groups:
            problems.append(f"{stage} was served wrong labels")
    problems += looked_up(save_dir)
    report = model.cache_callback.report
    return {"encoded": report.encoded, "read": report.read, "warnings": warnings.messages, "problems": problems}


def looked_up(save_dir):
    """Look up every key in stores that are opened anew, and compare with the truth."""
    words = sorted({word for data in datasets() for word in data.texts})
    expected, problems = truth(words), []
    for name, encoder in encoders().items():
        identity = identify(encoder)
        found = CacheDirectory(save_dir).store(identity.digest, identity.facts).get_many(content_keys(words))
        if len(found.positions) != len(words):
            problems.append(f"{len(words) - len(found.positions)} rows of encoder {name} are missing after the fit")
        elif not torch.equal(found.values, expected[name]):
            problems.append(f"the store of encoder {name} holds wrong rows")
    return problems


# Enduring a case ---------------------------------------------------------------------------------------------------


def endure(numbers, template, folder, results, checksums=True):
    """Run some cases, each on a copy of the directory; append what came of each to a file at once.

    Without checksums rows may be wrong, by agreement, but nothing worse may happen.
    """
    small_commits(shard_bytes=ROWS_PER_SHARD * 64)
    every = {case.number: case for case in cases()}
    for number in numbers:
        save_dir = Path(folder) / f"case-{number}"
        shutil.copytree(template, save_dir)
        try:
            outcome = (endured if checksums else outlived)(every[number], save_dir, template)
        except Exception:
            outcome = {"outcome": "crash", "problems": [traceback.format_exc()[-2000:]]}
        shutil.rmtree(save_dir)
        with Path(results).open("a") as file:
            file.write(json.dumps({"number": number, **outcome}) + "\n")
    return len(numbers)


def endured(case, save_dir, template):
    """Do the damage, fit, and fit again."""
    damaged = do_damage(case, save_dir)
    lost = sum(rows_in(Path(template, path.relative_to(save_dir))) for path in damaged if "shard-" in path.name)
    if case.place == "manifest" and case.forged:  # what contradicts its shards: each of them may be refused
        lost = ROWS
    try:
        first = train(save_dir, case.number)
    except QuatcacheError as error:
        problems = []
        if not any(str(path.parent) in str(error) for path in damaged):
            problems.append("the error does not name the file")
        shutil.rmtree(save_dir)  # as if the damaged files were brought back from elsewhere
        shutil.copytree(template, save_dir)
        again = train(save_dir, case.number)
        problems += again["problems"] + [f"encoded {again['encoded']}"] * (again["encoded"] > 0)
        return {"outcome": "error", "error": f"{type(error).__name__}: {error}", "problems": problems}
    problems = list(first["problems"])
    if first["encoded"] > lost:
        problems.append(f"{first['encoded']} items were encoded again for {lost} rows that were damaged")
    again = train(save_dir, case.number)
    problems += [f"then: {problem}" for problem in again["problems"]]
    lasting = [message for message in again["warnings"] if "has version 2, this quatcache reads up to 1" not in message]
    if again["encoded"] or again["read"] or lasting:
        problems.append(f"the directory is not whole again: {again}")
    outcome = "refilled" if first["encoded"] else "read again" if first["read"] else "mended"
    outcome = outcome if first["encoded"] or first["read"] or first["warnings"] else "unharmed"
    return {"outcome": outcome, "encoded": first["encoded"], "warnings": first["warnings"], "problems": problems}


def outlived(case, save_dir, template):
    """Do the damage, and fit while files are trusted: a fit or an error, but nothing that was not foreseen."""
    do_damage(case, save_dir)
    try:
        train(save_dir, case.number, checksums=False)
    except QuatcacheError as error:
        return {"outcome": "error", "error": f"{type(error).__name__}: {error}", "problems": []}
    return {"outcome": "trained", "problems": []}


def rows_in(shard):
    return len(load_file(shard)["keys"])


# Doing damage ------------------------------------------------------------------------------------------------------


def do_damage(case, save_dir):
    """Do the damage, and give the damaged files."""
    chance = random.Random(case.number)
    files = files_of(case.place, save_dir)
    path = chance.choice(files)
    content = path.read_bytes()
    if case.kind == "craft":
        return [craft(case.place, case.variant, case.forged, path)]
    if case.kind == "empty":
        path.write_bytes(b"")
        return [path]
    if case.kind == "delete":
        path.unlink()
        return [path]
    if case.kind == "append":
        path.write_bytes(content + chance.randbytes(chance.choice([1, 64, 5000])))
        return [path]
    if case.kind == "swap" and case.forged:
        return [give_shard_of_another_encoder(path)]
    start, end = chance.choice(regions(case.place, path))
    if case.kind == "swap":
        return swap(path, chance.choice([other for other in files if other != path]), case, start, end)
    if case.kind == "truncate":
        path.write_bytes(content[: chance.randrange(start, end)])
    elif case.kind == "flip":
        place = chance.randrange(start, end)
        flipped = content[place] ^ (1 << chance.randrange(8))
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    else:
        path.write_bytes(content[:start] + chance.randbytes(end - start) + content[end:])
    return [path]


def files_of(place, save_dir):
    if place.startswith("manifest"):
        return sorted(save_dir.glob("encoders/*/manifest.json"))
    if place.startswith("shard"):
        return sorted(save_dir.glob("encoders/*/shard-*.safetensors"))
    return sorted(save_dir.glob("datasets/*.safetensors"))


def regions(place, path):
    """Give where the bytes of a place are in a file: start and end, for each tensor where there are several."""
    content = path.read_bytes()
    if place == "manifest":
        return [(0, len(content))]
    size = int.from_bytes(content[:8], "little")
    part = place.partition(": ")[2]
    if part == "header length":
        return [(0, 8)]
    if part == "header":
        return [(8, 8 + size)]
    wanted = {"labels": "target."}.get(part, part)
    header = json.loads(content[8 : 8 + size])
    return [
        tuple(8 + size + offset for offset in tensor["data_offsets"])
        for name, tensor in header.items()
        if name.startswith(wanted)
    ]


def swap(path, other, case, start, end):
    """Swap two files as a whole, or one part of them."""
    mine, theirs = path.read_bytes(), other.read_bytes()
    if case.variant == "0":
        path.write_bytes(theirs)
        other.write_bytes(mine)
    else:
        end = min(end, len(theirs))
        path.write_bytes(mine[:start] + theirs[start:end] + mine[end:])
        other.write_bytes(theirs[:start] + mine[start:end] + theirs[end:])
    return [path, other]


def give_shard_of_another_encoder(path):
    """Put a sound shard of the other store, with rows for the same texts, in the place of this one."""
    keys = load_file(path)["keys"]
    others = [shard for shard in files_of("shard", path.parents[2]) if shard.parent != path.parent]
    alike = next(shard for shard in others if torch.equal(load_file(shard)["keys"], keys))
    path.write_bytes(alike.read_bytes())
    forge_entry(path)
    return path
