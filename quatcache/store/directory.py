"""A save_dir: one store directory per encoder identity, and the index tables beside them.

    save_dir/
      encoders/<digest>[-<storage dtype>]/manifest.json, shard-*.safetensors
      datasets/<digest>.safetensors

Names come from hashes, never from users or files, so none can lead out of the directory. Nothing is made before the
first write: a directory that may only be read serves warm starts.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from quatcache.errors import FormatError, StoreError
from quatcache.store.disk import DiskStore
from quatcache.store.manifest import Manifest
from quatcache.store.tables import DatasetTable, read_tables, write_table

__all__ = ["CacheDirectory", "environment"]

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


def environment() -> dict[str, str]:
    """Describe what the same encoder may answer differently under: library versions and hardware.

    Example:
        >>> sorted(environment())[:2]
        ['hardware', 'numpy']
    """
    known = {"hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}
    for library in _LIBRARIES:
        try:
            known[library] = version(library)
        except PackageNotFoundError:
            continue
    return known


class CacheDirectory:
    """Everything that persists under one ``save_dir``.

    Args:
        path: The directory; made at the first write.

    Example:
        >>> import tempfile
        >>> directory = CacheDirectory(tempfile.mkdtemp())
        >>> len(directory.store("0" * 32, {}))
        0
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the directory; nothing is read or made."""
        self.path = Path(path).expanduser().absolute()  # a later chdir must not move it

    def store(self, digest: str, facts: Mapping[str, Any], dtype: torch.dtype | None = None) -> DiskStore:
        """Open the rows of one encoder identity, in one storage dtype.

        Raises:
            FormatError: The store is damaged beyond its single shards, or of a newer version.
            StoreError: It cannot be read.
        """
        return DiskStore(self._store_path(digest, dtype), digest, facts=facts, environment=environment(), dtype=dtype)

    def _store_path(self, digest: str, dtype: torch.dtype | None) -> Path:
        if not digest.isalnum():
            raise StoreError(f"{digest!r} is not a digest; identities are 32 hexadecimal characters.")
        suffix = "" if dtype is None else f"-{str(dtype).removeprefix('torch.')}"
        return self.path / "encoders" / (digest + suffix)

    def manifests(self) -> Iterator[Manifest]:
        """Give the manifests of all encoders that have rows here; a damaged one is passed over."""
        for directory in sorted(self.path.glob("encoders/*")):
            try:
                manifest = Manifest.read(directory)
            except (FormatError, StoreError):
                continue
            if manifest is not None:
                yield manifest

    def tables(self, encoders: Sequence[str]) -> Iterator[DatasetTable]:
        """Give the index tables that know all these encoders, newest first."""
        return read_tables(self.path / "datasets", encoders)

    def write_table(self, table: DatasetTable) -> Path:
        """Keep the index table of a dataset.

        Raises:
            StoreError: The directory cannot be written.
        """
        return write_table(self.path / "datasets", table)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Be the one process that fills this directory; wait, and say so, while another one is.

        The lock dies with its process, so a killed fill does not block the next.

        Raises:
            StoreError: The directory cannot be written, told before anything is computed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".fill.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("Another process is filling %s: waiting for its rows.", self.path)
                lock.acquire()
        except OSError as error:
            raise StoreError(
                f"cannot write into save_dir {self.path}: {error.strerror or error}; permit writing there, name "
                "another save_dir, or leave it unset to cache in memory."
            ) from error
        try:
            yield
        finally:
            lock.release()
