"""The command line: ``quatcache fit --config configs/icd10.yaml``, ``quatcache cache inspect cache``.

``fit`` and ``validate`` are Lightning's own command line, with the model and the data chosen by class path in the YAML.
``cache`` is the group of commands that look after a cache directory; ``explain`` is the short name of one of them.

Importing this loads neither torch nor Lightning, which take seconds: help is there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from quatcache import __version__
from quatcache.cli.answers import escape_unknown_characters, own_error, printable
from quatcache.cli.cache import cache_command
from quatcache.cli.fit import lightning_command

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str] | None], int]]] = {
    "fit": ("train a model that a YAML file configures, from its cache where it has one", lightning_command),
    "validate": ("run the validation loaders of a configured model", lightning_command),
    "cache": ("look after a cache: inspect, verify, explain, plan, prune, export", cache_command),
    "explain": ("say why a run found nothing in a cache; short for cache explain", cache_command),
}
"""Each command's one-line help and the function that runs it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The command line without the program's name; ``None`` reads ``sys.argv``.

    Returns:
        0; 1 after an error that the user can mend, which is printed in one sentence, and where ``cache verify`` found
        damage.

    Raises:
        SystemExit: The arguments cannot be parsed, or help was asked for.
    """
    escape_unknown_characters(sys.stdout)
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="quatcache",
        description="Compute every vector of a frozen encoder once.",
        epilog="\n".join(["commands:", *(f"  {name:10} {text}" for name, (text, _) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"quatcache {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below; each has a --help")
    # The command alone is parsed here: what follows belongs to it.
    chosen = parser.parse_args(given[:1])
    try:
        # LightningCLI reads sys.argv itself, and warns about a list when there are arguments there as well.
        return COMMANDS[chosen.command][1](None if arguments is None else given)
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        print(f"quatcache: {printable(own)}", file=sys.stderr)
        return 1
