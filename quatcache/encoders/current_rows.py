"""Which rows belong to an encoder as it is at this moment, where no trainer says when it may change.

A fit looks at its encoders at its start and refuses every change until its end. A cache that is used from a program of
the user's has no such end: the encoder may get another prompt, or be trained on, between two calls. So each call asks
for the rows of the encoder as it is now, and gets others when it was changed: a change costs a fill, and never a wrong
row. What was encoded while it was changed is not kept.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from quatcache.data.devices import to_device
from quatcache.encoders.canary import Canary
from quatcache.encoders.deferred import device_of, is_loaded
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.frozen import FrozenEncoder, prove_fixed
from quatcache.encoders.identity import Identity, autocast_of, identify
from quatcache.encoders.opening import canary_for, open_rows
from quatcache.encoders.recall import Recall
from quatcache.encoders.watch import Watch
from quatcache.errors import NotFrozenError
from quatcache.store import CacheDirectory, DiskStore, LockedStore, TensorStore

__all__ = ["AUTOCAST", "CurrentRows", "OpenedRows"]

logger = logging.getLogger(__name__)

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What a trainer's precision has an encoder compute in; None: in the dtype of its weights."""

VERIFIED_AT_ONCE = 32
"""Items that a canary encodes in one call."""


@dataclass
class OpenedRows:
    """The rows of one identity.

    Attributes:
        identity: Whose they are.
        inner: Where they are.
        store: The same, for several threads.
        disk: The same, if they persist.
        canary: Compares some of them with what the encoder gives now.
        goal: How many it compares.
        frozen: The encoder, once something was encoded.
    """

    identity: Identity
    inner: DiskStore | TensorStore
    store: LockedStore
    disk: DiskStore | None = None
    canary: Canary | None = None
    goal: int = 0
    frozen: FrozenEncoder | None = None


class CurrentRows:
    """Gives the rows of one encoder, as it is now, and the encoder itself when something must be encoded.

    Args:
        name: What messages call the encoder.
        encoder: A frozen encoder.
        directory: Where rows persist; None: in memory.
        dtype: Storage dtype; None: as the encoder gives them.
        verify: How many stored rows are compared; see :class:`~quatcache.encoders.canary.Canary`.
        precision: One of :data:`AUTOCAST`.
        time_func: Clock in seconds.

    Attributes:
        name: As given.
        encoder: As given.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        directory: CacheDirectory | None,
        dtype: torch.dtype | None = None,
        *,
        verify: Literal["auto"] | int = "auto",
        precision: str = "32-true",
        time_func: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open nothing yet."""
        self.name = name
        self.encoder = encoder
        self._directory = directory
        self._dtype = dtype
        self._verify = verify
        self._precision = precision
        self._time = time_func
        self._looking = threading.RLock()
        self._opened: OpenedRows | None = None
        self._watch = Watch(encoder, time_func)
        self._recall = Recall(None, None)
        if encoder._deferred is not None:
            encoder._deferred.listeners.append(partial(_see_loaded, weakref.ref(self)))

    def open(self) -> OpenedRows:
        """Give the rows of the encoder as it is now; they are found at once if nothing hints at a change.

        Raises:
            FormatError: The store is of a newer version.
            StoreError: It cannot be read.
        """
        with self._looking:
            if self._opened is None or self._watch.is_due():
                identity = self._identify()
                if self._opened is None or identity.digest != self._opened.identity.digest:
                    if self._opened is not None:
                        changes = "; ".join(self._opened.identity.differences(identity))
                        logger.info("Encoder %r was changed (%s): it has other rows from now on.", self.name, changes)
                    self._opened = self._open(identity)
            return self._opened

    def _identify(self) -> Identity:
        started = self._time()
        autocast = autocast_of(self._precision)
        if is_loaded(self.encoder):
            identity = identify(self.encoder, autocast=autocast)
        else:
            self._recall = Recall(None if self._directory is None else self._directory.models, autocast)
            identity = self._recall.identity(self.name, self.encoder)
        self._watch.remember(self._time() - started)
        return identity

    def _open(self, identity: Identity) -> OpenedRows:
        if self._directory is None:
            memory = TensorStore(dtype=self._dtype)
            return OpenedRows(identity, memory, LockedStore(memory))
        device = device_of(self.encoder)
        disk = open_rows(self.name, identity, self._directory, self._dtype, device)
        opened = OpenedRows(identity, disk, LockedStore(disk), disk)
        canary = canary_for(
            self.name,
            disk,
            partial(self.frozen, opened),
            lambda: {tensor.dtype for tensor in self.encoder.parameters()},
            device,
            precision=self._precision,
            verify=self._verify,
            batch_size=VERIFIED_AT_ONCE,
        )
        if canary is not None:
            opened.canary, opened.goal = canary, min(canary.begin(1), len(disk))
        disk.before_commit = partial(self.see_unchanged, opened)
        return opened

    def note(self) -> None:
        """Note what was found out about a model, for programs that need not load it."""
        self._recall.note()

    def see_unchanged(self, opened: OpenedRows) -> None:
        """See that the encoder still is what rows are stored under: rows of others must not be.

        Raises:
            NotFrozenError: It was changed.
        """
        with self._looking:
            if self._opened is opened and not self._watch.is_due():
                return
            now = self._identify()
            if self._opened is opened and now.digest == opened.identity.digest:
                return
            self._opened = None
        changes = "; ".join(opened.identity.differences(now)) or "and changed back"
        raise NotFrozenError(
            f"encoder {self.name!r} was changed while items were encoded ({changes}), so the rows since the last "
            "commit are not kept; change it between two calls, and encode these items again."
        )

    def see_loaded(self) -> None:
        """See that an encoder which is loaded only now is the one whose rows are used.

        Raises:
            StaleRowsError: It is another one.
        """
        self._recall.check(self.name, self.encoder)

    def frozen(self, opened: OpenedRows) -> FrozenEncoder:
        """Make the encoder ready, and see that nothing in it can change; one thread at a time may encode with it.

        Raises:
            NotFrozenError: A parameter requires a gradient, or a module is in training mode.
        """
        with self._looking:  # two threads would both load it
            self.encoder.ensure_loaded()
        if opened.frozen is None:
            encoder, precision = self.encoder, self._precision  # not self: its rows would be kept by a circle
            opened.frozen = FrozenEncoder(
                self.name,
                encoder,
                place=lambda inputs: to_device(inputs, device_of(encoder)),
                context=lambda: _computing(encoder, precision),
            )
        else:
            prove_fixed(self.name, self.encoder)
        return opened.frozen


def _computing(encoder: Encoder, precision: str) -> AbstractContextManager[Any]:
    """Compute in the precision that belongs to the identity, whatever the caller's own code is run in."""
    device, dtype = device_of(encoder).type, AUTOCAST[precision]
    if dtype is None and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def _see_loaded(rows: weakref.ref[CurrentRows]) -> None:
    alive = rows()
    if alive is not None:
        alive.see_loaded()
