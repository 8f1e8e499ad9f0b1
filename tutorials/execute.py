"""Execute the tutorials from their percent scripts, each in a kernel and an empty folder of its own.

``python tutorials/execute.py`` executes all of them and fails at the first cell that fails, or if a notebook and its
script have come apart. ``--write`` also stores the executed notebook, outputs included, beside its script.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LONGEST_CELL = 600  # seconds


def scripts() -> list[Path]:
    """List the percent scripts: one in each tutorial's folder, of the folder's name."""
    return [
        folder / f"{folder.name}.py" for folder in sorted(HERE.iterdir()) if (folder / f"{folder.name}.py").exists()
    ]


def cells(notebook: Any) -> list[tuple[str, str]]:
    """Give each cell's kind and source: what has to be equal in a notebook and its script."""
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def execute(script: Path) -> Any:
    """Run a script's cells in a fresh kernel.

    Args:
        script: A percent script.

    Returns:
        The notebook with its outputs.

    Raises:
        CellExecutionError: A cell failed; the message shows it.
    """
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # nbformat would draw them at random, and each run would be a new notebook
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=LONGEST_CELL, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


def main() -> None:
    """Execute every tutorial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the executed notebooks")
    arguments = parser.parse_args()
    for script in scripts():
        begun = time.monotonic()
        target = script.with_suffix(".ipynb")
        executed = execute(script)
        if arguments.write:
            nbformat.write(executed, target)
        elif cells(nbformat.read(target, as_version=4)) != cells(executed):
            raise SystemExit(f"{target} and {script.name} differ: python tutorials/execute.py --write")
        print(f"{script.relative_to(HERE)}: {len(executed.cells)} cells in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
