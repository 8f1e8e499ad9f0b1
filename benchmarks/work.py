"""One call in a process of its own: ``python -m benchmarks.work MODULE FUNCTION '{"option": value}'``.

The last line of the output is what the function returned, as JSON.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings

__all__ = ["quiet"]


def quiet() -> None:
    """Silence advice on workers and devices, which is the same for every contender."""
    warnings.filterwarnings("ignore")
    for talker in ("pytorch_lightning", "lightning.pytorch", "quatcache", "sentence_transformers", "datasets"):
        logging.getLogger(talker).setLevel(logging.ERROR)


def main() -> None:
    """Make the call that the command line names."""
    module, function, options = sys.argv[1:]
    quiet()
    called = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    quiet()  # importing Lightning sets its own level
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    print(json.dumps(called(**json.loads(options))))


if __name__ == "__main__":
    main()
