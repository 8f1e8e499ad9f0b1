"""A save_dir: one store directory per encoder identity, and the index tables beside them.

    save_dir/
      encoders/<digest>[-<storage dtype>]/manifest.json, shard-*.safetensors
      datasets/<digest>.safetensors
      models/<fingerprint>.json    which identity a model was found to have
      filling/<token>/             what the ranks of a run exchange while they fill together

A fill is alone in the directories of its encoders; fills of other encoders go on beside it.

Names come from hashes, never from users or files, so none can lead out of the directory. Nothing is made before the
first write: a directory that may only be read serves warm starts.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from quatcache.errors import FormatError, StoreError
from quatcache.store.disk import DiskStore
from quatcache.store.files import FILL_LOCK
from quatcache.store.known import MODELS, KnownModels
from quatcache.store.manifest import Manifest
from quatcache.store.parts import FILLING, remove_leftovers
from quatcache.store.tables import DatasetTable, read_tables, write_table
from quatcache.store.unfinished import TEMPORARY

__all__ = ["CacheDirectory", "environment"]

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 60.0

_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Describe what the same encoder may answer differently under: library versions and hardware.

    Args:
        device: Where the encoder computes.

    Example:
        >>> sorted(environment())[:2]
        ['hardware', 'numpy']
    """
    device = torch.device(device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = {"hardware": platform.machine() if device.type == "cpu" else hardware}
    return known | _versions()


@cache  # a process has loaded what it has loaded, whatever is installed or may be read later
def _versions() -> dict[str, str]:
    known = {}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            known[library] = version(library)
    return known


class CacheDirectory:
    """Everything that persists under one ``save_dir``.

    Args:
        path: The directory; made at the first write.
        verify_checksums: Compare each shard with its checksum when it is opened.
        memory_map: Map shards into memory; false: read them whole, for network disks.

    Attributes:
        path: Where that is.
        models: What earlier runs found out about models.

    Example:
        >>> import tempfile
        >>> directory = CacheDirectory(tempfile.mkdtemp())
        >>> len(directory.store("0" * 32, {}))
        0
    """

    def __init__(self, path: str | os.PathLike[str], *, verify_checksums: bool = True, memory_map: bool = True) -> None:
        """Name the directory; nothing is read or made."""
        self.path = Path(path).expanduser().absolute()  # a later chdir must not move it
        self._verify_checksums = verify_checksums
        self._memory_map = memory_map
        self._damaged: set[Path] = set()  # index tables
        self.models = KnownModels(self.path)

    def store(
        self,
        digest: str,
        facts: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> DiskStore:
        """Open the rows of one encoder identity, in one storage dtype.

        Args:
            digest: The identity.
            facts: What it was made from.
            dtype: Storage dtype of floating rows; None: as the encoder gives them.
            device: Where the encoder computes what is missing.

        Raises:
            FormatError: The store is of a newer version.
            StoreError: It cannot be read.
        """
        return DiskStore(
            self._store_path(digest, dtype),
            digest,
            facts=facts,
            environment=environment(device),
            dtype=dtype,
            verify_checksums=self._verify_checksums,
            memory_map=self._memory_map,
        )

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
        return read_tables(self.path / "datasets", encoders, self._damaged)

    def write_table(self, table: DatasetTable) -> Path:
        """Keep the index table of a dataset, and remove tables that were found damaged.

        Raises:
            StoreError: The directory cannot be written.
        """
        while self._damaged:  # else they would be told of at each start, for ever
            with suppress(OSError):
                self._damaged.pop().unlink()
        return write_table(self.path / "datasets", table)

    def mark_used(self, table: DatasetTable) -> None:
        """Leave a note that a table was of use now, where that is permitted: pruning goes by it."""
        if table.file is not None:
            with suppress(OSError):
                os.utime(table.file)

    def check_writable(self, stores: Sequence[DiskStore]) -> None:
        """See that rows can be written, before any is computed.

        Raises:
            StoreError: They cannot.
        """
        for directory in {store.directory for store in stores}:
            with self._refusing():
                self._try_writing(directory)

    @contextmanager
    def filling(self, stores: Sequence[DiskStore]) -> Iterator[None]:
        """Be the one process that fills these stores; wait, and say so, while another one does.

        The locks die with their process, so a killed fill does not block the next.

        Args:
            stores: Stores of this directory.

        Raises:
            StoreError: The directory cannot be written, told before anything is computed.
        """
        if self.path.is_file():
            raise StoreError(f"save_dir {self.path} is a file; name a directory.")
        with suppress(OSError):  # what cannot be listed can perhaps be written, and if not, that is told below
            others = (path for path in self.path.iterdir() if path.name not in (FILLING, MODELS))
            if not (self.path / "encoders").exists() and any(others):
                logger.info("save_dir %s holds other files; encoders/ and datasets/ are put beside them.", self.path)
        with ExitStack() as held:
            for directory in sorted({store.directory for store in stores}):  # one order for all: no two wait in a ring
                with self._refusing():
                    self._try_writing(directory)
                    lock = FileLock(directory / FILL_LOCK, thread_local=False)  # another thread may give it back
                    self._acquire(lock, directory)
                held.callback(lock.release)
            remove_leftovers(self.path)
            yield

    @staticmethod
    def _try_writing(directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory, prefix=TEMPORARY):  # a lock file may be there, and be writable
            pass

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (NotADirectoryError, FileExistsError) as error:
            raise StoreError(
                f"cannot write into save_dir {self.path}: {error.filename} leads through a file; name another "
                "save_dir, or leave it unset to cache in memory."
            ) from error
        except OSError as error:
            raise StoreError(
                f"cannot write into save_dir {self.path}: {error.strerror or error}; permit writing there, "
                "name another save_dir, or leave it unset to cache in memory."
            ) from error

    def _acquire(self, lock: BaseFileLock, directory: Path) -> None:
        """Take a lock; while another process has it, say every minute how far that one is."""
        timeout = 0.0
        while True:
            try:
                lock.acquire(timeout=timeout)
                return
            except Timeout:
                with suppress(FormatError, StoreError):
                    manifest = Manifest.read(directory)
                    logger.info(
                        "Another process is filling %s: waiting for its rows (%s so far).",
                        directory,
                        f"{manifest.rows if manifest else 0:,}",
                    )
            timeout = SECONDS_BETWEEN_MESSAGES
