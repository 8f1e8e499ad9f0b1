"""Contenders that take turns, so that a slow minute of the machine falls on all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table

__all__ = ["Turns", "take_turns"]


@dataclass(frozen=True)
class Turns:
    """What each contender took in each round.

    Attributes:
        values: One figure a round; a contender that is slow and stands on no bar may have fewer than the others.
    """

    values: dict[str, list[float]]

    def median(self, contender: str) -> float:
        """The median over its rounds."""
        return median(self.values[contender])

    def ratio(self, one: str, other: str) -> float:
        """The median of the ratios that were taken within one round, where both had the same machine."""
        return median(a / b for a, b in zip(self.values[one], self.values[other], strict=False))

    def print(
        self, console: Console, title: str, reference: str, columns: Mapping[str, Callable[[float], str]]
    ) -> None:
        """Print a table of medians.

        Args:
            console: Where to.
            title: Above the table.
            reference: The contender that ratios are taken to.
            columns: Headings, each with what it makes of a median.
        """
        table = Table("contender", *columns, f"x {reference}", "rounds", title=title)
        for contender, values in self.values.items():
            ratio = f"{self.ratio(contender, reference):.2f}" if reference in self.values else ""
            cells = [show(median(values)) for show in columns.values()]
            table.add_row(contender, *cells, ratio, str(len(values)))
        console.print(table)


def take_turns(
    contenders: Mapping[str, Callable[[int], float]],
    rounds: int,
    console: Console,
    title: str,
    *,
    fewer: Mapping[str, int] | None = None,
) -> Turns:
    """Let all contenders run once a round.

    Args:
        contenders: By name what runs one of them, given the number of the round, and returns its figure.
        rounds: How many, > 0.
        console: Told of each round.
        title: What is measured.
        fewer: Contenders that take part in so many of the first rounds only.
    """
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        latest = []
        for name, run in contenders.items():
            if turn < (fewer or {}).get(name, rounds):
                values[name].append(run(turn))
                latest.append(f"{name} {values[name][-1]:.4g}")
        console.print(f"{title}, round {turn + 1} of {rounds}: {', '.join(latest)}", highlight=False, soft_wrap=True)
    return Turns(values)
