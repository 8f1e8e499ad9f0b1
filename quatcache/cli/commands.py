"""What each command of ``quatcache cache`` does with its options.

The work is done by ``quatcache.store``, ``quatcache.encoders`` and ``quatcache.training``, which are imported when a
command runs: help needs no torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from quatcache.cli.answers import Answer, printable, progress_bar
from quatcache.cli.display import (
    age,
    cache_document,
    finding_document,
    grid,
    show_cache,
    show_facts,
    show_findings,
    size,
)
from quatcache.cli.explain import explain_encoder, explain_stores
from quatcache.errors import ConfigError
from quatcache.units import counted

if TYPE_CHECKING:
    from quatcache.encoders.identity import Identity
    from quatcache.store.pruning import Outcome, PrunePlan

__all__ = ["explain", "export", "inspect", "plan", "prune", "verify"]


def inspect(options: argparse.Namespace) -> Answer:
    """List what a cache holds."""
    from quatcache.store.inspection import inspect_cache
    from quatcache.store.summaries import find_store

    summary = inspect_cache(options.save_dir)
    stores = summary.stores if options.digest is None else (find_store(summary, options.digest),)

    def show(console: Console) -> None:
        show_cache(console, summary, stores, time.time(), whole=options.digest is None)
        if options.facts:
            show_facts(console, stores)

    return Answer(cache_document(summary, stores, facts=options.facts), show)


def verify(options: argparse.Namespace) -> Answer:
    """Compare every file of a cache with its checksum; the exit code is 1 if one is damaged."""
    from quatcache.store.inspection import check_cache, inspect_cache

    summary = inspect_cache(options.save_dir)
    with progress_bar("Verifying", summary.bytes) as advance:
        check = check_cache(summary, advance)
    whole = "it is whole" if check.files == 1 else "all of them are whole"
    verdict = counted(len(check.findings), "problem") if check.findings else whole

    def show(console: Console) -> None:
        show_findings(console, check.findings, summary.path)
        console.print(Text(f"{counted(check.files, 'file')}, {size(check.bytes)}: {verdict}."))

    document = {
        "path": str(summary.path),
        "files": check.files,
        "bytes": check.bytes,
        "damaged": [finding_document(found, summary.path) for found in check.findings],
    }
    return Answer(document, show, code=1 if check.findings else 0)


def explain(options: argparse.Namespace) -> Answer:
    """Say how encoders differ."""
    from quatcache.store.inspection import inspect_cache

    if len(options.digests) > 2 or (options.digests and options.encoder):
        raise ConfigError(f"{len(options.digests)} digests are given; give up to two, or none with --encoder.")
    summary = inspect_cache(options.save_dir)
    if options.encoder is None:
        return explain_stores(summary, options.digests)
    return explain_encoder(summary, _identity_of(options))


def _identity_of(options: argparse.Namespace) -> Identity:
    from transformers.utils import logging as transformers_logging

    from quatcache.encoders import SentenceTransformerEncoder, identify
    from quatcache.encoders.identity import autocast_of

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading the weights: a moment
    names = ("prompt", "prompt_name", "role", "truncate_dim", "max_seq_length")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    encoder = SentenceTransformerEncoder(options.encoder, normalize_embeddings=options.normalize_embeddings, **settings)
    return identify(encoder, autocast=autocast_of(options.precision or "32-true"))


def plan(options: argparse.Namespace) -> Answer:
    """Show what ``quatcache.training.plan`` finds out for the config that is given in the rest of the options."""
    from quatcache.training.plan import plan_from_config

    planned = plan_from_config(options.rest)

    def show(console: Console) -> None:
        console.print(grid(*planned.table()))
        console.print(Text(printable(planned.summary())))

    return Answer(planned.to_json(), show)


def prune(options: argparse.Namespace) -> Answer:
    """Choose what can go, and remove it with ``--apply``; the exit code is 1 if something could not be removed."""
    from quatcache.store.inspection import inspect_cache
    from quatcache.store.pruning import Outcome, choose, remove

    now = time.time()
    summary = inspect_cache(options.save_dir)
    plan = choose(summary, unused_days=options.unused_days, max_bytes=options.max_size, now=now)
    outcomes: Sequence[Outcome] = [Outcome(removal, 0) for removal in plan.removals]
    if options.apply:
        with progress_bar("Removing", len(plan.removals), in_bytes=False) as advance:
            outcomes = remove(plan, lambda removal: advance(1))
    freed = sum(outcome.freed_bytes for outcome in outcomes) if options.apply else plan.freed_bytes
    document = {
        "path": str(summary.path),
        "applied": options.apply,
        "bytes": summary.bytes,
        "freed_bytes": freed,
        "removals": [
            {
                "path": str(outcome.removal.path.relative_to(summary.path)),
                "kind": outcome.removal.kind,
                "reason": outcome.removal.reason,
                "bytes": outcome.removal.bytes,
                "removed": options.apply and not outcome.note,
                "note": outcome.note,
            }
            for outcome in outcomes
        ],
        "notes": list(plan.notes),
    }

    def show(console: Console) -> None:
        _show_pruning(console, plan, outcomes, options.apply, now)
        left = size(summary.bytes - freed)
        if options.apply:
            console.print(Text(f"{size(freed)} freed, {left} are left."))
        elif plan.removals:
            console.print(
                Text(f"{size(freed)} would be freed, {left} would be left. Nothing was removed: add --apply.")
            )
        else:
            console.print(Text(f"Nothing to remove; {left} are used."))

    return Answer(document, show, code=1 if any(outcome.failed for outcome in outcomes) else 0)


def _show_pruning(console: Console, plan: PrunePlan, outcomes: Sequence[Outcome], applied: bool, now: float) -> None:
    if outcomes:
        lines = [
            [
                outcome.removal.path.relative_to(plan.path),
                outcome.removal.kind,
                size(outcome.removal.bytes),
                age(now - outcome.removal.last_used),
                outcome.removal.reason,
                *([outcome.note or "removed"] if applied else []),
            ]
            for outcome in outcomes
        ]
        console.print(grid(["path", "what", "size", "last used", "why", *(["done"] if applied else [])], lines))
    for note in plan.notes:
        console.print(Text(printable(note)))


def export(options: argparse.Namespace) -> Answer:
    """Write the rows of a store for other tools."""
    from quatcache.store.export import export_rows
    from quatcache.store.inspection import inspect_cache
    from quatcache.store.summaries import find_store, find_table

    summary = inspect_cache(options.save_dir)
    if options.digest is None and len(summary.stores) != 1:
        raise ConfigError(
            f"{summary.path} has {counted(len(summary.stores), 'store')}; name one, as quatcache cache inspect does."
        )
    store = summary.stores[0] if options.digest is None else find_store(summary, options.digest)
    dataset = None if options.dataset is None else find_table(summary, options.dataset)
    total = store.rows if dataset is None or dataset.table is None else len(dataset.table)
    with progress_bar("Exporting", total, in_bytes=False) as advance:
        written = export_rows(
            store, options.to, dataset=dataset, encoder=options.encoder_name, force=options.force, advance=advance
        )
    document = {
        "store": store.path.name,
        "dataset": None if dataset is None else dataset.path.stem,
        "files": [str(path) for path in written.files],
        "shape": list(written.shape),
        "dtype": written.dtype,
        "notes": list(written.notes),
    }

    def show(console: Console) -> None:
        shape = " x ".join(f"{length:,}" for length in written.shape)
        console.print(Text(printable(f"{written.files[0]}: {shape} {written.dtype}")))
        for path in written.files[1:]:
            console.print(Text(printable(f"{path}")))
        for note in written.notes:
            console.print(Text(printable(note)))

    return Answer(document, show)
