"""A process of its own for each contender: nothing that one has imported, allocated or warmed up helps the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["one_process", "work"]


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONDONTWRITEBYTECODE": "",  # what pip installs is compiled; a checkout is to be so too
}


def one_process(module: str, *arguments: object, python: str = sys.executable) -> Any:
    """Run a module of the benchmarks with one thread.

    Args:
        module: Its name in the package ``benchmarks``.
        arguments: Its command line.
        python: The interpreter; one of another environment for a contender that cannot live in this one.

    Returns:
        The JSON value that the last line of its output is.

    Raises:
        SystemExit: It failed, for instance because results were not equal; what it said stands above.
    """
    environment = os.environ | ENVIRONMENT
    command = [python, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:])
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}; no figure is given")
    return json.loads(done.stdout.splitlines()[-1])


def work(module: str, function: str, *, python: str = sys.executable, **options: Any) -> Any:
    """Call a function of a module of the benchmarks in a process of its own, with one thread.

    Args:
        module: Its name in the package ``benchmarks``.
        function: A function there, whose answer JSON can hold.
        python: The interpreter.
        options: Its arguments, such as JSON can hold; paths become strings.
    """
    return one_process("work", module, function, json.dumps(options, default=str), python=python)
