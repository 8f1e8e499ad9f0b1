"""The manifest of one store: which shards belong to it, and which encoder made their rows.

It is the only file that changes. Shards are written first and named in it afterwards, so a reader sees a shard wholly
or not at all, and a shard without an entry is an orphan that nobody reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128_hexdigest

from quatcache.errors import DamagedFileError, FormatError
from quatcache.store.files import read_json, write_json
from quatcache.store.protocol import RowShape
from quatcache.store.safetensors_writer import DTYPES
from quatcache.store.shards import RowKind, ShardEntry, is_shard_name

__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "Manifest"]

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
"""The newest version that is read. Version 2 has sequences; a store of rows of one shape is written as version 1."""


@dataclass(frozen=True)
class Manifest:
    """What one store directory holds.

    Attributes:
        digest: Identity of the encoder, 32 hex characters.
        facts: What the identity was made from, for explaining a miss.
        row_shape: Shape of one row, of sequences with None first; None before the first shard.
        dtype: Storage dtype.
        given_dtype: Dtype that the encoder gives, to which look-ups convert.
        environment: Library versions and hardware at the first commit.
        created: UTC time of the first commit, ISO 8601.
        shards: Committed shards in row order.
        verified: Other environments in which the encoder was seen to give the rows that are here.
        effort: How many rows were encoded in a measured time, and that time in seconds.
    """

    digest: str
    facts: Mapping[str, Any]
    environment: Mapping[str, str]
    row_shape: RowShape | None = None
    dtype: torch.dtype | None = None
    given_dtype: torch.dtype | None = None
    created: str = ""
    shards: tuple[ShardEntry, ...] = ()
    verified: tuple[Mapping[str, str], ...] = ()
    effort: tuple[int, float] = (0, 0.0)

    @property
    def kind(self) -> RowKind | None:
        """What all rows have in common; None before the first shard."""
        if self.row_shape is None or self.dtype is None or self.given_dtype is None:
            return None
        return RowKind(self.row_shape, self.dtype, self.given_dtype)

    @property
    def longest(self) -> int | None:
        """Length of the longest sequence; None if rows are none, or it is not known."""
        lengths = [shard.longest for shard in self.shards]
        return None if None in lengths else max((length or 0 for length in lengths), default=None)

    @property
    def rows(self) -> int:
        """Count the committed rows."""
        return sum(shard.rows for shard in self.shards)

    def with_environment(self, environment: Mapping[str, str]) -> Manifest:
        """Add an environment in which the encoder gives the same rows."""
        if environment in (self.environment, *self.verified):
            return self
        return replace(self, verified=(*self.verified, dict(environment)))

    def with_effort(self, rows: int, seconds: float) -> Manifest:
        """Add rows that were encoded in some seconds."""
        return replace(self, effort=(self.effort[0] + rows, self.effort[1] + seconds))

    def with_shard(self, shard: ShardEntry, kind: RowKind) -> Manifest:
        """Add a shard, unless it is there; its rows must be like those that are.

        Raises:
            FormatError: The store holds rows of another shape or dtype.
        """
        if shard in self.shards:
            return self
        if self.shards and self.kind != kind:
            raise FormatError(
                f"the store of encoder {self.digest} holds {self.kind}, not {kind}; delete its directory to have it "
                "filled again."
            )
        created = self.created or datetime.now(timezone.utc).isoformat(timespec="seconds")
        return replace(self, **vars(kind), created=created, shards=(*self.shards, shard))

    def without(self, files: Collection[str]) -> Manifest:
        """Drop the entries of some shards, by file name."""
        return replace(self, shards=tuple(shard for shard in self.shards if shard.file not in files))

    def write(self, directory: Path) -> None:
        """Write the manifest into a store directory, atomically."""
        content = {
            "format": "quatcache",
            "version": 2 if self.kind is not None and self.kind.ragged else 1,
            "identity": {"digest": self.digest, "facts": dict(self.facts)},
            "environment": dict(self.environment),
            "created": self.created,
            "row_shape": None if self.row_shape is None else list(self.row_shape),
            "dtype": _dtype_name(self.dtype),
            "given_dtype": _dtype_name(self.given_dtype),
            "shards": [
                {name: value for name, value in vars(shard).items() if value is not None} for shard in self.shards
            ],
            "verified": [dict(environment) for environment in self.verified],
            "effort": {"rows": self.effort[0], "seconds": self.effort[1]},
        }
        write_json(directory / MANIFEST_NAME, {**content, "xxh3": _checksum(content)})

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """Read the manifest of a store directory; None if there is none.

        Raises:
            DamagedFileError: It is not what was written.
            FormatError: It is of a newer version.
            StoreError: It cannot be read.
        """
        path = directory / MANIFEST_NAME
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        version = content.get("version")
        if content.get("format") != "quatcache" or type(version) is not int or version < 1:
            raise DamagedFileError(f"{path} is not a quatcache manifest; it is made again when the cache is next used.")
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {version}, this quatcache reads up to {FORMAT_VERSION}; "
                "upgrade quatcache or use another save_dir."
            )
        try:
            if content.pop("xxh3") != _checksum(content):
                raise ValueError("it does not match its checksum")
            return cls._parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFileError(
                f"{path} is damaged ({type(error).__name__}: {error}); it is made again when the cache is next used."
            ) from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> Manifest:
        shape, dtype, given_dtype = content["row_shape"], _dtype(content["dtype"]), _dtype(content["given_dtype"])
        shards = tuple(_shard(entry) for entry in content["shards"])
        if shards and (shape is None or dtype is None or given_dtype is None):
            raise ValueError("shards without row_shape, dtype or given_dtype")
        if dtype != given_dtype and not all(known and known.is_floating_point for known in (dtype, given_dtype)):
            raise ValueError(f"rows of {dtype} cannot stand for rows of {given_dtype}")
        return cls(
            digest=str(content["identity"]["digest"]),
            facts=dict(content["identity"]["facts"]),
            environment=_strings(content["environment"]),
            row_shape=None if shape is None else _row_shape(shape, content["version"]),
            dtype=dtype,
            given_dtype=given_dtype,
            created=str(content["created"]),
            shards=shards,
            verified=tuple(_strings(environment) for environment in content.get("verified", ())),
            effort=_effort(content.get("effort", {"rows": 0, "seconds": 0.0})),
        )


def _checksum(content: Mapping[str, Any]) -> str:
    """Hash what a manifest says: a flipped bit in it could turn rows into others as surely as one in a shard."""
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    file, digest = entry["file"], entry["xxh3"]
    if not is_shard_name(file):
        raise ValueError(f"a shard is named {file!r}")
    if not isinstance(digest, str):
        raise ValueError(f"the checksum of {file} is {digest!r}")
    longest = entry.get("longest")
    return ShardEntry(
        file, _count(entry["rows"]), _count(entry["bytes"]), digest, None if longest is None else _count(longest)
    )


def _row_shape(shape: Any, version: int) -> RowShape:
    """Read the shape of a row; sequences, null first, are known from version 2 on."""
    ragged = version > 1 and shape[:1] == [None]
    return (*(None for _ in range(ragged)), *(_count(size) for size in shape[ragged:]))


def _effort(content: Mapping[str, Any]) -> tuple[int, float]:
    seconds = float(content["seconds"])
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} is not a time")
    return _count(content["rows"]), seconds


def _strings(content: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in content.items()}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value


def _dtype(name: Any) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
