"""Whose rows an encoder needs, without loading it where an earlier run has found that out."""

from __future__ import annotations

from dataclasses import dataclass

from quatcache.encoders.deferred import is_loaded
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.identity import Identity, fingerprint, identify
from quatcache.encoders.sentence_transformer import SentenceTransformerEncoder
from quatcache.encoders.transformer import TransformersEncoder
from quatcache.errors import StaleRowsError
from quatcache.store import KnownModels

__all__ = ["Recall"]


@dataclass(frozen=True)
class _Recalled:
    fingerprint: str
    identity: Identity


class Recall:
    """Gives the identities of the encoders of one run, those of encoders that are not loaded from notes.

    A note is only as good as what its fingerprint covers. So what is loaded later in the same run is held against it.

    Args:
        known: The notes; None: there are none, and none are made.
        autocast: As for :func:`~quatcache.encoders.identify`.
    """

    def __init__(self, known: KnownModels | None, autocast: str | None) -> None:
        """Read nothing yet."""
        self._known = known
        self._autocast = autocast
        self._recalled: dict[str, _Recalled] = {}
        self._found: dict[str, Identity] = {}  # by fingerprint, to be noted

    def identity(self, name: str, encoder: Encoder) -> Identity:
        """Find the identity of an encoder; it is loaded if it is not known.

        Args:
            name: Its name in the model.
            encoder: The encoder.
        """
        known, deferred = self._known, encoder._deferred
        if known is None or deferred is None or is_loaded(encoder) or not _is_told_by_its_files(encoder):
            return identify(encoder, autocast=self._autocast)
        if name in self._recalled:
            return self._recalled[name].identity
        files = known.digest(deferred.folders)
        mark = None if files is None else fingerprint(encoder, files, autocast=self._autocast)
        facts = None if mark is None else known.recall(mark)
        if is_loaded(encoder):  # its identity() has looked inside
            return identify(encoder, autocast=self._autocast)
        if facts is not None and mark is not None:
            self._recalled[name] = _Recalled(mark, Identity.of(facts))
            return self._recalled[name].identity
        encoder.ensure_loaded()  # here, where nobody can have changed it before it is looked at
        identity = identify(encoder, autocast=self._autocast)
        if mark is not None and known.digest(deferred.folders) == files:
            self._found[mark] = identity
        return identity

    def note(self) -> None:
        """Write down what was found out in this run, where that is permitted."""
        while self._known is not None and self._found:
            mark, identity = self._found.popitem()
            self._known.remember(mark, identity.digest, identity.facts)

    def check(self, name: str, encoder: Encoder) -> None:
        """Hold an encoder that was just loaded against what was noted of it.

        Raises:
            StaleRowsError: It is another one. The note is removed.
        """
        if self._known is None or name not in self._recalled:
            return
        recalled, now = self._recalled[name], identify(encoder, autocast=self._autocast)
        if now.digest != recalled.identity.digest:
            self._known.forget(recalled.fingerprint)
            raise StaleRowsError(
                f"encoder {name!r} is not what was noted of its files when they were last loaded "
                f"({'; '.join(recalled.identity.differences(now))}); the note was removed, so run again: the encoder "
                "will be loaded first."
            )


def _is_told_by_its_files(encoder: Encoder) -> bool:
    """Whether its facts are those of an adapter, and not what a subclass makes of them."""
    return type(encoder).facts in (SentenceTransformerEncoder.facts, TransformersEncoder.facts)
