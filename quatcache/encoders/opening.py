"""Opening the rows of an encoder: which identity they must have, why there are none, and whether to trust them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from quatcache.encoders.canary import Canary
from quatcache.encoders.frozen import FrozenEncoder
from quatcache.encoders.identity import Identity
from quatcache.store import CacheDirectory, DiskStore, RowStore, environment

__all__ = ["canary_for", "closest_differences", "open_rows"]

logger = logging.getLogger(__name__)

SHOWN = 3


def open_rows(
    name: str, identity: Identity, directory: CacheDirectory, dtype: torch.dtype | None, device: torch.device
) -> DiskStore:
    """Open the rows of one encoder; if there are none, log how it differs from the encoder that comes closest.

    Args:
        name: Its name in the model.
        identity: Its identity.
        directory: Where rows persist.
        dtype: Storage dtype; None: as the encoder gives them.
        device: Where the encoder computes.

    Raises:
        FormatError: The store is of a newer version.
        StoreError: It cannot be read.
    """
    store = directory.store(identity.digest, identity.facts, dtype, device)
    store.mark_used()
    if not len(store):
        differences = closest_differences(identity, directory)
        if differences:
            shown = differences[:SHOWN] + [f"and {len(differences) - SHOWN} more"] * (len(differences) > SHOWN)
            logger.info(
                "Encoder %r has no rows in %s; the closest one there differs: %s.",
                name,
                directory.path,
                "; ".join(shown),
            )
    return store


def closest_differences(identity: Identity, directory: CacheDirectory) -> list[str]:
    """Say how an encoder differs from the one in a directory that comes closest to it.

    Returns:
        Phrases as of :meth:`~quatcache.encoders.Identity.differences`; empty if no encoder of its class is there, or
        the encoder itself is: with damaged rows, or with rows of another storage dtype.
    """
    others = [Identity.of(manifest.facts) for manifest in directory.manifests()]
    if any(other.digest == identity.digest for other in others):
        return []
    # those of another class differ in everything, which explains nothing
    alike = [other for other in others if other.facts.get("class") == identity.facts.get("class")]
    return min((lines for other in alike if (lines := other.differences(identity))), key=len, default=[])


def canary_for(
    name: str,
    store: RowStore,
    encoder: Callable[[], FrozenEncoder],
    dtypes: Callable[[], Iterable[torch.dtype]],
    device: torch.device,
    *,
    precision: str,
    verify: Literal["auto"] | int,
    batch_size: int,
) -> Canary | None:
    """Make the canary of one encoder; None for rows of this run only.

    Args:
        name: Its name in the model.
        store: Its rows.
        encoder: Makes the real encoder ready.
        dtypes: Gives those of its weights, once it is loaded: their rounding shows in its rows.
        device: Where the encoder computes.
        precision: In which it does, as a trainer names it: it decides how far rows may differ.
        verify: How many rows to compare; see :class:`Canary`.
        batch_size: Items per encoder call, at most.
    """
    if not isinstance(store, DiskStore):
        return None
    autocast = {torch.bfloat16} if "bf16" in precision else {torch.float16} if "16" in precision else set()

    def narrowest() -> torch.dtype | None:
        rounding = {*dtypes(), *autocast}
        return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in rounding), None)

    return Canary(name, store, environment(device), verify, encoder, batch_size, narrowest)
