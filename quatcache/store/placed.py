"""Rows that lie in several places, numbered through: shard after shard, and then those that are not yet committed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from quatcache.store.protocol import Found
from quatcache.store.ragged import RaggedRows
from quatcache.store.rows import Rows, assemble, copy_rows, gather, room_for, take
from quatcache.store.transfer import fetches, send, touch_pages

__all__ = ["PlacedRows"]


class PlacedRows:
    """Places of rows in main memory, or mapped into it; a number belongs to its row for ever.

    Attributes:
        parts: Rows of one kind, in the order of their numbers.
        starts: Number of the first row of each part.
        count: Numbers that were given out.

    Example:
        >>> placed = PlacedRows()
        >>> placed.add(torch.tensor([[0.0], [1.0]]))
        >>> placed.add(torch.tensor([[2.0]]))
        >>> placed.read(torch.tensor([2, 0]), None).tolist()
        [[2.0], [0.0]]
    """

    def __init__(self) -> None:
        """Have no place yet."""
        self.parts: list[Rows] = []
        self.starts: list[int] = []
        self.count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    def add(self, rows: Rows) -> None:
        """Put a part behind the others."""
        self.starts.append(self.count)
        self.parts.append(rows)
        self.count += len(rows)

    def with_part(self, rows: Rows) -> PlacedRows:
        """Give the same places and one more; these stay as they are."""
        grown = PlacedRows()
        grown.parts, grown.starts, grown.count = self.parts[:], self.starts[:], self.count
        grown.add(rows)
        return grown

    def take_back(self) -> None:
        """Drop the last part, and its numbers."""
        self.count -= len(self.parts.pop())
        self.starts.pop()

    def read(
        self, numbers: torch.Tensor, dtype: torch.dtype | None, device: torch.device | None = None, rest: Any = None
    ) -> Any:
        """Read rows as look-ups give them.

        Args:
            numbers: int64 ``(B,)``, on the CPU.
            dtype: Of the answer; None: as the rows are stored.
            device: Of the answer; None: the CPU.
            rest: Rows whose numbers follow those of all parts; None: there are none.

        Returns:
            A new tensor ``(B, *row_shape)``, or new :class:`~quatcache.sequences.PaddedSequences`.
        """
        parts, starts = (self.parts, self.starts) if rest is None else ([*self.parts, rest], [*self.starts, self.count])
        if not parts:
            return torch.empty(0, dtype=dtype, device=device)
        if len(parts) == 1 or not len(numbers):
            return gather(parts[0], numbers, dtype, device)
        split = list(_split(starts, numbers))
        if isinstance(parts[0], RaggedRows):
            found = [Found(positions.numpy(), take(parts[place], own)) for place, positions, own in split]
            whole = assemble(len(numbers), found, None if device is not None else dtype)
            return whole if device is None else send(whole, device).to(dtype or whole.dtype)
        shape, stored = parts[0].shape[1:], parts[0].dtype
        pinned = device is not None and fetches(device)
        answer = torch.empty((len(numbers), *shape), dtype=stored, pin_memory=pinned)
        for place, positions, own in split:
            answer.index_copy_(0, positions, take(parts[place], own))  # type: ignore[arg-type]
        answer = send(answer, device)
        return answer if dtype is None else answer.to(dtype)

    def load(self, device: torch.device | str, *, let_go: bool) -> Rows:
        """Copy all rows, at least one, into one piece of the memory of a device.

        Args:
            device: Where to; peak memory is that of the rows once if they are mapped.
            let_go: Have these places be those of the copy, if it is in main memory: they need not be held twice.
        """
        rows = room_for(self.parts, device)
        for place, (start, part) in enumerate(zip(self.starts, self.parts, strict=True)):
            room = rows[start : start + len(part)]
            copy_rows(part, room)
            if let_go and rows.device.type == "cpu":
                self.parts[place] = room
        return rows

    def touch(self, numbers: torch.Tensor) -> None:
        """Read a value from every page of some rows, so that memory maps have them when they are gathered.

        A thread may do it beside one that adds a part: rows of one that is not known yet are left.
        """
        parts, starts = self.parts[:], self.starts[:]
        known = min(len(parts), len(starts))
        for place, _, own in _split(starts[:known], numbers) if known else ():
            part = parts[place]
            own = own[own < len(part)]
            if isinstance(part, RaggedRows):
                part[own].touch()
            else:
                touch_pages(part, own)


def _split(starts: Sequence[int], numbers: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Give the place of rows, their positions ``(n,)`` in the batch, and their numbers ``(n,)`` in that place."""
    if len(starts) == 1:
        yield 0, torch.arange(len(numbers)), numbers
        return
    which = torch.bucketize(numbers, torch.tensor(starts[1:]), right=True)
    ordered, order = torch.sort(which)
    counts = torch.bincount(ordered, minlength=len(starts)).tolist()
    own = (numbers - torch.tensor(starts)[which])[order]
    begin = 0
    for place, count in enumerate(counts):
        if count:
            yield place, order[begin : begin + count], own[begin : begin + count]
        begin += count
