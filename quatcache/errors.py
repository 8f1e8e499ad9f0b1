"""Every error quatcache raises: one base class, and beside it the builtin parent a caller would expect.

The message is always one sentence (two at most) that gives the offending value first and the remedy after it.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BatchFunctionError",
    "BatchLengthError",
    "CacheMissError",
    "CollateError",
    "ConfigError",
    "DamagedFileError",
    "EncoderOutputError",
    "FormatError",
    "KeyTypeError",
    "LoaderError",
    "MissingDependencyError",
    "ModelDefinitionError",
    "NotFrozenError",
    "QuatcacheError",
    "SampleError",
    "SlotIndexError",
    "SlotStateError",
    "SlotValueError",
    "StaleRowsError",
    "StoreError",
    "shorten",
]


class QuatcacheError(Exception):
    """Base of every error that quatcache raises on purpose."""


class ConfigError(QuatcacheError, ValueError):
    """A setting that cannot work: an unknown encoder name, a tier this machine lacks, a negative size."""


class KeyTypeError(QuatcacheError, TypeError):
    """An item, or the result of a key extractor, of a type that has no canonical bytes."""


class SampleError(QuatcacheError, TypeError):
    """A dataset returned something that is neither a supported sample nor handled by ``read_sample``."""


class LoaderError(QuatcacheError, TypeError):
    """A loader whose batches the framework cannot reproduce, for instance one with its own ``collate_fn``."""


class CollateError(QuatcacheError, RuntimeError):
    """``Encoder.collate`` failed; the message names the item that it failed on."""


class EncoderOutputError(QuatcacheError, ValueError):
    """An encoder returned something other than one finite row per item, always of the same shape."""


class BatchFunctionError(QuatcacheError, TypeError):
    """A function that cannot be cached item by item, or a call of one that is not what it says it takes."""


class BatchLengthError(BatchFunctionError, ValueError):
    """A batch function returned another number of values than it was given items."""


class NotFrozenError(QuatcacheError, RuntimeError):
    """An encoder that was to be cached can still change, or answers differently each time it is asked."""


class CacheMissError(QuatcacheError, KeyError):
    """A row that is not in the cache was asked for where encoding it was forbidden or impossible."""

    def __str__(self) -> str:
        """Give the sentence itself; ``KeyError`` would print its repr."""
        return str(self.args[0]) if self.args else ""


class SlotIndexError(QuatcacheError, IndexError):
    """An index outside the dataset that a shared cache was made for, or one that has no slot where it had to."""


class SlotStateError(QuatcacheError, RuntimeError):
    """A slot of a shared cache that is empty where it had to be set, or set where it had to be empty."""


class SlotValueError(QuatcacheError, ValueError):
    """A value that a slot of a shared cache does not take: another shape or another dtype."""


class StoreError(QuatcacheError, OSError):
    """A cache directory that cannot be read or written, or shared memory that there is no room for."""


class FormatError(QuatcacheError, ValueError):
    """A cache file that is damaged, or was written by a newer version of the format."""


class DamagedFileError(FormatError):
    """A cache file whose content is not what was written."""


class StaleRowsError(QuatcacheError, RuntimeError):
    """Stored rows differ from what the encoder, or the dataset, gives for the same items now."""


class ModelDefinitionError(QuatcacheError, TypeError):
    """A model that lacks a hook it needs, or whose hook returned the wrong kind of object."""


class MissingDependencyError(QuatcacheError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


def shorten(value: Any) -> str:
    """Show a value in a message, in at most 80 characters.

    Example:
        >>> shorten("a" * 100)[-5:]
        'aa...'
    """
    try:
        text = repr(value)
    except Exception:  # a message about a value must not fail for it: a huge number has no digits, for instance
        text = object.__repr__(value)
    return text if len(text) <= 80 else text[:77] + "..."
