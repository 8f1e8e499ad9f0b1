"""One contender in a process of its own: ``python -m benchmarks.run_one SHAPE CONTENDER --rows N --epochs E``.

The last line of the output is a JSON list: the seconds of the timed epochs, or with ``--losses`` the loss of each step.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings

import torch

from benchmarks.epochs import CONTENDERS, SHAPES, losses_of, run


def main() -> None:
    """Run the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--losses", action="store_true", help="print losses instead of seconds")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore")  # advice on workers and devices, the same for every contender
    for talker in ("pytorch_lightning", "quatcache"):
        logging.getLogger(talker).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.losses:
        result = losses_of(arguments.contender, arguments.shape, arguments.rows, arguments.epochs).tolist()
    else:
        result = run(arguments.contender, arguments.shape, arguments.rows, arguments.epochs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
