"""The progress bar of a fill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from quatcache.read_through import Counts

__all__ = ["FillProgress", "fill_progress"]


class FillProgress(Protocol):
    """Told after each chunk what was done."""

    def __call__(self, samples: int, counts: Counts) -> None:
        """Advance by samples read, with the counts of all encoders for them."""
        ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = "" if not task.speed else f"{task.speed:,.0f} samples/s"
        return Text(rate, style="progress.data.speed", no_wrap=True)


@contextmanager
def fill_progress(total: int, shown: bool, what: str = "Filling") -> Iterator[FillProgress]:
    """Show a bar with rate, time left, hits and duplicates while a fill runs.

    Args:
        total: Samples to read.
        shown: False where there is nobody to look, as on the other ranks of a distributed run.
        what: Is being done.
    """
    progress = Progress(
        TextColumn(what, table_column=Column(no_wrap=True)),
        BarColumn(None, table_column=Column(ratio=1, min_width=4)),  # as much as the others leave: all on one line
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _Rate(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[hits]:,} hits, {task.fields[duplicates]:,} duplicates",
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
        expand=True,
        disable=not shown,
    )
    with progress:
        task = progress.add_task("fill", total=total, hits=0, duplicates=0)
        done = Counts()

        def advance(samples: int, counts: Counts) -> None:
            nonlocal done
            done += counts
            progress.update(task, advance=samples, hits=done.hits, duplicates=done.duplicates)

        yield advance
