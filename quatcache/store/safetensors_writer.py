"""Safetensors files, written piece by piece.

``save_file`` of safetensors writes a file in one go, so it can be hashed in a pass of its own only, and the device gets
all of it at the end. Here each piece is hashed while it is in the cache of the processor, and the device takes pieces
while others are written. Reading is left to safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

import torch
from xxhash import xxh3_128

__all__ = ["DTYPES", "tensor_bytes", "write_safetensors"]

_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}
"""The dtypes that a file may name. A name from a file is looked up here and never evaluated."""

PIECE_BYTES = 4 << 20
FLUSH_BYTES = 32 << 20  # a smaller file is flushed once, by whoever opened it


def write_safetensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write tensors to a file that is empty and open for writing; its last pieces may still have to be flushed.

    Args:
        file: The file.
        tensors: Contiguous CPU tensors of the dtypes in ``DTYPES``; they may share memory.
        metadata: Strings for the header.

    Returns:
        xxh3_128 of all bytes written, 32 hex characters.

    Raises:
        ValueError: A tensor has another dtype.
        OSError: The file cannot be written, or flushed.

    Example:
        >>> import io
        >>> from safetensors.torch import load
        >>> file = io.BytesIO()
        >>> len(write_safetensors(file, {"values": torch.arange(3)}, {"note": "small"}))
        32
        >>> load(file.getvalue())
        {'values': tensor([0, 1, 2])}
    """
    digest, flushing, unflushed = xxh3_128(), _done(), 0
    with ThreadPoolExecutor(1, thread_name_prefix="quatcache-flush") as executor:
        for piece in _pieces(tensors, metadata):
            file.write(piece)
            digest.update(piece)
            unflushed += len(piece)
            if unflushed >= FLUSH_BYTES and flushing.done():
                flushing.result()  # an error of the device is told once: nobody else would hear of it
                with suppress(RuntimeError):  # no more threads, or the interpreter is about to end: flushed at the end
                    flushing, unflushed = executor.submit(os.fsync, file.fileno()), 0
        flushing.result()
    return digest.hexdigest()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _pieces(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Give the bytes of a safetensors file: length of the header, header, and the tensors as it lists them."""
    # wide elements first: so every tensor begins at a multiple of the size of its elements
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; a cache stores {', '.join(DTYPES)}.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        content = tensor_bytes(tensors[name])
        for place in range(0, len(content), PIECE_BYTES):
            yield content[place : place + PIECE_BYTES]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a CPU tensor, in C order."""
    whole = tensor.detach().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a single element may be contiguous with any stride
    return flat.view(torch.uint8).numpy().data
