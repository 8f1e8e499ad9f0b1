"""The command line: ``quatcache fit --config configs/icd10.yaml``.

``fit`` and ``validate`` are Lightning's own command line, with the model and the data chosen by class path in the YAML.
Cache settings are arguments of the model, so the command line overrides them like any other:
``--model.init_args.cache.batch_size 128``. Other groups of commands get their own entry in ``COMMANDS``.
``--optimizer SGD --optimizer.lr 0.1`` takes the place of the optimizer that the model configures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from quatcache import __version__
from quatcache.errors import MissingDependencyError, QuatcacheError

__all__ = ["COMMANDS", "main"]


def lightning_command(arguments: Sequence[str] | None) -> int:
    """Hand ``fit`` or ``validate`` to LightningCLI.

    Args:
        arguments: The command line from the subcommand on; ``None``: the process's own.

    Returns:
        0, once the subcommand has run.

    Raises:
        MissingDependencyError: jsonargparse is not installed.
    """
    if find_spec("jsonargparse") is None:
        raise MissingDependencyError(
            "jsonargparse, which reads the YAML and the options, is not installed: pip install 'quatcache[cli]'"
        )
    from quatcache.training.lightning import LightningDataModule, cli_module
    from quatcache.training.module import TrainableModel

    lightning = cli_module()

    class FitCLI(lightning.LightningCLI):  # type: ignore[name-defined, misc]  # chosen at run time
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            known: dict[str, set[str]] = lightning.LightningCLI.subcommands()
            return {name: known[name] for name in ("fit", "validate")}

    # Model classes of the user's own lie beside the YAML more often than they are installed.
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.append(os.getcwd())  # noqa: PTH109
    FitCLI(
        TrainableModel,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "quatcache"},
        args=None if arguments is None else list(arguments),
    )
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str] | None], int]]] = {
    "fit": ("train a model that a YAML file configures, from its cache where it has one", lightning_command),
    "validate": ("run the validation loaders of a configured model", lightning_command),
}
"""Each command's one-line help and the function that runs it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The command line without the program's name; ``None`` reads ``sys.argv``.

    Returns:
        0; 1 after an error that the user can mend, which is printed in one sentence.

    Raises:
        SystemExit: The arguments cannot be parsed, or help was asked for.
    """
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
        print(f"quatcache: {own}", file=sys.stderr)
        return 1


def own_error(error: BaseException | None) -> QuatcacheError | None:
    """Find the error of quatcache's own that an error was raised from.

    jsonargparse builds the cache settings, and wraps what they refuse in a page on every type that it tried.

    Args:
        error: What was caught.

    Returns:
        The first of its causes, itself included, that quatcache raised; ``None`` if there is none.

    Example:
        >>> print(own_error(ValueError("no more than that")))
        None
    """
    while error is not None and not isinstance(error, QuatcacheError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    raise SystemExit(main())
