"""The lines that every fit prints, for users who never set up logging."""

from __future__ import annotations

import logging
import sys

__all__ = ["show_messages"]


class _WhereNobodyListens(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints to the current standard error, but only while the root logger has no handler of the user's."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr
            super().emit(record)


def show_messages() -> None:
    """Let the one line of a fit be seen; ``logging.getLogger("quatcache").setLevel`` silences it."""
    logger = logging.getLogger("quatcache")
    if not any(isinstance(handler, _WhereNobodyListens) for handler in logger.handlers):
        handler = _WhereNobodyListens()
        handler.setFormatter(logging.Formatter("quatcache: %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
