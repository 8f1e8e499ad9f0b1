"""What a user says about caching: one immutable object, checked when it is built."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from functools import wraps
from typing import Any, Literal, TypeVar

import torch

from quatcache.errors import ConfigError, QuatcacheError, shorten
from quatcache.keys import KeyExtractor
from quatcache.settings import byte_budget, check_save_dir, check_verify, float_dtype, is_count
from quatcache.units import counted

__all__ = ["CacheConfig", "CacheType", "checked_config"]

_T = TypeVar("_T")


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


def _naming_unknown_settings(cls: type[_T]) -> type[_T]:
    """Let a class refuse keywords that it does not know with the closest one that it does."""
    plain: Any = cls.__init__
    known = list(inspect.signature(plain).parameters)[1:]

    @wraps(plain)
    def checked(self: _T, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
                raise ConfigError(f"{cls.__name__} has no setting {name}; {remedy}")
        plain(self, *args, **settings)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_naming_unknown_settings
@dataclass(frozen=True)
class CacheConfig:
    """How the frozen encoders of a model are cached.

    Attributes:
        cache_type: Tier for the encoders that ``mapping`` does not name.
        mapping: Tier by encoder name.
        batch_size: Upper bound of items per encoder call, in the fill and in steps that encode, at least 1; the batches
            of training are not concerned.
        num_workers: Processes that read the datasets and extract keys in the fill; None or 0: this process alone.
        save_dir: Directory in which caches persist from run to run; None: in memory, for one run.
        key_extractors: One function for all encoders, or one by encoder name, from an item to a str, bytes, int,
            float, bool, None or tuple of these; items of equal keys share a row. None: keys are hashes of the content.
        labels: ``"auto"``: cache targets when every encoder is cached, keys are the default ones and the fill is
            single-process; ``True``: also with workers and key extractors; ``False``: never.
        dtype: Storage dtype of floating rows, for instance ``torch.float16`` or ``"float16"``; None: as the encoder
            gives them. Look-ups return the encoder's dtype.
        max_size: Byte budget of each encoder's rows, a number or a size such as ``"8GiB"``; items beyond it are encoded
            each time they are met, in the same step. None: no limit. Nothing that is stored already is removed.
        num_views: Versions of each sample that are cached, for datasets that augment: each is read under seeds of its
            own, and one is chosen per epoch. Datasets that give the same items each time are cached once.
        fill: ``"eager"``: one pass over the data before the run; ``"lazy"``: rows are cached as batches meet them. Rows
            of an IterableDataset, and of a run that takes less than half of a dataset, are cached as they are met too.
        on_miss: What a step does with an item whose row is not cached: ``"encode"`` it, or ``"error"``.
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
    max_size: int | str | None = None
    num_views: int = 1
    fill: Literal["eager", "lazy"] = "eager"
    on_miss: Literal["encode", "error"] = "encode"
    verify: Literal["auto"] | int = "auto"
    checksums: bool = True
    memory_map: bool = True

    def __post_init__(self) -> None:
        """Check every field, and turn names into what they name."""
        set_ = object.__setattr__
        set_(self, "cache_type", _tier("cache_type", self.cache_type))
        if not isinstance(self.mapping, Mapping):
            raise ConfigError(f"mapping is {shorten(self.mapping)}; give a dict of encoder names to tiers.")
        set_(self, "mapping", {name: _tier(f"mapping[{name!r}]", tier) for name, tier in dict(self.mapping).items()})
        float_dtype(self.dtype)
        if not is_count(self.batch_size, 1):
            raise ConfigError(f"batch_size is {self.batch_size!r}; give the items per encoder call, at least 1.")
        if self.num_workers is not None and not is_count(self.num_workers, 0):
            raise ConfigError(f"num_workers is {self.num_workers!r}; give a number of processes, 0 for none, or None.")
        if self.labels not in ("auto", True, False) or isinstance(self.labels, int) != isinstance(self.labels, bool):
            raise ConfigError(f"labels is {self.labels!r}; use 'auto', True or False.")
        given = self.key_extractors
        extractors: Mapping[Any, Any] = given if isinstance(given, Mapping) else {None: given}
        for extractor in extractors.values():
            if not callable(extractor):
                raise ConfigError(
                    f"key_extractors {'holds' if extractors is given else 'is'} {shorten(extractor)}; give a function "
                    "from an item to its key, or a dict of them by encoder name."
                )
        check_save_dir(self.save_dir)
        if not is_count(self.num_views, 1):
            raise ConfigError(f"num_views is {self.num_views!r}; give the versions of each sample, at least 1.")
        if self.num_views > 1 and extractors:
            raise ConfigError(
                f"num_views is {self.num_views} and key_extractors are set, so the views of a sample would share one "
                "key and one row; use one of the two."
            )
        set_(self, "max_size", byte_budget(self.max_size))
        for setting, values in (("fill", ("eager", "lazy")), ("on_miss", ("encode", "error"))):
            if getattr(self, setting) not in values:
                raise ConfigError(f"{setting} is {getattr(self, setting)!r}; use {values[0]!r} or {values[1]!r}.")
        if self.fill == "lazy" and self.on_miss == "error":
            raise ConfigError(
                "fill is 'lazy' and on_miss is 'error', so the first batch would end the run; use fill='eager' or "
                "on_miss='encode'."
            )
        check_verify(self.verify)
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
        return float_dtype(self.dtype)

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
            workers = counted(self.num_workers, "worker")
            return False, f"the fill has {workers} (labels=True caches them all the same)"
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


def checked_config(
    config: object, found: str, error: type[QuatcacheError] = ConfigError, remedy: str = "return"
) -> CacheConfig | None:
    """Give a config back, and refuse what is none.

    Args:
        config: What was found; None: nothing is to be cached.
        found: Beginning of the message: where it was found, and a verb.
        error: What is raised.
        remedy: What to do with a CacheConfig there.

    Example:
        >>> checked_config({}, "config is", remedy="pass")
        Traceback (most recent call last):
        quatcache.errors.ConfigError: config is {}; pass a CacheConfig, or None.
    """
    if config is None or isinstance(config, CacheConfig):
        return config
    raise error(f"{found} {shorten(config)}; {remedy} a CacheConfig, or None.")


def _tier(setting: str, value: object) -> CacheType:
    try:
        return CacheType(value.lower() if isinstance(value, str) and not isinstance(value, CacheType) else value)
    except ValueError:
        names = ", ".join(tier.name for tier in CacheType)
        raise ConfigError(f"{setting} is {value!r}; use one of CacheType.{names}.") from None
