"""What is measured of the store, each in a process of its own: ``python -m benchmarks.measures NAME ...``.

Each measure checks what it got before it gives a figure. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from xxhash import xxh3_128_digest

from benchmarks.anonymous import Peak
from benchmarks.rows import ENCODER, check_rows, keys_of, open_store, random_batches, row_blocks, write_cache
from quatcache.demo.icd10 import read_tabular
from quatcache.encoders import ModuleEncoder, identify
from quatcache.keys import KeyArray, content_keys
from quatcache.store import CacheDirectory, disk

__all__ = ["MEASURES", "parse"]

Figures = dict[str, Any]

PLAIN = "plain.safetensors"


def cache(options: argparse.Namespace) -> Figures:
    """Write the cache that later processes open."""
    write_cache(options.folder, options.rows)
    return {"bytes": sum(path.stat().st_size for path in options.folder.rglob("*.safetensors"))}


def first_look_up(options: argparse.Namespace) -> Figures:
    """Open a cache and gather one random batch: the seconds from after the imports on."""
    (forget_pages if options.cold else read_pages)(options.folder)
    indices = torch.randint(options.rows, (options.batch,), generator=torch.Generator().manual_seed(options.seed))
    started = time.perf_counter()
    store = open_store(options.folder, checksums=options.checksums)
    opened = time.perf_counter()
    numbers = store.rows_of(keys_of(indices.tolist()))
    rows = store.gather(torch.from_numpy(numbers))
    ended = time.perf_counter()
    check_rows(rows, indices)
    return {"seconds": ended - started, "open_seconds": opened - started}


def read_pages(folder: Path) -> None:
    """Read these files, so that the system holds them in memory."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def forget_pages(folder: Path) -> None:
    """Ask the system to drop what it holds of these files in memory."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("this system cannot be asked to drop pages; leave the cold start out")
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def epoch(options: argparse.Namespace) -> Figures:
    """Open a cache and its index table, and gather every row once, in random batches on tier DISK."""
    with Peak() as memory:
        started = time.perf_counter()
        store = open_store(options.folder, checksums=options.checksums)
        (table,) = CacheDirectory(options.folder).tables([ENCODER])
        numbers = torch.from_numpy(store.rows_of(table.keys[ENCODER].reshape(-1, 2)))
        seen = 0
        for indices in random_batches(options.rows, options.batch):
            check_rows(store.gather(numbers[indices]), indices)
            seen += len(indices)
        seconds = time.perf_counter() - started
    assert seen == options.rows
    return {"seconds": seconds, "anonymous_left": memory.left, "anonymous_highest": memory.highest}


def fit(options: argparse.Namespace) -> Figures:
    """Fit for a few steps on tier DISK: the time to the first step, and anonymous memory."""
    from benchmarks.fills import cheap_fit  # imports Lightning, which the others need not wait for

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # not before: the import sets it
    if options.shard_bytes:
        disk.SHARD_BYTES = options.shard_bytes
    return cheap_fit(options.folder, options.rows, options.batch, options.checksums)


def write(options: argparse.Namespace) -> Figures:
    """Write rows through a store, or in one plain file: bytes a second of keys and rows.

    They are written once to warm up. Memory that a virtual machine has not used for a while is slow at first touch: the
    same plain file took 0.06 s and 0.8 s for each 256 MB, by what had run before.
    """
    keys = keys_of(range(options.rows))
    rows = torch.cat([block for _, block in row_blocks(options.rows)])
    size = rows.numel() * rows.element_size() + keys.nbytes
    work = partial(_write_store if options.contender == "store" else _write_plain, keys, rows, options)
    work(options.folder / "warm-up")
    shutil.rmtree(options.folder / "warm-up")
    os.sync()  # dirty pages of the one before must not be written in this one's time
    started, worked = time.perf_counter(), time.process_time()
    work(options.folder / "work")
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    if options.contender == "store":
        found = open_store(options.folder / "work").get_many(keys)
        same = len(found.positions) == options.rows and torch.equal(found.values, rows)
    else:
        same = torch.equal(load_file(options.folder / "work" / PLAIN)["values"], rows)
    if not same:
        raise SystemExit(f"{options.contender} wrote other rows; no figure is given")
    return {"seconds": seconds, "processor_seconds": processor, "bytes_per_second": size / seconds}


def _write_store(keys: KeyArray, rows: torch.Tensor, options: argparse.Namespace, folder: Path) -> None:
    store = open_store(folder)
    store.directory.mkdir(parents=True)  # a fill has it: its lock lies there
    for start in range(0, len(rows), options.batch):
        store.put_many(keys[start : start + options.batch], rows[start : start + options.batch])
    store.flush()


def _write_plain(keys: KeyArray, rows: torch.Tensor, options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"keys": torch.from_numpy(keys), "values": rows}, folder / PLAIN)
    if options.contender == "plain-fsync":
        descriptor = os.open(folder / PLAIN, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)


def keys(options: argparse.Namespace) -> Figures:
    """Hash short texts: diagnoses of about seven words."""
    diagnoses = [diagnosis.text for diagnosis in read_tabular()]
    texts = [f"{text}" for text in islice(cycle(diagnoses), options.rows)]
    started = time.perf_counter()
    found = content_keys(texts)
    seconds = time.perf_counter() - started
    expected = np.frombuffer(b"".join(xxh3_128_digest(b"t" + text.encode()) for text in texts[:1000]), "<i8")
    if not np.array_equal(found[:1000].reshape(-1), expected):
        raise SystemExit("keys are not the hashes that the format names; no figure is given")
    return {
        "seconds": seconds,
        "per_second": len(texts) / seconds,
        "characters": sum(map(len, diagnoses)) / len(diagnoses),
    }


def identity(options: argparse.Namespace) -> Figures:
    """Find the identity of an encoder of so many bytes, for the first time in a process and again."""
    width = 1024
    layers = max(1, options.bytes // (4 * width * width))
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    encoder = ModuleEncoder(module, torch.stack, width)
    weights = sum(parameter.numel() * 4 for parameter in module.parameters())
    started = time.perf_counter()
    first = identify(encoder)
    between = time.perf_counter()
    again = identify(encoder)
    ended = time.perf_counter()
    with torch.no_grad():
        module[layers - 1].bias[-1] += 1e-3
    if first != again or identify(encoder) == first:
        raise SystemExit("the identity does not follow the weights; no figure is given")
    return {"bytes": weights, "seconds": between - started, "again_seconds": ended - between}


MEASURES: dict[str, Callable[[argparse.Namespace], Figures]] = {
    measure.__name__: measure for measure in (cache, first_look_up, epoch, fit, write, keys, identity)
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; ``None``: that of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bytes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=0)
    parser.add_argument("--contender", choices=("store", "plain", "plain-fsync"), default="store")
    parser.add_argument("--no-checksums", dest="checksums", action="store_false")
    parser.add_argument("--cold", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the measure that the command line names."""
    options = parse()
    warnings.filterwarnings("ignore")
    logging.getLogger("quatcache").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(json.dumps(MEASURES[options.measure](options)))


if __name__ == "__main__":
    main()
