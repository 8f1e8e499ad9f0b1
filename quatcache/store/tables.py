"""Index tables: which key item *i* of a dataset has, and its target.

A table lets a warm start skip the reading of a dataset. It is a file of its own, named by a hash of what it holds:
the same dataset writes the same file, a changed one writes another, and none is ever modified. Nothing says which
dataset a table belongs to; the dataset shows that itself, when a sample of its items is compared with the table.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from quatcache.errors import DamagedFileError, FormatError, StoreError
from quatcache.keys import KeyArray
from quatcache.store.files import content_digest, make_directory, open_tensors, write_tensors

__all__ = ["DatasetTable", "is_table_name", "read_table", "read_tables", "write_table"]

logger = logging.getLogger(__name__)

TABLE_VERSION = 1

_TABLE_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True)
class DatasetTable:
    """Keys and targets of one dataset, by index.

    Attributes:
        keys: For each encoder name the keys of the items, int64 ``(N, k, 2)``: k items a sample (2 for pairs).
        targets: Target columns, each ``(N, ...)``; None if they were not cached.
        layout: Name of the sample layout.
        file: Where it was read from; None: nowhere.
    """

    keys: Mapping[str, KeyArray]
    targets: tuple[torch.Tensor, ...] | None
    layout: str
    file: Path | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Count the samples."""
        return len(next(iter(self.keys.values())))

    def head(self, size: int) -> DatasetTable:
        """Cut the table down to its first samples."""
        targets = None if self.targets is None else tuple(column[:size] for column in self.targets)
        return replace(self, keys={name: keys[:size] for name, keys in self.keys.items()}, targets=targets)


def write_table(directory: Path, table: DatasetTable) -> Path:
    """Write a table, unless the same one is there.

    Raises:
        StoreError: The directory cannot be written.
    """
    names = sorted(table.keys)
    tensors = {f"keys.{place}": torch.from_numpy(table.keys[name]) for place, name in enumerate(names)}
    for place, column in enumerate(table.targets or ()):
        tensors[f"target.{place}"] = column
    about = {
        "version": TABLE_VERSION,
        "samples": len(table),
        "layout": table.layout,
        "encoders": names,
        "targets": None if table.targets is None else len(table.targets),
    }
    digest = content_digest(about, tensors)
    path = directory / f"{digest}.safetensors"
    try:
        read_table(path)
    except (FormatError, StoreError):  # not there, or damaged since
        make_directory(path.parent)
        write_tensors(path, tensors, {"quatcache": json.dumps(about, sort_keys=True)})
    return path


def read_tables(directory: Path, encoders: Sequence[str], damaged: set[Path]) -> Iterator[DatasetTable]:
    """Give the tables that know all these encoders, newest first.

    Args:
        directory: Where they are.
        encoders: Names of encoders.
        damaged: Tables to pass over; a damaged one is told in a warning, and put here.
    """
    if not directory.is_dir():
        return
    ages = {}
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # deleted meanwhile
            if is_table_name(path.name) and path not in damaged:  # others are being written, under temporary names
                ages[path] = path.stat().st_mtime_ns
    for path in sorted(ages, key=lambda path: ages[path], reverse=True):
        try:
            table = read_table(path)
        except (FormatError, StoreError) as error:
            logger.warning("%s The dataset is read again.", error)
            if isinstance(error, DamagedFileError):
                damaged.add(path)
            continue
        if set(encoders) <= set(table.keys):
            yield table


def is_table_name(name: str) -> bool:
    """Say whether a file name may be that of a table."""
    return _TABLE_NAME.fullmatch(name) is not None


def read_table(path: Path) -> DatasetTable:
    """Read one table, and compare its content with its name.

    Raises:
        DamagedFileError: It is not what was written.
        FormatError: It is missing, or of a newer version.
        StoreError: It cannot be read.
    """
    tensors, metadata = open_tensors(path)
    try:
        about = json.loads(metadata["quatcache"])
        if about["version"] > TABLE_VERSION:
            raise FormatError(f"{path} has version {about['version']}, this quatcache reads up to {TABLE_VERSION}.")
        if content_digest(about, tensors) != path.stem:
            raise DamagedFileError(f"{path} is damaged: its content does not hash to its name.")
        keys = {str(name): tensors[f"keys.{place}"].numpy() for place, name in enumerate(about["encoders"])}
        count = about["targets"]
        targets = None if count is None else tuple(tensors[f"target.{place}"] for place in range(count))
        _check_sizes(about["samples"], keys, targets)
        return DatasetTable(keys, targets, str(about["layout"]), path)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise DamagedFileError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def _check_sizes(samples: object, keys: Mapping[str, KeyArray], targets: tuple[torch.Tensor, ...] | None) -> None:
    widths = {array.shape[1:] for array in keys.values()}
    whole = all(array.dtype == np.int64 and array.ndim == 3 and len(array) == samples for array in keys.values())
    if not whole or len(widths) != 1 or next(iter(widths))[-1] != 2:
        raise ValueError("keys of another shape or dtype than (samples, items, 2) int64")
    if not all(column.ndim and len(column) == samples for column in targets or ()):
        raise ValueError(f"a target column without {samples} rows")
