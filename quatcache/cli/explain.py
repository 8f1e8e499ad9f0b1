"""``quatcache explain``: what distinguishes the identities of encoders, and so why a run found no rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from quatcache.cli.answers import Answer, printable
from quatcache.cli.display import class_of, short_name
from quatcache.errors import ConfigError
from quatcache.units import counted

if TYPE_CHECKING:
    from quatcache.encoders.identity import Identity
    from quatcache.store.summaries import CacheSummary, StoreSummary

__all__ = ["explain_encoder", "explain_stores"]


@dataclass(frozen=True)
class Comparison:
    """One store held against another.

    Attributes:
        store: The one that is explained.
        against: The one it is compared with; None: there is none of its class before it.
        differences: From ``against`` to ``store``; none for the same identity in another storage dtype.
    """

    store: StoreSummary
    against: StoreSummary | None
    differences: tuple[str, ...] = ()


def explain_stores(summary: CacheSummary, digests: Sequence[str]) -> Answer:
    """Compare stores with each other.

    Args:
        summary: The cache.
        digests: None: each store with the closest earlier one of its class; one: it with all others; two: the second
            with the first.

    Returns:
        The differences.

    Raises:
        ConfigError: A digest names no store, or several identities.
    """
    readable = [store for store in summary.stores if store.manifest is not None]
    chosen = [_named(summary, digest) for digest in digests]
    if len(chosen) == 2:
        comparisons = [_compare(chosen[1], chosen[0])]
    elif chosen:
        comparisons = [_compare(chosen[0], other) for other in readable if other is not chosen[0]]
    else:
        comparisons = [_explained(store, readable[:place]) for place, store in enumerate(readable)]
    left_out = [store for store in summary.stores if store.manifest is None and not digests]
    names = [store.path.name for store in summary.stores]

    def show(console: Console) -> None:
        shown = None
        for comparison in comparisons:
            if comparison.store is not shown:
                console.print(Text(printable(_heading(comparison.store, names)), style="bold"))
            shown = comparison.store
            for line in _lines(comparison, names):
                console.print(Text(f"  {printable(line)}"))
        for store in left_out:
            reason = "" if store.problem is None else f": manifest.json {store.problem.reason}"
            console.print(Text(printable(f"{short_name(store.path.name, names)}  not explained{reason}")))
        if not comparisons:
            console.print("There is nothing to compare.")

    document = {
        "path": str(summary.path),
        "comparisons": [
            {
                "store": comparison.store.path.name,
                "against": None if comparison.against is None else comparison.against.path.name,
                "differences": list(comparison.differences),
            }
            for comparison in comparisons
        ],
        "not_explained": [store.path.name for store in left_out],
    }
    return Answer(document, show)


def explain_encoder(summary: CacheSummary, identity: Identity) -> Answer:
    """Say whether an encoder would find rows in a cache, and if not, why.

    Args:
        summary: The cache.
        identity: Of the encoder.

    Returns:
        The stores with its rows, or how it differs from the closest identity there.
    """
    names = [store.path.name for store in summary.stores]
    readable = [store for store in summary.stores if store.manifest is not None]
    hits = [store for store in readable if store.digest == identity.digest]
    kind = identity.facts.get("class")
    alike = [] if hits else [store for store in readable if _identity(store).facts.get("class") == kind]
    compared = [(_identity(store).differences(identity), store) for store in alike]
    closest = min(compared, key=lambda pair: len(pair[0]), default=None)

    def lines() -> Iterator[str]:
        for store in hits:
            yield f"hit: {counted(store.rows, 'row')} in {short_name(store.path.name, names)}, stored as {store.stored}"
        if closest is not None:
            name = short_name(closest[1].path.name, names)
            yield f"miss: no rows; the closest of its class is {name} with {counted(closest[1].rows, 'row')}"
            yield from (f"  against {name}: {line}" for line in closest[0])
        elif not hits:
            classes = ", ".join(sorted({class_of(store) for store in readable})) or "nothing"
            yield f"miss: {str(kind).rpartition('.')[2]} has no rows here; there are rows of {classes}"

    def show(console: Console) -> None:
        for line in lines():
            console.print(Text(printable(line)))

    document: dict[str, Any] = {
        "path": str(summary.path),
        "digest": identity.digest,
        "class": kind,
        "hit": bool(hits),
        "stores": [{"name": store.path.name, "rows": store.rows, "dtype": store.stored} for store in hits],
        "closest": None if closest is None else {"store": closest[1].path.name, "differences": closest[0]},
    }
    return Answer(document, show)


def _named(summary: CacheSummary, digest: str) -> StoreSummary:
    """Find a store whose identity is meant; its storage dtype does not matter."""
    from quatcache.store.summaries import find_store

    alike = [store for store in summary.stores if store.digest.startswith(digest) and store.manifest is not None]
    if len({store.digest for store in alike}) == 1:
        return alike[0]
    store = find_store(summary, digest)
    if store.manifest is None:
        reason = "it cannot be read" if store.problem is None else f"its manifest {store.problem.reason}"
        raise ConfigError(f"store {store.path.name} cannot be explained, because {reason}; name another one.")
    return store


def _identity(store: StoreSummary) -> Identity:
    from quatcache.encoders.identity import Identity

    assert store.manifest is not None
    return Identity(store.manifest.facts, store.digest)


def _compare(store: StoreSummary, against: StoreSummary) -> Comparison:
    return Comparison(store, against, tuple(_identity(against).differences(_identity(store))))


def _explained(store: StoreSummary, earlier: Sequence[StoreSummary]) -> Comparison:
    """Compare a store with the closest of those before it; of equally close ones with the latest."""
    kind = _identity(store).facts.get("class")
    alike = [other for other in reversed(earlier) if _identity(other).facts.get("class") == kind]
    compared = [_compare(store, other) for other in alike]
    return min(compared, key=lambda comparison: len(comparison.differences), default=Comparison(store, None))


def _heading(store: StoreSummary, names: Sequence[str]) -> str:
    created = "" if store.manifest is None else store.manifest.created[:16].replace("T", " ")
    return f"{short_name(store.path.name, names)}  {class_of(store)}, {counted(store.rows, 'row')}, created {created}"


def _lines(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    if comparison.against is None:
        yield "the first of its class here: nothing could be found"
        return
    other = short_name(comparison.against.path.name, names)
    if comparison.store.digest == comparison.against.digest:
        yield f"the identity of {other}, stored as {comparison.store.stored} instead of {comparison.against.stored}"
    elif not comparison.differences:  # only a file that was tampered with
        yield f"another digest than {other}, but the same facts"
    else:
        yield from (f"against {other}: {line}" for line in comparison.differences)
