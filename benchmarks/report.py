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

__all__ = ["Bar", "machine", "merge_json", "print_bars", "read_bars"]

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


def print_bars(bars: Sequence[Bar], console: Console, title: str = "bars") -> None:
    """Print one line per bar."""
    table = Table("figure", "measured", "bar", "", title=title)
    for bar in bars:
        sign = "<=" if bar.at_most else ">="
        verdict = {True: "[green]held[/]", False: "[red]missed[/]", None: "reported"}[bar.held]
        table.add_row(bar.what, _shown(bar.value), "" if bar.bar is None else f"{sign} {_shown(bar.bar)}", verdict)
    console.print(table)


def _shown(value: float) -> str:
    return f"{value:.3f}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def merge_json(path: Path, part: str, figures: Mapping[str, Any], bars: Sequence[Bar]) -> None:
    """Write the figures of one part, with the machine that gave them, and leave those of other parts as they are.

    Raises:
        SystemExit: The file is there and holds something else.
    """
    content = _read(path)
    content[part] = {"machine": machine(), "figures": dict(figures), "bars": [bar.as_json() for bar in bars]}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps({"parts": content}, indent=2, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def read_bars(path: Path) -> list[Bar]:
    """Read the bars of all parts."""
    parts = _read(path).values()
    return [Bar(bar["what"], bar["value"], bar["bar"], bar["at_most"]) for part in parts for bar in part["bars"]]


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path} holds no figures of these benchmarks; name another file") from None
    return parts
