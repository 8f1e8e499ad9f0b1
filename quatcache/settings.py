"""Settings that fits and caches without a trainer share, checked in one place and refused in the same sentences."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import torch

from quatcache.errors import ConfigError, shorten
from quatcache.units import parse_size

__all__ = ["byte_budget", "check_save_dir", "check_verify", "float_dtype", "is_count"]


def float_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """Give the storage dtype that is meant.

    Args:
        value: A floating dtype or its name; None: rows are stored as the encoder gives them.

    Raises:
        ConfigError: It is none of float64, float32, float16 and bfloat16.

    Example:
        >>> float_dtype("float16"), float_dtype(None)
        (torch.float16, None)
    """
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


def byte_budget(value: object) -> int | None:
    """Give the bytes that a budget for rows means.

    Args:
        value: A number, or a size such as "8GiB"; None: no limit.

    Raises:
        ConfigError: It is neither, or below 1.

    Example:
        >>> byte_budget("1KiB")
        1024
    """
    try:
        size = parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"max_size: {error}.") from None
    if size is not None and not is_count(size, 1):
        raise ConfigError(f"max_size is {value!r}; give a number of bytes, a size such as '8GiB', or None.")
    return size  # type: ignore[return-value]


def is_count(value: object, least: int) -> bool:
    """Say whether a value is a whole number of at least so many, of Python or NumPy; True and False are none.

    Example:
        >>> is_count(1, 1), is_count(True, 1), is_count(0, 1)
        (True, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def check_verify(value: Literal["auto"] | int) -> None:
    """Refuse what says nothing of how many stored rows are compared.

    Raises:
        ConfigError: It is neither a number of rows nor "auto".
    """
    if value != "auto" and not is_count(value, 0):
        raise ConfigError(f"verify is {value!r}; give a number of rows, 0 for none, or 'auto'.")


def check_save_dir(value: object) -> None:
    """Refuse what names no directory.

    Raises:
        ConfigError: It is neither a path nor None.
    """
    if value is not None and not (isinstance(value, str | os.PathLike) and os.fspath(value)):
        raise ConfigError(f"save_dir is {shorten(value)}; name a directory, or leave it unset to cache in memory.")
