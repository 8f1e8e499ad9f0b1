"""What a user says about caching: one immutable object, checked when it is built."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import torch

from quatcache.errors import ConfigError
from quatcache.keys import KeyExtractor

__all__ = ["CacheConfig", "CacheType"]


class CacheType(str, Enum):
    """Tier on which the rows of an encoder are kept while a model trains.

    Attributes:
        NONE: Not cached.
        AUTO: GPU, CPU or DISK, by what is free.
        CPU: In main memory.
        GPU: In the memory of the device that trains.
        DISK: In memory-mapped files of ``save_dir``; may exceed main memory.
    """

    NONE = "none"
    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"
    DISK = "disk"


@dataclass(frozen=True)
class CacheConfig:
    """How the frozen encoders of a model are cached.

    Attributes:
        cache_type: Tier for the encoders that ``mapping`` does not name.
        mapping: Tier by encoder name.
        batch_size: Upper bound of items per encoder call in the fill, at least 1; training is not concerned.
        num_workers: Processes that read the datasets and extract keys in the fill; None or 0: this process alone.
        save_dir: Directory in which caches persist from run to run; None: in memory, for one run.
        key_extractors: One function for all encoders, or one by encoder name, from an item to a str, bytes, int,
            float, bool, None or tuple of these; items of equal keys share a row. None: keys are hashes of the content.
        labels: ``"auto"``: cache targets when every encoder is cached, keys are the default ones and the fill is
            single-process; ``True``: also with workers and key extractors; ``False``: never.
        dtype: Storage dtype of floating rows, for instance ``torch.float16`` or ``"float16"``; None: as the encoder
            gives them. Look-ups return the encoder's dtype.
        verify: Stored rows that are encoded again and compared before any is used: ``"auto"``: 8, if library versions
            or hardware differ from those of the fill; a number: so many in each run; 0: none.
        checksums: Compare each file of rows with its checksum when it is opened; False saves reading a huge cache whole
            at each start, and leaves damage to be noticed by ``verify`` alone.
        memory_map: Map files of rows into memory; False: read them whole, which network disks do faster. Tier DISK
            needs the map.

    Raises:
        ConfigError: A value that cannot work; the message gives it and the remedy.

    Example:
        >>> CacheConfig(CacheType.CPU, batch_size=64).batch_size
        64
    """

    cache_type: CacheType = CacheType.AUTO
    mapping: Mapping[str, CacheType] = field(default_factory=dict)
    batch_size: int = 32
    num_workers: int | None = None
    save_dir: str | os.PathLike[str] | None = None
    key_extractors: Mapping[str, KeyExtractor] | KeyExtractor = field(default_factory=dict)
    labels: Literal["auto"] | bool = "auto"
    dtype: torch.dtype | str | None = None
    verify: Literal["auto"] | int = "auto"
    checksums: bool = True
    memory_map: bool = True

    def __post_init__(self) -> None:
        """Check every field, and turn names into what they name."""
        set_ = object.__setattr__
        set_(self, "cache_type", _tier("cache_type", self.cache_type))
        set_(self, "mapping", {name: _tier(f"mapping[{name!r}]", tier) for name, tier in dict(self.mapping).items()})
        _float_dtype(self.dtype)
        if not _is_count(self.batch_size, 1):
            raise ConfigError(f"batch_size is {self.batch_size!r}; give the items per encoder call, at least 1.")
        if self.num_workers is not None and not _is_count(self.num_workers, 0):
            raise ConfigError(f"num_workers is {self.num_workers!r}; give a number of processes, 0 for none, or None.")
        if self.labels not in ("auto", True, False) or isinstance(self.labels, int) != isinstance(self.labels, bool):
            raise ConfigError(f"labels is {self.labels!r}; use 'auto', True or False.")
        extractors = [self.key_extractors] if callable(self.key_extractors) else list(self.key_extractors.values())
        for extractor in extractors:
            if not callable(extractor):
                raise ConfigError(
                    f"key_extractors holds {extractor!r}; give a function from an item to its key, or a dict of them "
                    "by encoder name."
                )
        if self.verify != "auto" and not _is_count(self.verify, 0):
            raise ConfigError(f"verify is {self.verify!r}; give a number of rows, 0 for none, or 'auto'.")
        for setting in ("checksums", "memory_map"):
            if not isinstance(getattr(self, setting), bool):
                raise ConfigError(f"{setting} is {getattr(self, setting)!r}; use True or False.")
        if CacheType.DISK in self.tiers() and self.save_dir is None:
            raise ConfigError("tier DISK keeps rows in files, but save_dir is None; name a directory as save_dir.")
        if CacheType.DISK in self.tiers() and not self.memory_map:
            raise ConfigError("tier DISK trains from a memory map, but memory_map is False; use CPU, GPU or AUTO.")

    @property
    def storage_dtype(self) -> torch.dtype | None:
        """The dtype that ``dtype`` names; None: as the encoder gives it."""
        return _float_dtype(self.dtype)

    def tiers(self) -> set[CacheType]:
        """List the tiers that are asked for by name or by default."""
        return {self.cache_type, *self.mapping.values()}

    def tier_of(self, encoder: str) -> CacheType:
        """Give the tier asked for one encoder."""
        return self.mapping.get(encoder, self.cache_type)

    def extractor_of(self, encoder: str) -> KeyExtractor | None:
        """Give the key extractor of one encoder; None: keys are hashes of the content."""
        if callable(self.key_extractors):
            return self.key_extractors
        return self.key_extractors.get(encoder)

    def decide_labels(self, cached: Collection[str], encoders: Collection[str]) -> tuple[bool, str]:
        """Decide whether targets are cached.

        Args:
            cached: Names of the encoders that are cached.
            encoders: Names of all encoders.

        Returns:
            The decision, and why, for people.
        """
        others = sorted(set(encoders) - set(cached))
        if self.labels is False:
            return False, "labels=False"
        if others:
            return False, f"encoder {others[0]!r} is not cached, so the dataset is read anyway"
        if self.labels is True:
            return True, "labels=True"
        if any(self.extractor_of(name) is not None for name in cached):
            return False, "keys come from key_extractors (labels=True caches them all the same)"
        if self.num_workers:
            return False, f"the fill has {self.num_workers} workers (labels=True caches them all the same)"
        return True, "every encoder is cached, keys are the default ones and the fill is single-process"

    def check_against(self, trainable: Mapping[str, bool]) -> None:
        """Hold the names of the config against the encoders of a model.

        Args:
            trainable: For each encoder of the model whether it is trainable.

        Raises:
            ConfigError: A name that the model lacks, a trainable encoder with a tier of its own, or a GPU tier without
                a GPU.
        """
        extractors: Collection[str] = () if callable(self.key_extractors) else self.key_extractors.keys()
        for setting, names in (("mapping", self.mapping.keys()), ("key_extractors", extractors)):
            for name in names:
                if name not in trainable:
                    known = ", ".join(repr(known) for known in sorted(trainable))
                    raise ConfigError(f"{setting} names encoder {name!r}, the model has {known}; use one of these.")
        for name, tier in self.mapping.items():
            if trainable[name] and tier is not CacheType.NONE:
                raise ConfigError(
                    f"mapping asks for tier {tier.name} for encoder {name!r}, which is trainable: its rows change; "
                    "remove it from mapping, or set trainable = False."
                )
        cached = [self.tier_of(name) for name, changes in trainable.items() if not changes]
        if CacheType.GPU in cached and not torch.cuda.is_available():
            raise ConfigError("tier GPU was asked for, but CUDA is not available here; use CPU, DISK or AUTO.")


def _tier(setting: str, value: object) -> CacheType:
    try:
        return CacheType(value.lower() if isinstance(value, str) and not isinstance(value, CacheType) else value)
    except ValueError:
        names = ", ".join(tier.name for tier in CacheType)
        raise ConfigError(f"{setting} is {value!r}; use one of CacheType.{names}.") from None


def _float_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    known = {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    dtype = known.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in known.values():
        raise ConfigError(
            f"dtype is {value!r}; use one of {', '.join(known)}, or None to store what the encoder gives."
        )
    return dtype


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
