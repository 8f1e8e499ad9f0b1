"""Slots that outlast their processes: a safetensors file of those that are set.

It holds ``indices`` int64 ``(n,)``, ascending, ``values`` ``(n, *dims)``, and last ``xxh3`` uint8 ``(16,)``: xxh3_128
of the metadata as JSON with sorted keys, of the indices and of the values. The metadata say of what shape and dtype it
is. The digest comes last, so that neither writing nor reading has to go through the values twice, or to hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from xxhash import xxh3_128

from quatcache.errors import DamagedFileError, FormatError
from quatcache.store.files import make_directory, open_tensors, replace_file
from quatcache.store.safetensors_writer import (
    PIECE_BYTES,
    EarlyFlush,
    header_of,
    tensor_bytes,
)
from quatcache.store.slot_layout import SET, Indices, SlotSpec
from quatcache.store.slots import Slots
from quatcache.store.unfinished import UnfinishedFile

__all__ = ["load_slots", "save_slots", "stored_slots"]

_VERSION = "1"
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""What rows are called in a file whose readers may not know their dtype; the metadata have it."""


def save_slots(path: Path, slots: Slots) -> int:
    """Write the slots that are set, atomically; who wants to write slots meanwhile waits.

    Returns:
        How many they are.

    Raises:
        StoreError: The file cannot be written.
    """
    make_directory(path.parent)
    with slots.segment.locked(0, slots.spec.slots):
        indices = np.flatnonzero(slots.states == SET)
        replace_file(path, lambda file: _write(file, slots, indices))
    return len(indices)


def _write(file: UnfinishedFile, slots: Slots, indices: Indices) -> None:
    about = _about(slots.spec)
    digest = xxh3_128(_digested(about))
    stored = _SIGNED.get(slots.spec.dtype, slots.spec.dtype)
    layout = {
        "indices": torch.empty(len(indices), dtype=torch.int64, device="meta"),
        "values": torch.empty(len(indices), *slots.spec.dims, dtype=stored, device="meta"),
        "xxh3": torch.empty(digest.digest_size, dtype=torch.uint8, device="meta"),
    }
    with EarlyFlush(file) as early:
        early.wrote(file.write(header_of(layout, about)))
        for piece in _pieces(slots, indices):
            digest.update(piece)
            early.wrote(file.write(piece))
        file.write(digest.digest())


def _pieces(slots: Slots, indices: Indices) -> Iterator[memoryview]:
    yield tensor_bytes(torch.from_numpy(indices))
    for part in _parts(indices, slots.spec):
        yield slots.row_bytes(part).reshape(-1).data


def _parts(indices: Indices, spec: SlotSpec) -> Iterator[Indices]:
    step = max(1, PIECE_BYTES // spec.item_bytes)
    return (indices[start : start + step] for start in range(0, len(indices), step))


def stored_slots(path: Path, spec: SlotSpec) -> tuple[torch.Tensor, torch.Tensor, bytes]:
    """Map a file of slots into memory.

    Returns:
        Indices ``(n,)`` and values ``(n, *dims)``, which are read when they are touched, and the digest of both, which
        nobody has compared yet.

    Raises:
        FormatError: It is missing, damaged, or not of this dataset and dtype.
        StoreError: It cannot be read.
    """
    tensors, metadata = open_tensors(path)
    about = _about(spec)
    if metadata.get("quatcache") != about["quatcache"] or metadata.get("version") != _VERSION:
        raise FormatError(f"{path} holds no slots that this version reads; name a file that SharedCache.save wrote.")
    if metadata != about:
        raise FormatError(
            f"{path} has {_described(metadata)}, this cache {_described(about)}; load it into a cache of the dataset "
            "that it was saved for, or delete it."
        )
    indices, values, digest = tensors.get("indices"), tensors.get("values"), tensors.get("xxh3")
    whole = (
        indices is not None
        and values is not None
        and digest is not None
        and (indices.dtype, digest.dtype) == (torch.int64, torch.uint8)
        and indices.dim() == 1
        and values.shape == (len(indices), *spec.dims)
        and values.dtype == _SIGNED.get(spec.dtype, spec.dtype)
        and bool((indices[1:] > indices[:-1]).all())
        and (len(indices) == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < spec.samples))
    )
    if not whole or indices is None or values is None or digest is None:
        raise DamagedFileError(f"{path} is damaged: its tensors are not those of its metadata; delete it.")
    return indices, values.view(spec.dtype) if values.dtype != spec.dtype else values, bytes(tensor_bytes(digest))


def load_slots(path: Path, slots: Slots) -> int:
    """Fill empty slots from a file; those that are set stay, and samples that have no slot here are left out.

    Returns:
        How many slots were filled.

    Raises:
        FormatError: It is missing, damaged, or not of this dataset and dtype; then no slot is filled.
        StoreError: It cannot be read.
    """
    return slots.write_all(_checked_parts(path, slots.spec))


def _checked_parts(path: Path, spec: SlotSpec) -> Iterator[tuple[Indices, npt.NDArray[np.uint8]]]:
    """Give the rows of a file, and fail at the end if they were not those that were written."""
    indices, values, expected = stored_slots(path, spec)
    digest = xxh3_128(_digested(_about(spec)))
    digest.update(tensor_bytes(indices))
    numbers, start = indices.numpy(), 0
    for part in _parts(numbers, spec):
        content = tensor_bytes(values[start : start + len(part)])
        start += len(part)
        digest.update(content)
        yield part, np.frombuffer(content, np.uint8).reshape(len(part), spec.item_bytes)
    if digest.digest() != expected:
        raise DamagedFileError(f"{path} is damaged: its content is not what was written; delete it.")


def _about(spec: SlotSpec) -> dict[str, str]:
    return {
        "quatcache": "slots",
        "version": _VERSION,
        "samples": str(spec.samples),
        "shape": json.dumps(spec.dims),
        "dtype": str(spec.dtype).removeprefix("torch."),
    }


def _digested(about: dict[str, str]) -> bytes:
    return json.dumps(about, sort_keys=True).encode()


def _described(about: dict[str, str]) -> str:
    return f"items of {about.get('shape')} {about.get('dtype')} for {about.get('samples')} samples"
