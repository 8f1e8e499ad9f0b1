"""A process of its own for each contender: nothing that one has imported, allocated or warmed up helps the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["one_process"]


def one_process(module: str, *arguments: object) -> Any:
    """Run a module of the benchmarks with one thread.

    Args:
        module: Its name in the package ``benchmarks``.
        arguments: Its command line.

    Returns:
        The JSON value that the last line of its output is.

    Raises:
        subprocess.CalledProcessError: It failed, for instance because results were not equal.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
