"""``quatcache fit`` and ``quatcache validate``: Lightning's own command line.

Cache settings are arguments of the model, so the command line overrides them like any other:
``--model.init_args.cache.batch_size 128``. ``--optimizer SGD --optimizer.lr 0.1`` takes the place of the optimizer that
the model configures.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["lightning_command"]


def lightning_command(arguments: Sequence[str] | None) -> int:
    """Hand ``fit`` or ``validate`` to LightningCLI.

    Args:
        arguments: The command line from the subcommand on; ``None``: the process's own.

    Returns:
        0, once the subcommand has run.

    Raises:
        MissingDependencyError: jsonargparse is not installed.
    """
    from quatcache.training.command_line import command_line

    command_line(arguments)
    return 0
