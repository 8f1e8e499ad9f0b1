"""Every store under one face: names as keys, whole numbers as what is stored, so that one test serves them all."""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from cachetools import LRUCache, TTLCache

from quatcache.keys import content_keys
from quatcache.sequences import PaddedSequences
from quatcache.store import DiskStore, LockedStore, MemoryStore, TensorStore

DIGEST = "0123456789abcdef" * 2

# What a careless store takes for "nothing": each must come back as itself.
OBJECTS = (None, 0, False, "", (), float("nan"), [], b"", "seven", 8)
NUMBERS = (0.0, float("nan"), float("inf"), -1.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class ObjectCase:
    """A mapping store: keys are the names, values are Python objects."""

    keeps_everything = True

    def __init__(self, mapping=None, keeps_everything=True):
        self.store = MemoryStore(mapping)
        self.keeps_everything = keeps_everything

    def keys(self, names):
        return [f"key {name}" for name in names]

    def values(self, numbers):
        return [OBJECTS[number] for number in numbers]

    def plain(self, values):
        assert isinstance(values, list)
        return [repr(value) for value in values]


class RowCase:
    """A row store: keys are hashes, values are rows of two floats."""

    keeps_everything = True

    def __init__(self, store):
        self.store = store

    def keys(self, names):
        return content_keys([f"key {name}" for name in names])

    def values(self, numbers):
        return torch.tensor([[NUMBERS[number], float(number)] for number in numbers]).reshape(-1, 2)

    def plain(self, values):
        assert isinstance(values, torch.Tensor)
        return [repr(row) for row in values.tolist()]

    def tensor(self, values):
        return values


class SequenceCase(RowCase):
    """A row store whose rows are sequences: the number n is n % 4 elements long, and may be none at all."""

    def values(self, numbers):
        sequences = [self._sequence(number) for number in numbers]
        width = max(map(len, sequences), default=0) + 1  # a column of padding that no sequence needs
        values = torch.full((len(sequences), width, 2), 7.25)  # what stands in the padding must come back nowhere
        mask = torch.zeros(len(sequences), width, dtype=torch.bool)
        for place, sequence in enumerate(sequences):
            values[place, width - len(sequence) :] = sequence  # padded on the left
            mask[place, width - len(sequence) :] = True
        return PaddedSequences(values, mask)

    @staticmethod
    def _sequence(number):
        steps = torch.arange(float(number % 4))
        return torch.stack([torch.full_like(steps, NUMBERS[number]), number + steps], dim=1)

    def plain(self, values):
        assert isinstance(values, PaddedSequences) or not len(values)  # an empty store does not know its kind yet
        if not len(values):
            return []
        return [repr(row[mask].tolist()) for row, mask in zip(values.values, values.mask, strict=True)]

    def tensor(self, values):
        return values.values


ROWS = ("tensor", "tensor-float16", "locked", "disk", "disk-shards", "disk-reopened", "loaded")
SEQUENCES = tuple(f"{name}, sequences" for name in ROWS)
STORES = ("memory", "lru", "ttl", "declining", *ROWS, *SEQUENCES)
EXACT = tuple(name for name in STORES if name not in {"lru", "ttl", "declining"})


@contextmanager
def opened(name, clock=None):
    """Open an empty store of one kind, wrapped in its case."""
    clock = clock or Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        if name == "memory":
            yield ObjectCase()
        elif name == "lru":
            yield ObjectCase(LRUCache(maxsize=3), keeps_everything=False)
        elif name == "ttl":
            yield ObjectCase(TTLCache(maxsize=100, ttl=2.5, timer=clock), keeps_everything=False)
        elif name == "declining":
            sizes = LRUCache(maxsize=5, getsizeof=lambda value: 9 if value in (None, "seven") else 1)
            yield ObjectCase(sizes, keeps_everything=False)
        else:
            kind, _, sequences = name.partition(", ")
            store = row_store(kind, path)
            yield (SequenceCase if sequences else RowCase)(store)
            if isinstance(store, DiskStore):
                store.settle()  # no file comes any more while the folder goes


def row_store(kind, path):
    """Make an empty row store of one kind."""
    if kind == "tensor":
        return TensorStore()
    if kind == "locked":
        return LockedStore(TensorStore())
    if kind == "tensor-float16":
        return TensorStore(dtype=torch.float16, capacity=5)
    if kind == "disk":
        return DiskStore(path, DIGEST)
    if kind == "disk-shards":  # every put is a shard of its own
        return DiskStore(path, DIGEST, shard_bytes=1)
    return Reopening(path) if kind == "disk-reopened" else DiskStore(path, DIGEST).load()


class Reopening:
    """A disk store that is flushed after each put and opened anew for each other call."""

    def __init__(self, path):
        self._path = path

    def put_many(self, keys, values):
        store = DiskStore(self._path, DIGEST)
        store.put_many(keys, values)
        store.flush()

    def __len__(self):
        return len(DiskStore(self._path, DIGEST))

    def __getattr__(self, name):
        return getattr(DiskStore(self._path, DIGEST), name)


def sealed(content):
    """Give a manifest the checksum that FORMAT.md asks for, so that its other entries are looked at."""
    rest = {name: value for name, value in content.items() if name != "xxh3"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "xxh3": xxhash.xxh3_128_hexdigest(text.encode())}
