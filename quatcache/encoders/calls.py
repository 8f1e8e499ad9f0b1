"""How the items of one encoder are split into the calls of a fill.

Padding is what a call of a text encoder wastes, and on a CPU a call of many long texts is slower per token than one of
few: their activations leave the caches of the processor. So items are sorted by tokens within a window of the dataset,
and on the CPU a call takes items, longest first, until its tokens, padding included, reach a budget. An accelerator
wants as many tokens as it is given, so there only the batch size counts, as its user chose it to fit the memory; and
it encodes faster than tokens are counted, so there texts are sorted by their characters.

Calls do not enter the identity of an encoder: a row differs by 1e-7 of its length with the padding beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from quatcache.data.batches import collate_items
from quatcache.encoders.deferred import is_loaded
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.frozen import FrozenEncoder
from quatcache.encoders.token_counts import are_texts
from quatcache.errors import BatchLengthError
from quatcache.store import Positions
from quatcache.store.buffer import as_rows

__all__ = ["TOKENS_PER_CALL", "WINDOW", "CallPlan", "EncoderCalls", "shortest_first"]

WINDOW = 16
"""Encoder batches of one window: items are sorted by length within it, so that a call has little padding."""

COUNTED_WINDOW = 2048
"""Items of a window of texts, which take little room: sorted, 1% of its tokens are padding, of 512 texts 4%."""

WINDOW_SECONDS = 30.0
"""A slow encoder gets no larger windows than it does in this time: the progress bar moves with them."""

FIRST_WINDOW = 1024
"""Items of a window of texts while the pace of the encoder is not known."""

TOKENS_PER_CALL = 2048
"""Tokens of a call on the CPU, padding included."""

PROVING = 4
"""Items of the call that is encoded twice to see that the encoder is frozen: dropout shows in one, what mixes the items
of a batch in two."""


class CallPlan:
    """Splits items into calls.

    Args:
        name: The encoder's name in its model, for messages.
        encoder: The encoder.
        device: Where it computes.

    Attributes:
        knows_texts: Whether the items that were looked at last are texts, whose lengths the encoder tells.

    Example:
        >>> from quatcache.encoders import Encoder
        >>> class Words(Encoder):
        ...     def token_counts(self, items):
        ...         return [len(item.split()) for item in items]
        >>> plan = CallPlan("words", Words(), torch.device("cpu"))
        >>> [call.tolist() for call in plan.split(["a", "a b c", "d", "a b"], batch_size=3)]
        [[1, 3, 0], [2]]
    """

    def __init__(self, name: str, encoder: Encoder, device: torch.device) -> None:
        """Look at no item yet."""
        self._name = name
        self._encoder = encoder
        self._tells_length = type(encoder).length is not Encoder.length
        self._budget = TOKENS_PER_CALL if device.type == "cpu" else None
        self.knows_texts = False

    def window(self, batch_size: int, pace: float | None) -> int:
        """Say how many samples to read before their items are split.

        Args:
            batch_size: Upper bound of items per call.
            pace: Seconds that the encoder takes for an item; None: not known.
        """
        counted = min(COUNTED_WINDOW, int(WINDOW_SECONDS / pace)) if pace else FIRST_WINDOW
        return max(batch_size * WINDOW, counted if self.knows_texts else 0)

    def look_ahead(self, items: Sequence[Any]) -> None:
        """Find out whether items are texts, unless the encoder would have to be loaded for it."""
        if is_loaded(self._encoder):
            self.look(items)

    def look(self, items: Sequence[Any]) -> Sequence[int] | None:
        """Find out whether items are texts, and count their tokens where a call has a budget of them.

        Args:
            items: N items.

        Returns:
            N token counts; None where they are not known or not wanted.

        Raises:
            CollateError: An item has tokens that cannot be counted.
            BatchLengthError: Not one count per item.
        """
        if self._budget is None and self._tells_length and are_texts(items):
            self.knows_texts = True
            return None
        counts: Sequence[int] | None = collate_items(self._name, self._encoder.token_counts, items)
        if counts is not None and len(counts) != len(items):
            raise BatchLengthError(
                f"token_counts of encoder {self._name!r} returned {len(counts)} numbers for {len(items)} items; return "
                "one per item, in order."
            )
        self.knows_texts = counts is not None
        return counts

    def split(self, items: Sequence[Any], batch_size: int) -> list[Positions]:
        """Give the positions of the items of each call, longest first: memory runs out at once or never.

        Args:
            items: N items.
            batch_size: Upper bound of items per call.

        Raises:
            CollateError: An item has tokens that cannot be counted.
            BatchLengthError: Not one count per item.
        """
        counts = self.look(items)
        if counts is not None:
            lengths = np.asarray(counts)
        elif self._tells_length:
            lengths = np.array([self._encoder.length(item) for item in items])
        else:
            lengths = np.zeros(len(items), np.int64)
        order = np.argsort(-lengths, kind="stable")
        calls, start = [], 0
        while start < len(order):
            size = batch_size
            if counts is not None and self._budget is not None:
                size = min(size, max(self._budget // max(int(lengths[order[start]]), 1), 1))
            calls.append(order[start : start + size])
            start += size
        return calls


def shortest_first(calls: Sequence[Positions]) -> list[Positions]:
    """Make a call of a few of the shortest items, and put it before all others.

    Args:
        calls: Positions of the items of each call, longest first; at least one.

    Example:
        >>> [call.tolist() for call in shortest_first([np.array([8, 3]), np.array([0, 7, 5, 1, 2, 6])])]
        [[5, 1, 2, 6], [8, 3], [0, 7]]
    """
    *others, shortest = calls
    rest = [shortest[:-PROVING]] if len(shortest) > PROVING else []
    return [shortest[-PROVING:], *others, *rest]


class EncoderCalls:
    """The encoder calls for the misses among some items: how read-through splits them, and what computes each.

    Args:
        frozen: Makes the real encoder ready, when the first item must be encoded.
        plan: Splits items into calls.
        items: N items.
        batch_size: Upper bound of items per call.
        dtype: Storage dtype, to which rows are rounded: the same row whether it is found or was just made.
        took: Told the seconds of each piece of work in the encoder, collating included.
        ahead: Whether the next call is collated while one is encoded.

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> from quatcache.keys import content_keys
        >>> from quatcache.read_through import read_through
        >>> from quatcache.store import TensorStore
        >>> encoder, items = ModuleEncoder(torch.nn.Identity(), torch.tensor, 1), [[1.0], [2.0], [1.0]]
        >>> plan = CallPlan("same", encoder, torch.device("cpu"))
        >>> calls = EncoderCalls(lambda: FrozenEncoder("same", encoder), plan, items, batch_size=32)
        >>> read_through(content_keys(items), calls.encode, TensorStore(), batches=calls.split).flatten()
        tensor([1., 2., 1.])
    """

    def __init__(
        self,
        frozen: Callable[[], FrozenEncoder],
        plan: CallPlan,
        items: Sequence[Any],
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        took: Callable[[float], None] = lambda seconds: None,
        ahead: bool = True,
    ) -> None:
        """Encode nothing yet."""
        self._frozen = frozen
        self._plan = plan
        self._items = items
        self._batch_size = batch_size
        self._dtype = dtype
        self._took = took
        self._ahead = ahead
        self._encoder: FrozenEncoder | None = None
        self._current: Sequence[Any] = ()
        self._following: Sequence[Any] = ()

    def split(self, positions: Positions) -> Iterator[Positions]:
        """Split the positions of distinct misses into calls; each is to be encoded before the next one is asked for."""
        self._encoder = encoder = self._frozen()  # once for all calls: it looks at the weights
        started = time.monotonic()
        items = [self._items[position] for position in positions.tolist()]
        calls = self._plan.split(items, self._batch_size)
        if not encoder.proven:  # what is encoded twice, as proof that the encoder is frozen, is a call of the shortest
            calls = shortest_first(calls)
        self._following = [items[place] for place in calls[0].tolist()]
        self._took(time.monotonic() - started)
        for call, following in zip(calls, [*calls[1:], calls[0][:0]], strict=True):
            self._current, self._following = self._following, [items[place] for place in following.tolist()]
            yield positions[call]

    def encode(self, positions: Positions) -> Any:
        """Encode the call that was split off last.

        Args:
            positions: Those of its items.

        Returns:
            Rows ``(n, *shape)``, or :class:`~quatcache.sequences.PaddedSequences`.
        """
        assert self._encoder is not None
        started = time.monotonic()
        rows = self._encoder.encode(self._current, self._following if self._ahead else ())
        if self._dtype is not None:
            rows = as_rows(rows, None, self._dtype).to(rows.dtype)
        self._took(time.monotonic() - started)
        return rows
