"""The identity of an encoder: one digest that changes when, and only when, its output may change.

A cache is used again if the identities agree; if not, the refusal must name what changed. So the identity keeps the
facts that it was made of, and the digest is nothing but their hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from quatcache.encoders.deferred import deciding_versions, passing_over
from quatcache.encoders.facts import code_name, own_facts
from quatcache.encoders.serialised import JSON, to_json
from quatcache.errors import ModelDefinitionError

if TYPE_CHECKING:
    from typing_extensions import Self

    from quatcache.encoders.encoder import Encoder

__all__ = ["JSON", "Identity", "autocast_of", "fingerprint", "identify"]

_SCHEMA = 1
_SHOWN = 5
_ABSENT = "(none)"


@dataclass(frozen=True)
class Identity:
    """All that decides an encoder's output.

    Attributes:
        facts: JSON values by flat name, sorted: "class", "weights.<tensor>" (xxh3_128 in hex), "pooling", ...
        digest: 32 hex characters, xxh3_128 over the canonical JSON of the facts.

    Example:
        >>> old = Identity.of({"pooling": "mean", "max_seq_length": 256})
        >>> new = Identity.of({"pooling": "mean", "max_seq_length": 128})
        >>> old == new, old.differences(new)
        (False, ['max_seq_length 256 -> 128'])
    """

    facts: Mapping[str, JSON]
    digest: str

    @classmethod
    def of(cls, facts: Mapping[str, JSON]) -> Self:
        """Make an identity from its facts, for instance those that a cache recorded.

        Args:
            facts: JSON values by name, in any order.

        Returns:
            The identity, with sorted facts.
        """
        ordered = dict(sorted(facts.items()))
        canonical = json.dumps(ordered, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return cls(ordered, xxhash.xxh3_128_hexdigest(canonical.encode()))

    def __hash__(self) -> int:
        """Hash by the digest; the facts are a dict."""
        return hash(self.digest)

    def differences(self, other: Identity) -> list[str]:
        """Say what changed from this identity to another, for people.

        Args:
            other: The later identity.

        Returns:
            One phrase for each changed setting ("max_seq_length 256 -> 128") and one for all changed weights, grouped
            by layer; empty if the identities agree.
        """
        names = sorted(name for name in {*self.facts, *other.facts} if not _same(self.facts, other.facts, name))
        settings = [name for name in names if not name.startswith("weights.")]
        weights = [name.removeprefix("weights.") for name in names if name.startswith("weights.")]
        lines = [f"{name} {_show(self.facts, name)} -> {_show(other.facts, name)}" for name in settings]
        gone = [name for name in weights if f"weights.{name}" not in other.facts]
        new = [name for name in weights if f"weights.{name}" not in self.facts]
        changed = [name for name in weights if name not in {*gone, *new}]
        # A digest covers the dtype: after a cast all of them differ, and the dtype has been named already.
        if changed and not any(name.rpartition(".")[2] == "dtype" for name in settings):
            total = sum(name.startswith("weights.") for name in self.facts)
            lines.append(f"weights differ in {_group(changed, total)}")
        if new:
            lines.append(f"new weights in {_group(new)}")
        if gone:
            lines.append(f"weights gone from {_group(gone)}")
        return lines


def identify(encoder: Encoder, *, autocast: str | None = None) -> Identity:
    """Find the identity of an encoder.

    It covers the bytes of every tensor, the classes and settings of the encoder and of its submodules (for the
    adapters: tokenizer, pooling, prompt, lengths), ``Encoder.version``, what ``Encoder.identity()`` adds, and the
    autocast dtype; not paths, devices, ``requires_grad``, or the process.

    Args:
        encoder: Any encoder, with its weights in memory.
        autocast: The dtype that the encoder runs under ("bfloat16", "float16"), or None.

    Returns:
        The identity.

    Raises:
        ModelDefinitionError: If ``encoder.identity()`` returns something that is not JSON, or weights are on "meta".

    Example:
        >>> from quatcache.encoders import ModuleEncoder
        >>> import torch
        >>> encoder = ModuleEncoder(torch.nn.Linear(3, 2), torch.tensor, 2)
        >>> before = identify(encoder)
        >>> with torch.no_grad():
        ...     _ = encoder.module.bias.add_(1)
        >>> before.differences(identify(encoder))
        ['weights differ in module.bias']
    """
    return _complete(encoder, encoder.facts(), autocast)


def fingerprint(encoder: Encoder, files: str, *, autocast: str | None = None) -> str:
    """Digest all that decides the identity of an encoder whose model is not loaded: equal ones have equal identities.

    Args:
        encoder: An encoder with a model that is not loaded.
        files: Digest of the files that it would be loaded from.
        autocast: As for :func:`identify`.

    Returns:
        32 hex characters; others for another version of a library, even where the identity would be the same.
    """
    assert encoder._deferred is not None
    facts: dict[str, JSON] = {"files": files, **deciding_versions()}
    facts.update({f"loads_with.{name}": value for name, value in encoder._loads_with().items()})
    facts.update({f"deferred.{name}": value for name, value in encoder._deferred.facts().items()})
    with passing_over([encoder]):
        facts.update({f"own.{name}": value for name, value in own_facts(encoder, besides={"model"}).items()})
    return _complete(encoder, facts, autocast).digest


def _complete(encoder: Encoder, found: Mapping[str, JSON], autocast: str | None) -> Identity:
    """Add the facts that every encoder has."""
    facts = dict(found)
    facts["class"] = code_name(type(encoder))
    facts["version"] = encoder.version
    facts["schema"] = _SCHEMA
    facts["embedding_size"] = encoder.embedding_size
    facts["autocast"] = autocast
    added = encoder.identity()
    if not isinstance(added, Mapping):
        raise ModelDefinitionError(
            f"{type(encoder).__qualname__}.identity returned a {type(added).__qualname__}; return a dict of JSON values"
        )
    for name, value in added.items():
        try:
            facts[f"identity.{name}"] = to_json(value)
        except TypeError:
            raise ModelDefinitionError(
                f"{type(encoder).__qualname__}.identity()[{name!r}] is a {type(value).__qualname__}; return None, "
                "bool, int, float, str, or lists and dicts of these"
            ) from None
    return Identity.of(facts)


def autocast_of(precision: str) -> str | None:
    """Give what a trainer's precision adds to an encoder's identity; None: nothing.

    Precisions without autocast count too: they convert the inputs, which shows in no weight, and in nothing at all if
    an encoder has no weights.

    Example:
        >>> autocast_of("bf16-mixed"), autocast_of("64-true"), autocast_of("32-true")
        ('bf16-mixed', '64-true', None)
    """
    return None if precision == "32-true" else precision


def _same(first: Mapping[str, JSON], second: Mapping[str, JSON], name: str) -> bool:
    """Compare as the digest does: in Python 1 == True == 1.0, in JSON they differ."""
    if name not in first or name not in second:
        return False
    return json.dumps(first[name], sort_keys=True) == json.dumps(second[name], sort_keys=True)


def _show(facts: Mapping[str, JSON], name: str) -> str:
    if name not in facts:
        return _ABSENT
    text = json.dumps(facts[name], ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _group(names: list[str], total: int | None = None) -> str:
    """Name layers rather than tensors: at most five, then a count."""
    if total is not None and total == len(names) > _SHOWN:
        return f"all {total} tensors"
    groups = list(dict.fromkeys(_layer(name) for name in names))
    shown = ", ".join(groups[:_SHOWN])
    return shown if len(groups) <= _SHOWN else f"{shown} and {len(groups) - _SHOWN} more"


def _layer(name: str) -> str:
    """Cut a tensor's name behind its layer number: "encoder.layer.3.attention.query.weight" -> "encoder.layer.3"."""
    parts = name.split(".")
    for index in range(1, len(parts) - 1):
        if parts[index].isdigit() and not parts[index - 1].isdigit():
            return ".".join(parts[: index + 1])
    return name
