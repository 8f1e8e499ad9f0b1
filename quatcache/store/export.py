"""Rows for other tools: numpy arrays or parquet, written shard by shard.

Files are written from the front to the back, not through a memory map: on a full disk that is an error, where a map
would end the process. They get their names when all of them are whole.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quatcache.errors import ConfigError, FormatError, MissingDependencyError, StoreError
from quatcache.store.selection import Block, Selection, StoredRows, rows_in_order
from quatcache.store.summaries import StoreSummary, TableSummary
from quatcache.store.tables import DatasetTable

__all__ = ["Export", "export_rows"]


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        files: Each file, the vectors first.
        rows: How many rows, or samples of a dataset, there are.
        shape: Shape of the array of vectors; of sequences, that of all their elements together.
        dtype: Its dtype.
        notes: What is otherwise than in the cache, each in a sentence.
    """

    files: tuple[Path, ...]
    rows: int
    shape: tuple[int, ...]
    dtype: str
    notes: tuple[str, ...] = ()


def export_rows(
    store: StoreSummary,
    target: Path,
    *,
    dataset: TableSummary | None = None,
    encoder: str | None = None,
    force: bool = False,
    advance: Callable[[int], object] = lambda rows: None,
) -> Export:
    """Write the rows of a store as an array, or those of a dataset in its order.

    Args:
        store: The store, as :func:`~quatcache.store.inspection.inspect_cache` lists it.
        target: A new file. ``vectors.npy`` holds the rows, ``(N, *row_shape)``, in their storage dtype; beside it
            ``vectors.keys.npy`` has the keys, int64 ``(N, 2)``, and for a dataset ``vectors.targets.<n>.npy`` its
            target columns. ``vectors.parquet`` holds all of them as columns. Of sequences ``vectors.npy`` holds the
            elements ``(E, *shape)``, one sequence behind the other, and ``vectors.offsets.npy`` int64 ``(N + 1,)``
            where each begins; for pairs the two of a sample follow each other. In parquet they are lists.
        dataset: Its items are written in its order, with duplicates: ``(N, *row_shape)``, for pairs
            ``(N, 2, *row_shape)``. None: each row once, in the order of the shards.
        encoder: Name of the encoder in the dataset; None: the one whose items are in the store.
        force: Whether to overwrite.
        advance: Told after each block how many rows it has.

    Returns:
        What was written. bfloat16, which neither numpy nor parquet knows, becomes float32.

    Raises:
        ConfigError: The name of the target ends otherwise, it exists, or the encoder is not in the dataset.
        CacheMissError: An item of the dataset has no row here.
        FormatError: The store, one of its shards or the dataset is damaged.
        MissingDependencyError: pyarrow is not installed.
        StoreError: A file cannot be read or written; nothing is left of it.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from quatcache.keys import content_keys
        >>> from quatcache.store import CacheDirectory
        >>> from quatcache.store.inspection import inspect_cache
        >>> cache = CacheDirectory(tempfile.mkdtemp())
        >>> store = cache.store("0" * 32, {})
        >>> store.put_many(content_keys(["a", "b"]), torch.ones(2, 3))
        >>> store.flush()
        >>> written = export_rows(inspect_cache(cache).stores[0], cache.path / "vectors.npy")
        >>> np.load(written.files[0], allow_pickle=False).shape
        (2, 3)
    """
    if target.suffix not in {".npy", ".parquet"}:
        raise ConfigError(f"{target} ends in {target.suffix!r}; export to .npy or .parquet.")
    arrow = _pyarrow() if target.suffix == ".parquet" else None
    table = None if dataset is None else _usable(dataset)
    targets = () if table is None else table.targets or ()
    rows = StoredRows(store)
    offsets = ["offsets"] if rows.kind.ragged else []
    names = ["vectors", *offsets, "keys", *(f"targets.{place}" for place in range(len(targets)))]
    paths = [target if name == "vectors" else target.with_name(f"{target.stem}.{name}.npy") for name in names]
    paths = paths if arrow is None else [target]
    stale = [] if arrow is not None else _targets_beside(target, besides=paths)
    existing = [path for path in (*paths, *stale) if os.path.lexists(path)]
    if existing and not force:
        raise ConfigError(f"{existing[0]} exists; name another file, or permit overwriting (--force).")
    numbers = rows.latest() if table is None else rows_in_order(rows, table, encoder)
    selection = Selection(rows, numbers, targets)
    with _staged(paths) as temporary:
        if arrow is None:
            _write_arrays(dict(zip(names, temporary, strict=True)), selection, advance)
        else:
            _write_parquet(arrow, temporary[0], selection, advance)
    for path in stale:  # of an export of another dataset: it must not stand beside these rows
        path.unlink()
    dtype, shape = selection.arrays["vectors"]
    widened = (f"{name} became float32: neither numpy nor parquet has bfloat16." for name in selection.widened)
    return Export(tuple(paths), len(numbers), shape, str(dtype), tuple(widened))


def _usable(dataset: TableSummary) -> DatasetTable:
    if dataset.table is None:
        reason = "" if dataset.problem is None else f" {dataset.problem.reason}"
        raise FormatError(f"{dataset.path}{reason}, so it cannot be exported; choose another dataset.")
    return dataset.table


def _targets_beside(target: Path, besides: Sequence[Path]) -> list[Path]:
    name = re.compile(re.escape(target.stem) + r"\.targets\.[0-9]+\.npy")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in beside if name.fullmatch(path.name) and path not in besides]


def _write_arrays(paths: Mapping[str, Path], selection: Selection, advance: Callable[[int], object]) -> None:
    with ExitStack() as opened:
        files = {name: opened.enter_context(path.open("wb")) for name, path in paths.items()}
        for name, (dtype, shape) in selection.arrays.items():
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(files[name], header)
        if selection.offsets is not None:
            np.lib.format.write_array(files["offsets"], selection.offsets, allow_pickle=False)
        for block in selection.blocks():
            for name, array in block.items():
                files[name].write(np.ascontiguousarray(array).data)
            advance(len(block["keys"]))


def _write_parquet(arrow: Any, path: Path, selection: Selection, advance: Callable[[int], object]) -> None:
    empty, start = arrow.table(_columns(arrow, selection.empty, selection, 0)), 0
    with arrow.parquet.ParquetWriter(path, empty.schema, use_dictionary=False) as writer:
        for block in selection.blocks():
            writer.write_table(arrow.table(_columns(arrow, block, selection, start)))
            start += len(block["keys"])
            advance(len(block["keys"]))


def _columns(arrow: Any, block: Block, selection: Selection, start: int) -> dict[str, Any]:
    """Make columns: ``vector`` and ``key`` (for pairs ``vector.0``, ``vector.1``, ...), and ``target.<n>``.

    Args:
        arrow: The module.
        block: Arrays of some samples.
        selection: What they are of.
        start: How many samples are before them.
    """
    columns: dict[str, Any] = {}
    items = block["keys"].shape[1] if selection.paired else 1
    for name, array in block.items():
        column = name.replace("s", "", 1) if name.startswith("targets") else name.removesuffix("s")
        if name == "vectors" and selection.offsets is not None:
            offsets = selection.offsets[items * start : items * (start + len(block["keys"])) + 1]
            sequences = arrow.LargeListArray.from_arrays(offsets - offsets[0], _column(arrow, array))
            names = [f"{column}.{item}" for item in range(items)] if selection.paired else [column]
            places = np.arange(len(sequences))
            columns.update((one, sequences.take(places[item::items])) for item, one in enumerate(names))
        elif name in {"vectors", "keys"} and selection.paired:
            columns.update((f"{column}.{item}", _column(arrow, array[:, item])) for item in range(array.shape[1]))
        else:
            columns[column] = _column(arrow, array)
    return columns


def _column(arrow: Any, array: npt.NDArray[Any]) -> Any:
    """Make a column of values, or of lists of one size: a row of several dimensions is flattened in C order."""
    values = arrow.array(np.ascontiguousarray(array).reshape(-1))
    return values if array.ndim == 1 else arrow.FixedSizeListArray.from_arrays(values, math.prod(array.shape[1:]))


@contextmanager
def _staged(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Give temporary names for files, which get their own when all of them are whole and flushed to the device."""
    temporary = [path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}") for path in paths]
    try:
        yield temporary
        for path in temporary:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for path, final in zip(temporary, paths, strict=True):
            path.replace(final)
    except OSError as error:
        raise StoreError(
            f"cannot write {paths[0]}: {error.strerror or error}; free space or permit writing there, or name another "
            "file."
        ) from error
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "pyarrow, which writes parquet, is not installed: pip install 'quatcache[export]'; or export to .npy"
        ) from error
    return pyarrow
