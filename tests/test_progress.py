"""The bar of a fill: samples and their rate, on one line."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from quatcache import progress
from quatcache.progress import fill_progress
from quatcache.read_through import Counts


@pytest.mark.parametrize("total", [600, 200_000, 12_000_000])
def test_a_bar_counts_samples_on_one_line_of_eighty_columns(total, monkeypatch):
    written, ticks = io.StringIO(), iter(range(1, 1000))
    console = Console(width=80, file=written, force_terminal=True, color_system=None)

    class OnConsole(progress.Progress):
        def __init__(self, *columns, **settings):
            settings |= {"console": console, "auto_refresh": False, "get_time": lambda: float(next(ticks))}
            super().__init__(*columns, **settings)

    monkeypatch.setattr(progress, "Progress", OnConsole)
    with fill_progress(total, shown=True) as advance:
        for _ in range(3):
            advance(total // 4, Counts(asked=total // 4, hits=total // 8, duplicates=total // 16))
    lines = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line) for line in written.getvalue().splitlines()]
    bars = [line.replace("\r", "") for chunk in lines for line in chunk.split("\r") if "Fill" in line]
    assert bars and all(len(line) <= 80 for line in bars)
    assert written.getvalue().count("\n") == 1
    assert total > 1_000_000 or re.search(r"[\d,]+ samples/s", bars[-1])
    assert total > 1_000_000 or "hits" in bars[-1]
