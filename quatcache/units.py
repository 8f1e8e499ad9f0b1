"""Sizes and times, as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["counted", "parse_size", "readable_shape", "readable_size", "readable_time"]

_UNITS = {
    **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40},
}


def counted(number: int, what: str) -> str:
    """Write a number of things.

    Args:
        number: How many.
        what: One of them; more get an "s".

    Example:
        >>> counted(1, "row"), counted(2000, "row")
        ('1 row', '2,000 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def parse_size(text: str) -> int:
    """Read a number of bytes.

    Args:
        text: Such as "8GiB", "500 MB" or "1000000"; kB, MB, GB and TB are powers of 1000, the others of 1024.

    Raises:
        ValueError: It is no size, or more than a file system holds; a phrase for a message.

    Example:
        >>> parse_size("8GiB"), parse_size("3 KiB"), parse_size("1.5kB"), parse_size("7")
        (8589934592, 3072, 1500, 7)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text[:40]!r} is not a size; give one such as 500MB or 8GiB")
    size = float(match[1]) * _UNITS[match[2]]
    if size >= 1 << 63:
        raise ValueError(f"{text[:40]} is more than a file system holds; give a size such as 8GiB")
    return int(size)


def readable_size(nbytes: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> readable_size(1_536_000)
        '1.5 MB'
    """
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def readable_shape(shape: Sequence[int | None], longest: int | None = None) -> str:
    """Write the shape of a row for people.

    Args:
        shape: Sizes; None stands for the length of a sequence.
        longest: The length of the longest sequence, if it is known.

    Example:
        >>> readable_shape((2, 3)), readable_shape((None, 384), 64), readable_shape((None, 384))
        ('2x3', '<=64x384', 'Lx384')
    """
    length = "L" if longest is None else f"<={longest}"
    return "x".join(length if size is None else str(size) for size in shape)


def readable_time(seconds: float) -> str:
    """Write a time for people.

    Example:
        >>> readable_time(0.0004), readable_time(2.5), readable_time(600), readable_time(90_000), readable_time(500_000)
        ('0.4 ms', '2.5 s', '10.0 min', '25.0 h', '5.8 days')
    """
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < size * limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"
