"""What an export reads: all rows of a store, or those of a dataset in its order, block by block.

A store that serves training takes locks and keeps what it has seen. Here the shards are opened as they are, each
checked first, and nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.errors import CacheMissError, ConfigError, FormatError
from quatcache.keys import KeyIndex
from quatcache.store.ragged import RaggedRows
from quatcache.store.rows import Rows, concatenate, no_rows, take
from quatcache.store.shards import open_shard
from quatcache.store.summaries import StoreSummary
from quatcache.store.tables import DatasetTable

__all__ = ["Block", "Selection", "StoredRows", "rows_in_order"]

BLOCK_BYTES = 32 << 20
"""Rows are read in blocks of this size, which also are the row groups of a parquet file."""

Numbers = npt.NDArray[np.int64]
"""Row numbers within one store."""

Block = Mapping[str, npt.NDArray[Any]]
"""Arrays of the same samples by name: "vectors", "keys", "targets.0", ..."""


class StoredRows:
    """Every row of a store by number, in the memory map of its shards, each of which was checked.

    Args:
        store: The store, as :func:`~quatcache.store.inspection.inspect_cache` lists it.

    Attributes:
        name: Name of its directory.
        kind: What its rows are.
        index: Finds the numbers of keys.

    Raises:
        ConfigError: It has no rows.
        FormatError: It, or one of its shards, is damaged.
    """

    def __init__(self, store: StoreSummary) -> None:
        """Open every shard."""
        name = store.path.name
        if store.problem is not None or store.manifest is None:
            reason = "" if store.problem is None else f": {store.problem.path.name} {store.problem.reason}"
            raise FormatError(f"store {name} cannot be exported{reason}; run with it once, or choose another one.")
        if store.manifest.kind is None:
            raise ConfigError(f"store {name} has no rows; fill it first.")
        self.name = name
        self.kind = store.manifest.kind
        self.index = KeyIndex()
        self._keys: list[Rows] = [torch.empty(0, 2, dtype=torch.int64)]  # what there is before the first shard
        self._values: list[Rows] = [no_rows(self.kind.row_shape, self.kind.dtype)]
        starts = [0, 0]
        for entry in store.manifest.shards:
            try:
                keys, values, _ = open_shard(store.path, entry, store.manifest.digest, self.kind)
            except FormatError as error:
                reason = str(error).partition("; ")[0]
                raise FormatError(
                    f"store {name} cannot be exported: {reason}; run with it once, to encode these rows again."
                ) from error
            self.index.add(keys, np.arange(starts[-1], starts[-1] + len(keys)))
            self._keys.append(torch.from_numpy(keys))
            self._values.append(values)
            starts.append(starts[-1] + len(keys))
        self._starts = np.array(starts)

    def latest(self) -> Numbers:
        """Give the number of each row that counts, ascending, ``(N, 1)``: of a key put twice the later one."""
        return np.sort(self.index.items()[1])[:, None]

    def vectors(self, numbers: Numbers) -> torch.Tensor:
        """Read rows ``(n,)`` as ``(n, *row_shape)``; of sequences, their elements."""
        rows = self._gather(self._values, numbers)
        return rows.packed().values if isinstance(rows, RaggedRows) else rows

    def lengths(self, numbers: Numbers) -> Numbers:
        """Give the lengths of sequences ``(n,)``."""
        lengths = [rows.lengths for rows in self._values if isinstance(rows, RaggedRows)]
        return torch.cat(lengths).numpy()[numbers]

    def keys(self, numbers: Numbers) -> torch.Tensor:
        """Read the keys of rows ``(n,)`` as ``(n, 2)``."""
        keys = self._gather(self._keys, numbers)
        assert isinstance(keys, torch.Tensor)
        return keys

    def _gather(self, shards: Sequence[Rows], numbers: Numbers) -> Rows:
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        parts, places = [shards[0]], [np.empty(0, np.int64)]
        for shard in np.unique(which).tolist():
            places.append(np.flatnonzero(which == shard))
            parts.append(take(shards[shard], torch.from_numpy(numbers[places[-1]] - self._starts[shard])))
        together: Rows = concatenate(parts)
        return take(together, torch.from_numpy(np.argsort(np.concatenate(places))))


def rows_in_order(rows: StoredRows, table: DatasetTable, encoder: str | None) -> Numbers:
    """Find the row of each item of a dataset.

    Args:
        rows: The rows of a store.
        table: The dataset.
        encoder: Name of the encoder in the dataset; None: the one whose items are in the store.

    Returns:
        Row numbers ``(N, items)``.

    Raises:
        ConfigError: The dataset has no such encoder, or several that are meant.
        CacheMissError: An item has no row here.
    """
    known = ", ".join(repr(name) for name in sorted(table.keys))
    if encoder is not None and encoder not in table.keys:
        raise ConfigError(f"the dataset has no encoder {encoder!r}; it has {known}.")
    names = sorted(table.keys) if encoder is None else [encoder]
    found = {name: rows.index.find(table.keys[name].reshape(-1, 2)) for name in names}
    whole = [name for name in names if (found[name] >= 0).all()]
    if not whole:
        missing, name = min((int((found[name] < 0).sum()), name) for name in names)
        raise CacheMissError(
            f"{missing:,} of the {len(found[name]):,} items of the dataset (encoder {name!r}) have no row in store "
            f"{rows.name}; choose another store, or fill it first."
        )
    if not all(np.array_equal(found[whole[0]], found[name]) for name in whole):
        raise ConfigError(f"store {rows.name} has the items of several encoders of the dataset; name one of {known}.")
    return found[whole[0]].reshape(table.keys[whole[0]].shape[:2])


class Selection:
    """What is exported: rows by number, their keys, and target columns beside them.

    Args:
        rows: The rows of a store.
        numbers: Those of N samples, ``(N, items)``.
        targets: Target columns of the samples.

    Attributes:
        arrays: Dtype and shape of each array as a whole, by name.
        empty: The arrays of no sample.
        offsets: Where each sequence begins, ``(N * items + 1,)``; None: rows are no sequences.
        paired: Whether a sample has several items, and its arrays an axis for them.
        widened: Names of arrays that are bfloat16 in the store and float32 here.
    """

    def __init__(self, rows: StoredRows, numbers: Numbers, targets: Sequence[torch.Tensor]) -> None:
        """Find out the shapes; nothing but lengths is read."""
        self._rows, self._numbers = rows, numbers
        self._targets = {f"targets.{place}": column for place, column in enumerate(targets)}
        dtypes = {"vectors": rows.kind.dtype, **{name: column.dtype for name, column in self._targets.items()}}
        self.widened = [name for name, dtype in dtypes.items() if dtype is torch.bfloat16]
        self.paired = numbers.shape[1] > 1
        self.offsets: Numbers | None = None
        if rows.kind.ragged:
            self.offsets = np.concatenate([[0], np.cumsum(rows.lengths(numbers.reshape(-1)))])
        self.empty = self._block(slice(0, 0))
        self.arrays = {name: (array.dtype, (len(numbers), *array.shape[1:])) for name, array in self.empty.items()}
        if self.offsets is not None:
            dtype, shape = self.arrays["vectors"]
            self.arrays["vectors"] = dtype, (int(self.offsets[-1]), *shape[1:])

    def blocks(self) -> Iterator[Block]:
        """Give some samples at a time."""
        dtype, shape = self.arrays["vectors"]
        sample_bytes = dtype.itemsize * math.prod(shape) // max(1, len(self._numbers))
        size = max(1, BLOCK_BYTES // max(1, sample_bytes))
        for start in range(0, len(self._numbers), size):
            yield self._block(slice(start, start + size))

    def _block(self, part: slice) -> Block:
        numbers = self._numbers[part]
        flat = numbers.reshape(-1)
        lead = numbers.shape if self.paired else numbers.shape[:1]  # one item a sample: no axis for it
        vectors, keys = self._rows.vectors(flat), self._rows.keys(flat)
        if self.offsets is None:
            vectors = vectors.reshape(*lead, *vectors.shape[1:])
        tensors = {"vectors": vectors, "keys": keys.reshape(*lead, 2)}
        tensors.update((name, column[part]) for name, column in self._targets.items())
        return {
            name: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
            for name, tensor in tensors.items()
        }
