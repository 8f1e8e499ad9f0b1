"""What a benchmark found: bars held or missed, a table for people and JSON for machines."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Bar", "machine", "print_bars", "write_json"]

PACKAGES = ("torch", "pytorch-lightning", "safetensors", "sentence-transformers", "transformers", "numpy")


@dataclass(frozen=True)
class Bar:
    """One figure beside the bar it has to meet.

    Attributes:
        what: What is compared, in words.
        value: The measured ratio.
        bar: What it has to meet; ``None``: reported, not judged.
        at_most: Whether smaller is better.
    """

    what: str
    value: float
    bar: float | None = None
    at_most: bool = True

    @property
    def held(self) -> bool | None:
        """Whether the bar is met; ``None`` where there is none."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def as_json(self) -> dict[str, Any]:
        """Return the fields and ``held``."""
        return {"what": self.what, "value": self.value, "bar": self.bar, "at_most": self.at_most, "held": self.held}


def machine() -> dict[str, Any]:
    """Describe where the figures come from: they mean little elsewhere."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in PACKAGES},
    }


def print_bars(bars: Sequence[Bar], console: Console) -> None:
    """Print one line per bar."""
    table = Table("figure", "measured", "bar", "", title="bars")
    for bar in bars:
        sign = "<=" if bar.at_most else ">="
        verdict = {True: "[green]held[/]", False: "[red]missed[/]", None: "reported"}[bar.held]
        table.add_row(bar.what, f"{bar.value:.2f}", "" if bar.bar is None else f"{sign} {bar.bar:.2f}", verdict)
    console.print(table)


def write_json(path: Path, results: Mapping[str, Any], bars: Sequence[Bar]) -> None:
    """Write everything measured, the machine beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), **results, "bars": [bar.as_json() for bar in bars]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
