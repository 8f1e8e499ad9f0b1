"""What is trained on precomputed rows: shapes of heads, data and the order of an epoch.

Imports neither quatcache nor Lightning: a contender that lives in another environment trains the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

__all__ = [
    "CLASSES",
    "LEARNING_RATE",
    "SEED",
    "SHAPES",
    "WIDTH",
    "Data",
    "Order",
    "Run",
    "Shape",
    "check_batches",
    "differences",
    "loader_order",
    "make_data",
    "tensor_order",
]

WIDTH = 384
CLASSES = 45
LEARNING_RATE = 1e-3
SEED = 0


@dataclass(frozen=True)
class Shape:
    """What is trained.

    Attributes:
        name: How the figures refer to it.
        hidden: Width of a hidden layer with ReLU; ``None``: a linear head.
        batch_size: Rows per step.
        logged: Whether ``tensor-dataset`` logs its loss at every step.
    """

    name: str
    hidden: int | None
    batch_size: int
    logged: bool

    def head(self) -> nn.Module:
        """Build the head, the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            if self.hidden is None:
                return nn.Linear(WIDTH, CLASSES)
            return nn.Sequential(nn.Linear(WIDTH, self.hidden), nn.ReLU(), nn.Linear(self.hidden, CLASSES))


SHAPES = {
    "mlp": Shape("mlp", hidden=384, batch_size=256, logged=True),
    "linear": Shape("linear", hidden=None, batch_size=1024, logged=False),
}


@dataclass(frozen=True)
class Data:
    """Rows ``(N, 384)`` float32 and labels ``(N,)`` int64 in ``0 <= label < 45``."""

    rows: Tensor
    labels: Tensor


def make_data(rows: int) -> Data:
    """Draw the same data in every process.

    Args:
        rows: How many, > 0.
    """
    generator = torch.Generator().manual_seed(SEED)
    return Data(torch.randn(rows, WIDTH, generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator))


@dataclass
class Run:
    """What one contender did.

    Attributes:
        epoch_seconds: Wall time of each epoch but the first.
        losses: The loss of every step as 0-d tensors; empty unless they were asked for.
    """

    epoch_seconds: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


def loader_order(count: int, generator: torch.Generator) -> Tensor:
    """Draw an epoch's order exactly as a shuffling ``DataLoader`` with this generator does: slow, for the check alone.

    Args:
        count: Number of items.
        generator: Advanced as the loader would advance it.

    Returns:
        Positions ``(count,)`` int64.
    """
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the base seed that each loader iterator draws
    return torch.tensor(list(RandomSampler(range(count), generator=generator)))


def tensor_order(count: int, generator: torch.Generator) -> Tensor:
    """Draw an epoch's order in one call: what a hand-written loop does."""
    return torch.randperm(count, generator=generator)


Order = Callable[[int, torch.Generator], Tensor]


def check_batches(batches: Iterable[tuple[Tensor, Tensor]], data: Data) -> None:
    """Stop unless these are all rows of the data, each once, beside its label.

    Args:
        batches: Rows ``(B, 384)`` and labels ``(B,)`` of an epoch.
        data: What it must bring.
    """
    rows, labels = map(torch.cat, zip(*batches, strict=True))
    # Two values of 32 bits tell rows apart; one alone does not.
    order, expected = (column[:, :2].contiguous().view(torch.int64)[:, 0].argsort() for column in (rows, data.rows))
    same = len(rows) == len(data.rows) and torch.equal(rows[order], data.rows[expected])
    if not same or not torch.equal(labels[order], data.labels[expected]):
        raise SystemExit("a loader brought other rows or labels; no figure is given")


def differences(ends: list[float]) -> list[float]:
    """Seconds between consecutive ends."""
    return [after - before for before, after in pairwise(ends)]
