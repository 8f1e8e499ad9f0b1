"""What a warm start is held against: a whole process that trains on one safetensors file, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from benchmarks.lean import Gather, HeadModule, IndexBatches, pl
from benchmarks.shapes import Data, Shape, tensor_order

__all__ = ["train", "write"]

SHAPE = Shape("two classes", hidden=None, batch_size=256, logged=True)


def train(file: str, rows: int, steps: int) -> dict[str, Any]:
    """Map the file and fit for so many steps with the leanest loop under Lightning."""
    tensors = load_file(Path(file))
    data = Data(tensors["values"], tensors["targets"])
    sampler = IndexBatches(rows, SHAPE.batch_size, tensor_order)
    loader: DataLoader[Any] = DataLoader(Gather(data), sampler=sampler, batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(HeadModule(SHAPE, True, None), loader)
    return {"steps": trainer.global_step}


def write(file: str, rows: int) -> dict[str, Any]:
    """Write the rows that the cache has into one file, with their targets."""
    from safetensors.torch import save_file

    from benchmarks.rows import row_blocks

    values = torch.cat([block for _, block in row_blocks(rows)])
    save_file({"values": values, "targets": torch.arange(rows) % 2}, file)
    return {"bytes": Path(file).stat().st_size}
