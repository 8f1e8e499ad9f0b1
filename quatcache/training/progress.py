"""The progress bar of a fill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
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
        return Text("" if not task.speed else f"{task.speed:,.0f} items/s", style="progress.data.speed")


@contextmanager
def fill_progress(total: int, shown: bool) -> Iterator[FillProgress]:
    """Show a bar with rate, time left, hits and duplicates while a fill runs.

    Args:
        total: Samples to read.
        shown: False where there is nobody to look, as on the other ranks of a distributed run.
    """
    progress = Progress(
        TextColumn("Filling cache"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[hits]:,} hits, {task.fields[duplicates]:,} duplicates"),
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
