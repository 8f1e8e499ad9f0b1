"""A manifest that was damaged or lost is made again from its shards: they name their encoder and digest themselves.

A month of rows must not hang on one small file. What is lost with it is the environment of the fill, so the next run
compares some rows with the encoder; and the order of the shards, for which their times stand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from quatcache.errors import DamagedFileError, FormatError, StoreError
from quatcache.store.files import MANIFEST_LOCK, locked
from quatcache.store.manifest import Manifest
from quatcache.store.shards import is_shard_name, judge_alone

__all__ = ["change_manifest", "mended_manifest", "read_manifest", "sure_manifest"]

logger = logging.getLogger(__name__)


def read_manifest(directory: Path, expected: Manifest) -> Manifest | None:
    """Read the manifest of a store directory; None if there is none.

    Args:
        directory: The directory.
        expected: A manifest of the encoder whose rows are wanted.

    Raises:
        DamagedFileError: It is not what was written.
        FormatError: It is of a newer version, or of another encoder.
        StoreError: It cannot be read.
    """
    manifest = Manifest.read(directory)
    if manifest is not None and manifest.digest != expected.digest:
        raise FormatError(
            f"{directory} belongs to encoder {manifest.digest}, not {expected.digest}; do not rename cache "
            "directories: delete it, or point save_dir elsewhere."
        )
    return manifest


def mended_manifest(directory: Path, expected: Manifest) -> Manifest | None:
    """Read the manifest; if it was damaged or lost, make it again, and write it where that is permitted.

    Arguments, result and errors are those of :func:`read_manifest`, but damage is no error.
    """
    with suppress(DamagedFileError):
        manifest = read_manifest(directory, expected)
        if manifest is not None or not _shards_in(directory):
            return manifest
    try:
        with locked(directory / MANIFEST_LOCK):  # a first commit has its shard before its manifest
            manifest = sure_manifest(directory, expected)
            manifest.write(directory)
            return manifest
    except StoreError:
        return sure_manifest(directory, expected)


def sure_manifest(directory: Path, expected: Manifest) -> Manifest:
    """Read the manifest, or make it from the shards that are whole; the caller holds its lock, if that is permitted.

    Args:
        directory: The directory.
        expected: A manifest of the encoder; it is also the answer where nothing is there.

    Raises:
        FormatError: It is of a newer version, or of another encoder.
        StoreError: The directory cannot be read.
    """
    try:
        manifest = read_manifest(directory, expected)
        if manifest is not None:
            return manifest
        if not _shards_in(directory):
            return replace(expected, shards=())
        logger.warning("%s has shards but no manifest; it is made again from them.", directory)
    except DamagedFileError as error:
        logger.warning("%s", error)
    manifest = replace(expected, shards=(), environment={}, verified=())  # unknown: they were in what is lost
    for path in _shards_in(directory):
        try:
            entry, kind = judge_alone(path, expected.digest)
            manifest = manifest.with_shard(entry, kind)
        except FormatError as error:
            logger.warning("%s", error)
    return manifest


def change_manifest(directory: Path, expected: Manifest, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Change the manifest in its directory.

    Args:
        directory: The directory.
        expected: A manifest of the encoder.
        change: Gives another manifest, or the same one.

    Returns:
        What is there now.

    Raises:
        FormatError: It is of a newer version, or of another encoder.
        StoreError: The directory cannot be read or written.
    """
    with locked(directory / MANIFEST_LOCK):
        current = sure_manifest(directory, expected)
        changed = change(current)
        if changed is not current:
            changed.write(directory)
    return changed


def _shards_in(directory: Path) -> list[Path]:
    """Find the files that may be shards, oldest first."""
    try:
        files = [(path.stat().st_mtime_ns, path) for path in directory.iterdir() if is_shard_name(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot read {directory}: {error.strerror or error}; permit reading it.") from error
    return [path for _, path in sorted(files)]
