"""Encoding a batch, and the proof that the encoder behind it is frozen.

A cache is right only if the encoder gives the same row each time. So before the first row is stored: no parameter may
require a gradient, every module must be in eval mode, and the first batch is encoded twice and compared.

While a batch is encoded, a thread collates the next one. It never runs at any other time: tokenizers are not made for
two threads, and what stands between two batches (a commit, a look at the identity) may use them. The thread saves time
and decides nothing. What fails in it is collated again where it would have been without it, so errors come from
there, and a ``collate`` that is bound to its thread, as a database connection is, works and is called there from then
on.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch

from quatcache.data.batches import collate_items
from quatcache.encoders.deferred import passing_over
from quatcache.encoders.encoder import Encoder
from quatcache.errors import EncoderOutputError, NotFrozenError, shorten
from quatcache.sequences import PaddedSequences
from quatcache.store import DTYPES

__all__ = ["FrozenEncoder", "prove_fixed"]

TOLERANCE = 1e-5
"""Two passes may differ by so much of the largest value: GPU kernels may sum in another order, dropout differs by 1."""


def prove_fixed(name: str, encoder: Encoder) -> None:
    """Refuse an encoder that training could change or that is in training mode.

    Args:
        name: Its name in the model, for the message.
        encoder: The encoder.

    Raises:
        NotFrozenError: A parameter requires a gradient, or a module is in training mode; the message names it.
    """
    with passing_over([encoder]):  # a model that is loaded later is frozen then
        parameters, modules = list(encoder.named_parameters()), list(encoder.named_modules())
    for path, parameter in parameters:
        if parameter.requires_grad:
            raise NotFrozenError(
                f"encoder {name!r} cannot be cached: its parameter {path!r} requires a gradient; call "
                "requires_grad_(False) on the encoder, or set trainable = True."
            )
    for path, module in modules:
        if module.training:
            where = f"its module {path!r} ({type(module).__name__})" if path else f"{type(encoder).__name__} itself"
            raise NotFrozenError(
                f"encoder {name!r} cannot be cached: {where} is in training mode, so dropout would be frozen into the "
                "cache; call eval() on the encoder."
            )


class FrozenEncoder:
    """Encodes items with a frozen encoder, checking what comes back.

    Args:
        name: The encoder's name in its model.
        encoder: The encoder.
        place: Moves collated inputs to where the encoder computes; None leaves them.
        context: Entered around each forward, for instance autocast; None: nothing.

    Attributes:
        proven: Whether two passes over one batch have agreed.

    Raises:
        NotFrozenError: See :func:`prove_fixed`; and from :meth:`encode` if two passes over the first batch differ.

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> encoder = ModuleEncoder(torch.nn.Identity(), torch.stack, embedding_size=2)
        >>> FrozenEncoder("default", encoder).encode([torch.ones(2)])
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        place: Callable[[Any], Any] | None = None,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Load the encoder, and prove that nothing in it can change."""
        encoder.ensure_loaded()
        prove_fixed(name, encoder)
        self.name = name
        self.encoder = encoder
        self._place = place or (lambda inputs: inputs)
        self._context = context or nullcontext
        self.proven = False
        self._prepared: tuple[Sequence[Any], Any] | None = (
            None  # items of the next batch, and what collate made of them
        )
        self._collates_ahead = True
        self._seconds = float("inf")  # of a forward, of late

    def encode(self, items: Sequence[Any], following: Sequence[Any] = ()) -> Any:
        """Encode one batch; the first batch twice, to see that both passes agree.

        Args:
            items: B items.
            following: Items of the next batch: the same object is passed as ``items`` then. They are collated while
                these are encoded, if the encoder says that they may be.

        Returns:
            Rows ``(B, *shape)`` on the encoder's device, without gradient; or
            :class:`~quatcache.sequences.PaddedSequences`.

        Raises:
            CollateError: An item could not be collated.
            EncoderOutputError: Neither of both, not one row per item, or not finite.
            NotFrozenError: Two passes over the first batch differ.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is items:
            inputs = self._place(prepared[1])
        else:
            inputs = self._place(collate_items(self.name, self.encoder.collate, items))
        if not self.proven:
            rows = self._timed_rows(inputs, items)
            self._compare(rows, self._rows(inputs, items))
            self.proven = True
            return rows
        if not self._may_prepare(following):
            return self._timed_rows(inputs, items)
        thread = threading.Thread(target=self._prepare, args=(following,), name="quatcache-collate", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads
            self._collates_ahead = False
            return self._timed_rows(inputs, items)
        try:
            return self._timed_rows(inputs, items)
        finally:
            thread.join()  # also after Ctrl-C: nothing goes on behind an error

    def _may_prepare(self, following: Sequence[Any]) -> bool:
        if not following or not self._collates_ahead or self._seconds < sys.getswitchinterval():
            return False  # two threads would only wait for each other
        return self.encoder.collates_apart(following)

    def _prepare(self, items: Sequence[Any]) -> None:
        try:
            self._prepared = (items, self.encoder.collate(items))
        except Exception:  # what it was, the next encode finds out
            self._collates_ahead = False

    def _timed_rows(self, inputs: Any, items: Sequence[Any]) -> torch.Tensor | PaddedSequences:
        started = time.perf_counter()
        rows = self._rows(inputs, items)
        self._seconds = min(time.perf_counter() - started, 2 * self._seconds)  # a busy machine has long ones
        return rows

    def _rows(self, inputs: Any, items: Sequence[Any]) -> torch.Tensor | PaddedSequences:
        with torch.no_grad(), self._context():  # not inference_mode: its tensors fail in a later backward
            rows: Any = self.encoder(inputs)
        if not isinstance(rows, torch.Tensor | PaddedSequences):
            raise EncoderOutputError(
                f"encoder {self.name!r} returned a {type(rows).__name__} for {len(items)} items; return a tensor of "
                "shape (B, D) or (B, *shape), or PaddedSequences."
            )
        needed, wanted = (3, "(B, L, D)") if isinstance(rows, PaddedSequences) else (2, "(B, D) or (B, *shape)")
        if len(rows.shape) < needed or len(rows) != len(items):
            raise EncoderOutputError(
                f"encoder {self.name!r} returned shape {tuple(rows.shape)} for {len(items)} items; return one row per "
                f"item, shape {wanted}."
            )
        if self.encoder.embedding_size not in (None, rows.shape[-1]):  # of a function it is not known
            raise EncoderOutputError(
                f"encoder {self.name!r} returned rows of size {rows.shape[-1]}, its embedding_size says "
                f"{self.encoder.embedding_size}; make them agree."
            )
        if isinstance(rows, PaddedSequences):
            rows = rows.normalised()  # what stands in the padding is kept nowhere
        values: torch.Tensor = rows.values if isinstance(rows, PaddedSequences) else rows
        if values.dtype not in DTYPES.values():
            raise EncoderOutputError(
                f"encoder {self.name!r} returned rows of {values.dtype}; return one of {', '.join(DTYPES)}."
            )
        # the sum is not finite if a value is not, and takes a tenth of the time; of large values it may overflow
        if values.is_floating_point() and not math.isfinite(values.sum()) and not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).reshape(len(rows), -1).any(dim=1).nonzero()[0])
            raise EncoderOutputError(
                f"encoder {self.name!r} returned NaN or infinity for item {shorten(items[bad])}; a cache would keep it "
                "for ever: correct the item or the encoder."
            )
        # the next forward may write to the same memory, and rows of several are answered together
        return rows.clone() if isinstance(rows, torch.Tensor) else rows  # sequences were copied

    def _compare(self, first: Any, second: Any) -> None:
        if isinstance(first, PaddedSequences) or isinstance(second, PaddedSequences):
            if type(first) is not type(second) or not torch.equal(first.lengths, second.lengths):
                self._refuse("in the lengths of sequences")
            first, second = first.elements, second.elements
        if not first.is_floating_point():
            if not torch.equal(first, second):
                self._refuse("in whole values")
            return
        scale = float(first.abs().max()) if first.numel() else 0.0
        difference = float((first.double() - second.double()).abs().max()) if first.numel() else 0.0
        if difference > TOLERANCE * max(scale, 1e-12):
            self._refuse(f"by {difference:.3g}")

    def _refuse(self, difference: str) -> NoReturn:
        raise NotFrozenError(
            f"encoder {self.name!r} ({type(self.encoder).__name__}) cannot be cached: two passes over the same items "
            f"differ {difference}; remove what is random in its forward, or set trainable = True."
        )
