"""Lightning's own command line, with the model and the data chosen by class path in the YAML.

Two commands stand on it: ``fit``, which runs it, and ``plan``, which only wants the objects that a fit would train.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from quatcache.errors import MissingDependencyError
from quatcache.training.lightning import LightningDataModule, cli_module
from quatcache.training.module import TrainableModel

__all__ = ["command_line"]

PLAN = "quatcache cache plan"
"""The command that wants objects and no run."""


def command_line(arguments: Sequence[str] | None, *, run: bool = True) -> Any:
    """Build model, data and trainer from arguments and YAML files, and run the subcommand that they begin with.

    Args:
        arguments: The command line: from the subcommand (``fit`` or ``validate``) on, or without one if nothing is
            run; ``None``: the process's own.
        run: Whether to run it. If not, arguments that only a run needs (``ckpt_path``) are accepted and ignored, so
            that the config which a run left behind will do.

    Returns:
        The ``LightningCLI``, with ``model``, ``datamodule`` and ``trainer``.

    Raises:
        MissingDependencyError: jsonargparse is not installed.
        SystemExit: The arguments cannot be parsed (told in a sentence if nothing is run), or help was asked for.
    """
    if find_spec("jsonargparse") is None:
        raise MissingDependencyError(
            "jsonargparse, which reads the YAML and the options, is not installed: pip install 'quatcache[cli]'"
        )
    lightning = cli_module()
    known: dict[str, set[str]] = lightning.LightningCLI.subcommands()

    class CommandLine(lightning.LightningCLI):  # type: ignore[name-defined, misc]  # chosen at run time
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {name: known[name] for name in ("fit", "validate")}

        def add_arguments_to_parser(self, parser: Any) -> None:
            if not run:
                of_fit = inspect.signature(self.trainer_class.fit).parameters
                for name in [name for name in of_fit if name not in known["fit"] | {"self"}]:
                    parser.add_argument(f"--{name}", type=Any, default=None, help="ignored")

    # Model classes of the user's own lie beside the YAML more often than they are installed.
    if "" not in sys.path and os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.append(os.getcwd())  # noqa: PTH109
    settings: dict[str, Any] = {} if run else {"run": False, "save_config_callback": None}
    parser: dict[str, Any] = {"prog": "quatcache"} if run else {"prog": PLAN, "exit_on_error": False}
    with warnings.catch_warnings():
        if not run:  # what is parsed here is a part of the process's own command line
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        try:
            return CommandLine(
                TrainableModel,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_kwargs={"overwrite": True},
                parser_kwargs=parser,
                args=None if arguments is None else list(arguments),
                **settings,
            )
        except argparse.ArgumentError as error:
            print(f"{PLAN}: error: {error}\ntip: quatcache fit --help lists what it takes", file=sys.stderr)
            raise SystemExit(2) from error
