"""Cache directories made by hand: stores of given digests, index tables, ages, pictures of all files, and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from quatcache.keys import content_keys
from quatcache.store import CacheDirectory, DatasetTable, DiskStore
from quatcache.store.manifest import MANIFEST_NAME
from tests.stores_for_tests import sealed

ROOT = Path(__file__).resolve().parents[1]
ONE, TWO, THREE = ("1" * 32, "2" * 32, "3" * 32)
HOUR, DAY = 3600.0, 86400.0
NOW = 1_800_000_000.0


def keys_of(*names):
    return content_keys([str(name) for name in names])


def rows_of(*numbers):
    return torch.tensor([[float(number), -float(number)] for number in numbers])


def store_rows(root, digest=ONE, numbers=(1, 2, 3), *, dtype=None, rows=None, facts=None, commits=1):
    """Put rows of some numbers into a store of a cache, in so many shards; give its directory."""
    name = digest if dtype is None else f"{digest}-{str(dtype).removeprefix('torch.')}"
    store = DiskStore(
        root / "encoders" / name, digest, facts=facts or {"class": "tests.Numbers"}, dtype=dtype,
        environment={"torch": "0.0"},
    )  # fmt: skip
    rows = rows_of(*numbers) if rows is None else rows
    parts = torch.arange(len(numbers)).tensor_split(commits)
    for part in parts:
        store.put_many(keys_of(*(numbers[place] for place in part.tolist())), rows[part])
        store.flush()
    return store.directory


def add_rows(home, *numbers, rows=None):
    """Commit rows of more numbers to a store, as another run would."""
    store = DiskStore(home, home.name)
    store.put_many(keys_of(*numbers), rows_of(*numbers) if rows is None else rows)
    store.flush()


def store_table(root, numbers=(1, 2, 3), targets=(), *, encoders=("default",), width=1):
    """Write the index table of a dataset of these numbers; give its file."""
    keys = keys_of(*numbers).reshape(-1, width, 2)
    return CacheDirectory(root).write_table(
        DatasetTable(dict.fromkeys(encoders, keys), None if targets is None else tuple(targets), "group")
    )


@contextmanager
def python(code, *arguments):
    """Run code in a process of its own, with pipes to it; it is killed at the end, if it still runs."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def shards(home):
    return sorted(home.glob("shard-*.safetensors"))


def set_age(path, seconds, now=NOW):
    """Let a file, or every file of a directory and itself, look as if written so many seconds ago."""
    for one in (*(path.iterdir() if path.is_dir() else ()), path):
        os.utime(one, (now - seconds, now - seconds), follow_symlinks=False)


def picture(root):
    """Every path below a directory with its content and time: equal pictures, nothing was touched."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
    }


def flip(path, place=-1):
    """Change one byte of a file, and nothing else."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))


def edit_manifest(home, **changes):
    """Change fields of a manifest, with the checksum that fits."""
    path = home / MANIFEST_NAME
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), **changes})))
