"""``quatcache cache``: options and dispatch of the commands that look after a cache directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from quatcache.cli import commands
from quatcache.cli.answers import Answer, respond
from quatcache.units import parse_size

__all__ = ["cache_command"]

_SETTINGS_OF_AN_ENCODER = (
    "prompt", "prompt_name", "role", "normalize_embeddings", "truncate_dim", "max_seq_length", "precision",
)  # fmt: skip


def cache_command(arguments: Sequence[str] | None) -> int:
    """Run one of the commands of ``quatcache cache``, or ``quatcache explain``.

    Args:
        arguments: The command line from "cache" or "explain" on; ``None``: the process's own.

    Returns:
        0; 1 where ``verify`` found damage, or ``prune`` could not remove something.

    Raises:
        QuatcacheError: The directory is no cache, cannot be read, or an argument names nothing in it.
        SystemExit: The arguments cannot be parsed, or help was asked for.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(given if given[:1] == ["explain"] else given[1:])
    if rest and options.run is not commands.plan:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.run is commands.explain and options.encoder is None:
        alone = [name for name in _SETTINGS_OF_AN_ENCODER if getattr(options, name) not in (None, False)]
        if alone:
            parser.error(f"--{alone[0].replace('_', '-')} is a setting of --encoder, which is not given: add it")
    options.rest = rest
    return respond(lambda: options.run(options), as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quatcache cache",
        description="Look after a cache: the save_dir of a CacheConfig.",
        epilog="example:\n  quatcache cache inspect cache",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(run: Callable[[argparse.Namespace], Answer], text: str, *examples: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            run.__name__,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n".join(["examples:", *(f"  quatcache cache {run.__name__} {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        if run is not commands.plan:
            command.add_argument("save_dir", type=Path, metavar="SAVE_DIR", help="the directory of the cache")
        command.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
        return command

    inspect = add(commands.inspect, "list encoders, datasets, sizes, ages and leftovers", "cache", "cache 3f2a --facts")
    inspect.add_argument("digest", nargs="?", metavar="DIGEST", help="one store, by the beginning of its digest")
    inspect.add_argument("--facts", action="store_true", help="show everything that an identity is made from")

    add(commands.verify, "compare every file with its checksum; exit code 1 if one differs", "cache")

    explain = add(
        commands.explain,
        "say how encoders differ, and so why a run found no rows",
        "cache",
        "cache 3f2a 90bc",
        "cache --encoder all-MiniLM-L6-v2 --max-seq-length 128",
    )
    explain.add_argument(
        "digests", nargs="*", metavar="DIGEST",
        help="none: each store and the closest one before it; one: it and all others; two: these",
    )  # fmt: skip
    explain.add_argument(
        "--encoder", metavar="PATH_OR_NAME", help="compare a sentence-transformers model with what is stored"
    )
    settings = explain.add_argument_group("settings of --encoder, as SentenceTransformerEncoder takes them")
    settings.add_argument("--prompt", help="text before every item")
    settings.add_argument("--prompt-name", help="name of one of the model's own prompts")
    settings.add_argument("--role", choices=["query", "document"], help="encode as encode_query or encode_document do")
    settings.add_argument("--normalize-embeddings", action="store_true", help="scale rows to length 1")
    settings.add_argument("--truncate-dim", type=int, help="keep the first dimensions only")
    settings.add_argument("--max-seq-length", type=int, help="cut items after that many tokens")
    settings.add_argument("--precision", help="the trainer's, such as bf16-mixed (default: 32-true)")

    plan = add(
        commands.plan,
        "measure on a sample what a fill would cost, and after which epoch it pays",
        "--config configs/icd10.yaml",
        "--config configs/icd10.yaml --model.init_args.cache.dtype float16",
    )
    plan.usage = "quatcache cache plan [--json] ARGUMENTS OF quatcache fit"

    prune = add(
        commands.prune,
        "remove leftovers, and what was not used for long or exceeds a budget; without --apply only show it",
        "cache --unused-days 90",
        "cache --max-size 8GiB --apply",
    )
    prune.add_argument("--unused-days", type=_days, metavar="N", help="stores and datasets that no run used for N days")
    prune.add_argument(
        "--max-size", type=_bytes, metavar="SIZE", help="least recently used stores until the rest fits, such as 8GiB"
    )
    prune.add_argument("--apply", action="store_true", help="remove it")

    export = add(
        commands.export,
        "write the rows of a store for other tools, to .npy or .parquet",
        "cache 3f2a --to vectors.npy",
        "cache --dataset 77d0 --to vectors.parquet",
    )
    export.add_argument("digest", nargs="?", metavar="DIGEST", help="the store, unless there is one only; see inspect")
    export.add_argument("--to", type=Path, required=True, metavar="FILE", help="vectors.npy or vectors.parquet")
    export.add_argument("--dataset", metavar="DIGEST", help="rows in the order of a dataset, and its targets")
    export.add_argument("--encoder-name", metavar="NAME", help="which encoder of the dataset, if that is not clear")
    export.add_argument("--force", action="store_true", help="overwrite")
    return parser


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _days(text: str) -> float:
    """Read a number of days.

    Example:
        >>> _days("0.5")
        0.5
    """
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days; give one of at least 0, such as 90")
    return days
