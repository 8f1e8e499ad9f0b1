"""Stores, datasets and leftovers of a cache as rich tables and as JSON.

Everything that a file says is shown as plain text: neither rich's markup nor a terminal's control codes in it count.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quatcache.cli.answers import printable
from quatcache.units import counted, readable_shape

if TYPE_CHECKING:
    from quatcache.store.summaries import CacheSummary, Finding, StoreSummary, Stray, TableSummary

__all__ = [
    "age",
    "cache_document",
    "class_of",
    "finding_document",
    "grid",
    "short_name",
    "show_cache",
    "show_facts",
    "show_findings",
    "size",
    "timestamp",
]

_SHORT = 8
_RIGHT = ("rows", "size", "shards", "samples", "items", "distinct", "stored", "to encode", "bytes", "fill")
_FIXED = ("store", "dataset", "size", "created", "last used")
# Facts that say little to a person, or stand in a column of their own.
_UNTOLD = ("autocast", "class", "embedding_size", "schema", "version")
_UNTOLD_BUT = {"autocast": None, "version": 1}
_TOLD = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_CALENDAR = (-62_135_596_800, 253_402_300_799)  # years 1 to 9999, in seconds since 1970


def size(nbytes: int) -> str:
    """Write a number of bytes for people; the training package has the same, but takes seconds to import.

    Example:
        >>> size(999), size(1_536_000)
        ('999 bytes', '1.5 MB')
    """
    if nbytes < 1000:
        return f"{nbytes} bytes"
    amount, units = nbytes / 1000, iter(("kB", "MB", "GB"))
    unit = next(units)
    while amount >= 999.95 and unit != "TB":
        amount, unit = amount / 1000, next(units, "TB")
    return f"{amount:.1f} {unit}"


def age(seconds: float) -> str:
    """Say how long ago something was.

    Example:
        >>> age(3), age(7200), age(200_000)
        ('just now', '2 h ago', '2 days ago')
    """
    for unit, length, limit in (("min", 60, 60), ("h", 3600, 48)):
        if seconds < length:
            return "just now"
        if seconds < length * limit:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds // 86_400:.0f} days ago"


def timestamp(seconds: float) -> str:
    """Write seconds since 1970 as ISO 8601, UTC; a time of a file beyond the calendar becomes its first or last second.

    Example:
        >>> timestamp(0.0), timestamp(1e12)
        ('1970-01-01T00:00:00+00:00', '9999-12-31T23:59:59+00:00')
    """
    within = min(max(seconds, _CALENDAR[0]), _CALENDAR[1])
    return (_EPOCH + timedelta(seconds=within)).isoformat(timespec="seconds")


def short_name(name: str, names: Iterable[str]) -> str:
    """Cut a digest to its beginning, as long as it needs to be unique; what follows the digest stays.

    Example:
        >>> short_name("0123456789" + "a" * 22 + "-float16", ["0123456789" + "a" * 22, "f" * 32])
        '01234567-float16'
    """
    digest, others = name[:32], {other[:32] for other in names} - {name[:32]}
    length = next((n for n in range(_SHORT, 32) if not any(other.startswith(digest[:n]) for other in others)), 32)
    return digest[:length] + name[32:]


def class_of(store: StoreSummary) -> str:
    """Name the encoder class of a store, without its module; "?" if nothing says it."""
    facts = {} if store.manifest is None else store.manifest.facts
    return str(facts.get("class", "?")).rpartition(".")[2]


def grid(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """Make a table of plain texts."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings:
        fixed = heading in _FIXED
        table.add_column(heading, justify="right" if heading in _RIGHT else "left", overflow="fold", no_wrap=fixed)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def show_cache(
    console: Console, summary: CacheSummary, stores: Sequence[StoreSummary], now: float, *, whole: bool
) -> None:
    """Show what a cache holds.

    Args:
        console: Where.
        summary: The cache.
        stores: Those of its stores that are wanted.
        now: Seconds since 1970.
        whole: Whether to show everything else as well.
    """
    names = [store.path.name for store in summary.stores]
    if whole:
        counts = [counted(len(summary.stores), "store"), counted(len(summary.tables), "dataset"), size(summary.bytes)]
        console.print(Text(printable(f"{summary.path}: {', '.join(counts)}")))
    if stores:
        headings = ["store", "rows", "row", "size", "shards", "created", "last used"]
        lines = [_store_line(store, names, now) for store in stores]
        console.print(grid(headings, lines, "Stores"))
        lines = [[short_name(store.path.name, names), identity_line(store), _environment(store)] for store in stores]
        console.print(grid(["store", "identity", "environment"], lines, "Identities"))
    if whole and summary.tables:
        headings = ["dataset", "samples", "layout", "encoders", "targets", "size", "last used"]
        tables = [table.path.stem for table in summary.tables]
        console.print(grid(headings, [_table_line(table, tables, now) for table in summary.tables], "Datasets"))
    if whole and summary.strays:
        from quatcache.store.pruning import is_young

        lines = [[stray.path.relative_to(summary.path), stray.kind, size(stray.bytes), age(now - stray.modified),
                  "leaves it until it is an hour old" if is_young(stray, now) else "removes it"]
                 for stray in summary.strays]  # fmt: skip
        console.print(grid(["leftover", "what", "size", "written", "quatcache cache prune"], lines, "Leftovers"))
    if whole and summary.foreign:
        shown = ", ".join(str(path.relative_to(summary.path)) for path in summary.foreign[:5])
        more = f" and {len(summary.foreign) - 5} more" if len(summary.foreign) > 5 else ""
        console.print(Text(printable(f"Not of the cache, left alone: {shown}{more}")))
    if whole:
        show_findings(console, summary.findings, summary.path)


def _store_line(store: StoreSummary, names: Collection[str], now: float) -> list[object]:
    manifest, name = store.manifest, short_name(store.path.name, names)
    nbytes, used = size(store.bytes), age(now - store.last_used)
    if manifest is None:
        return [name, "?", store.stored or "?", nbytes, store.shards, "?", used]
    row = f"{readable_shape(manifest.row_shape or (), manifest.longest)} {store.stored}".strip()
    return [name, f"{store.rows:,}", row, nbytes, store.shards, manifest.created[:10], used]


def _table_line(table: TableSummary, names: Collection[str], now: float) -> list[object]:
    name, used = short_name(table.path.stem, names), age(now - table.last_used)
    if table.table is None:
        return [name, "?", "?", "?", "?", size(table.bytes), used]
    columns = table.table.targets
    targets = "-" if columns is None else ", ".join(_column(column) for column in columns) or "none"
    encoders = ", ".join(sorted(table.table.keys))
    return [name, f"{len(table.table):,}", table.table.layout, encoders, targets, size(table.bytes), used]


def _column(column: Any) -> str:
    shape = "x".join(map(str, column.shape[1:]))
    return str(column.dtype).removeprefix("torch.") + (f" {shape}" if shape else "")


def _environment(store: StoreSummary) -> str:
    known = {} if store.manifest is None else store.manifest.environment
    return ", ".join(f"{name} {value}" for name, value in known.items())


def identity_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the facts of an identity that tell a person which encoder this is.

    Example:
        >>> identity_facts({"class": "x.Y", "pooling": "mean", "prompt": None, "weights.a": "00", "tokenizer.b": 1})
        {'pooling': 'mean'}
    """
    told = {
        name: value
        for name, value in facts.items()
        if ("." not in name or name.startswith("identity.") or name.endswith(".architecture"))
        and (name not in _UNTOLD or (name in _UNTOLD_BUT and value != _UNTOLD_BUT[name]))
        and value not in (None, False, "")
    }
    return dict(list(told.items())[:_TOLD])


def identity_line(store: StoreSummary) -> str:
    """Describe the encoder of a store in one line."""
    if store.manifest is None:
        return "?"
    told = []
    for name, value in identity_facts(store.manifest.facts).items():
        told.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    tensors = sum(name.startswith("weights.") for name in store.manifest.facts)
    return f"{class_of(store)}: {'; '.join([*told, counted(tensors, 'tensor')])}"


def show_facts(console: Console, stores: Sequence[StoreSummary]) -> None:
    """Show all facts of identities, and every environment in which their rows were made or found right."""
    for store in stores:
        if store.manifest is not None:
            facts = [(name, _fact(value)) for name, value in store.manifest.facts.items()]
            console.print(grid(["fact", "value"], facts, f"Identity of {store.path.name}"))
            seen = [store.manifest.environment, *store.manifest.verified]
            console.print(grid(["environment"], [[environment] for environment in seen]))


def _fact(value: object) -> object:
    """Write a value as ``explain`` and the log do, texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def show_findings(console: Console, findings: Sequence[Finding], root: Path) -> None:
    """Show what is damaged, with the reason and the remedy."""
    if findings:
        lines = [[found.path.relative_to(root), found.reason, found.remedy] for found in findings]
        console.print(grid(["file", "reason", "remedy"], lines, "Damaged or unreadable"))


def finding_document(found: Finding | None, root: Path) -> dict[str, str] | None:
    """Give a finding for JSON."""
    if found is None:
        return None
    return {"path": str(found.path.relative_to(root)), "reason": found.reason, "remedy": found.remedy}


def cache_document(summary: CacheSummary, stores: Sequence[StoreSummary], *, facts: bool) -> dict[str, Any]:
    """Give what a cache holds for JSON.

    Args:
        summary: The cache.
        stores: Those of its stores that are wanted.
        facts: Whether to give all facts of each identity.
    """
    root = summary.path
    return {
        "path": str(root),
        "bytes": summary.bytes,
        "stores": [_store_document(store, root, facts) for store in stores],
        "datasets": [_table_document(table, root) for table in summary.tables],
        "leftovers": [_stray_document(stray, root) for stray in summary.strays],
        "foreign": [str(path.relative_to(root)) for path in summary.foreign],
    }


def _store_document(store: StoreSummary, root: Path, facts: bool) -> dict[str, Any]:
    manifest = store.manifest
    content: dict[str, Any] = {
        "name": store.path.name,
        "digest": store.digest,
        "bytes": store.bytes,
        "shards": store.shards,
        "last_used": timestamp(store.last_used),
        "problem": finding_document(store.problem, root),
    }
    if manifest is not None:
        content |= {
            "class": manifest.facts.get("class"),
            "identity": identity_facts(manifest.facts),
            "rows": manifest.rows,
            "row_shape": manifest.row_shape,
            "longest": manifest.longest,
            "dtype": store.stored,
            "given_dtype": None if manifest.given_dtype is None else str(manifest.given_dtype).removeprefix("torch."),
            "created": manifest.created,
            "environment": dict(manifest.environment),
            "verified": [dict(environment) for environment in manifest.verified],
        }
        content |= {"facts": dict(manifest.facts)} if facts else {}
    return content


def _table_document(table: TableSummary, root: Path) -> dict[str, Any]:
    content: dict[str, Any] = {
        "digest": table.path.stem,
        "bytes": table.bytes,
        "last_used": timestamp(table.last_used),
        "problem": finding_document(table.problem, root),
    }
    if table.table is not None:
        columns = table.table.targets
        content |= {
            "samples": len(table.table),
            "layout": table.table.layout,
            "encoders": sorted(table.table.keys),
            "targets": None if columns is None else [_column(column) for column in columns],
        }
    return content


def _stray_document(stray: Stray, root: Path) -> dict[str, Any]:
    path = str(stray.path.relative_to(root))
    return {"path": path, "kind": stray.kind, "bytes": stray.bytes, "modified": timestamp(stray.modified)}
