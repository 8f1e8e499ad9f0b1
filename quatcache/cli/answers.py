"""How a command answers: with tables for people, or with one JSON document for machines and nothing else on stdout."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from quatcache.errors import QuatcacheError

__all__ = ["Answer", "escape_unknown_characters", "own_error", "printable", "progress_bar", "respond"]

_WIDE = 200
"""Columns where nobody looks: in a pipe or a file, lines are not folded."""


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        document: All of it, for machines.
        show: Shows it to people.
        code: Exit code of the process.
    """

    document: Mapping[str, Any]
    show: Callable[[Console], None]
    code: int = 0


def respond(command: Callable[[], Answer], *, as_json: bool) -> int:
    """Run a command and print its answer.

    Args:
        command: Does the work; what it prints itself goes to stderr when JSON is wanted.
        as_json: Print the document; of an error, ``{"error": sentence}``.

    Returns:
        The exit code.

    Raises:
        QuatcacheError: Whatever the command raises.
    """
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            answer = command()
    except Exception as error:
        own = own_error(error)
        if as_json and own is not None:
            print(json.dumps({"error": str(own)}))
        raise
    try:
        if as_json:
            print(json.dumps(answer.document, indent=1), flush=True)
        else:
            looked_at = sys.stdout.isatty() or "COLUMNS" in os.environ
            answer.show(Console(width=None if looked_at else _WIDE, highlight=False))
    except BrokenPipeError:  # who reads it, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return answer.code


def escape_unknown_characters(stream: TextIO) -> None:
    r"""Let a stream write ``\xe9`` for a character that its encoding does not have, instead of raising.

    Pipes on Windows, and terminals in old locales, take the characters of one language. What the user chose in
    ``PYTHONIOENCODING`` stays.

    Args:
        stream: Such as ``sys.stdout``.

    Example:
        >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        >>> escape_unknown_characters(stream)
        >>> stream.write("caf\xe9"), stream.flush(), stream.buffer.getvalue()
        (4, None, b'caf\\xe9')
    """
    if isinstance(stream, io.TextIOWrapper) and stream.errors in {"strict", "surrogateescape"}:
        stream.reconfigure(errors="backslashreplace")


def own_error(error: BaseException | None) -> QuatcacheError | None:
    """Find the error of quatcache's own that an error was raised from.

    jsonargparse builds the cache settings, and wraps what they refuse in a page on every type that it tried.

    Args:
        error: What was caught.

    Returns:
        The first of its causes, itself included, that quatcache raised; ``None`` if there is none.

    Example:
        >>> print(own_error(ValueError("no more than that")))
        None
    """
    while error is not None and not isinstance(error, QuatcacheError):
        error = error.__cause__ or error.__context__
    return error


def printable(value: object) -> str:
    r"""Escape what could steer a terminal: the texts that a file gives are not trusted.

    Example:
        >>> print(printable("cleared \x1b[2J by a file"))
        cleared \x1b[2J by a file
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(value))


@contextmanager
def progress_bar(what: str, total: int, *, in_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while something long runs, if somebody looks.

    Args:
        what: What is done.
        total: How much there is to do.
        in_bytes: Whether that are bytes.

    Yields:
        A function that is told how much more was done.
    """
    columns = [TextColumn(what), BarColumn(), *([DownloadColumn()] if in_bytes else []), TimeRemainingColumn()]
    progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with progress if total else nullcontext():
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
