"""Rows that were read as one batch, and become one again without being copied.

A dataset that answers for a whole batch gives its samples one by one all the same, and ``default_collate`` copies them
together. Rows of a batch that was read at once lie one behind the other, in shared memory already where a worker has
read them: the batch is there. torch documents that ``default_collate_fn_map`` may be told of a type of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

__all__ = ["CachedRow", "collate_rows", "rows_of"]


class CachedRow(torch.Tensor):
    """The first row of a batch, whose type decides how it is collated; what is computed of it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as Parameter has it


def rows_of(batch: torch.Tensor) -> list[torch.Tensor]:
    """Take a batch ``(B, *shape)`` apart into rows that ``default_collate`` puts together for nothing.

    Example:
        >>> from torch.utils.data import default_collate
        >>> batch = torch.zeros(2, 3)
        >>> default_collate(rows_of(batch)).data_ptr() == batch.data_ptr()
        True
    """
    rows = list(batch.unbind())
    rows[:1] = [row.as_subclass(CachedRow) for row in rows[:1]]
    return rows


def collate_rows(rows: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """Give the batch that rows are, in their order; of other rows what ``default_collate`` makes of tensors."""
    first = rows[0]
    step = first.numel() * first.element_size()
    start, count = first.data_ptr(), len(rows)
    kind = first.shape, first.stride(), first.dtype  # somebody may have transposed some of them
    whole = (
        first.is_contiguous()
        and all(
            row.data_ptr() == start + step * place and (row.shape, row.stride(), row.dtype) == kind
            for place, row in enumerate(rows)
        )
        and first.storage_offset() * first.element_size() + step * count <= first.untyped_storage().nbytes()
    )
    if whole:
        return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))
    plain = [row.as_subclass(torch.Tensor) if isinstance(row, CachedRow) else row for row in rows]
    return collate_tensor_fn(plain, collate_fn_map=collate_fn_map)  # type: ignore[no-any-return]


default_collate_fn_map[CachedRow] = collate_rows
ForkingPickler.register(CachedRow, reduce_tensor)  # another process gets a plain tensor
