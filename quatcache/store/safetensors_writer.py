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
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from typing_extensions import Self
from xxhash import xxh3_128

__all__ = [
    "DTYPES",
    "EarlyFlush",
    "WritableFile",
    "Written",
    "header_of",
    "pieces_of",
    "tensor_bytes",
    "write_safetensors",
]

_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}
"""The dtypes that a file may name. A name from a file is looked up here and never evaluated."""

PIECE_BYTES = 4 << 20
FLUSH_BYTES = 32 << 20  # a smaller file is flushed once, by whoever opened it


class WritableFile(Protocol):
    """A file that is open for writing."""

    def write(self, content: Any, /) -> int:
        """Write all of some bytes."""

    def fileno(self) -> int:
        """Give the file descriptor."""


class Written(NamedTuple):
    """A file that was written.

    Attributes:
        bytes: Its size.
        xxh3: What :func:`~quatcache.store.files.checksum` gives for it if it holds what it should.
    """

    bytes: int
    xxh3: str


def write_safetensors(file: WritableFile, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Written:
    """Write tensors to a file that is empty and open for writing; its last pieces may still have to be flushed.

    Args:
        file: The file; its descriptor is asked for only once there is much to flush.
        tensors: Contiguous CPU tensors of the dtypes in ``DTYPES``; they may share memory.
        metadata: Strings for the header.

    Raises:
        ValueError: A tensor has another dtype.
        OSError: The file cannot be written, or flushed.

    Example:
        >>> import io
        >>> from safetensors.torch import load
        >>> file = io.BytesIO()
        >>> write_safetensors(file, {"values": torch.arange(3)}, {"note": "small"}).bytes
        128
        >>> load(file.getvalue())
        {'values': tensor([0, 1, 2])}
    """
    digest, size = xxh3_128(), 0
    # wide elements first: so every tensor begins at a multiple of the size of its elements
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ordered = {name: tensors[name] for name in names}
    pieces: Iterator[bytes | memoryview] = chain([header_of(ordered, metadata)], *map(pieces_of, ordered.values()))
    with EarlyFlush(file) as early:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            early.wrote(len(piece))
            size += len(piece)
    return Written(size, digest.hexdigest())


class EarlyFlush:
    """Has the device take what was written to a file so far, in a thread and whenever it is enough to be worth it.

    When it is left, it waits for the device and raises what that had to say of earlier pieces: an error is told once,
    so nobody else would hear of it. What was written last may still have to be flushed.

    Args:
        file: Open for writing; its file descriptor is asked for only once there is much to flush.
    """

    def __init__(self, file: WritableFile) -> None:
        """Start no thread before there is something to flush."""
        self._file = file
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="quatcache-flush")
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def wrote(self, size: int) -> None:
        """Count bytes that were written, and have the device take them if they are many and it is idle.

        Raises:
            OSError: The device did not take what was written before.
        """
        self._unflushed += size
        if self._unflushed >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self.begin()

    def begin(self) -> None:
        """Have the device take what was written, after what it is taking; errors as for :meth:`wrote`."""
        if self._flushing is not None:
            self._flushing.result()
        with suppress(RuntimeError):  # no more threads, or the interpreter is about to end: flushed at the end
            self._flushing, self._unflushed = self._executor.submit(os.fsync, self._file.fileno()), 0

    def __enter__(self) -> Self:
        """Give the object."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the device, and raise its error unless there is another one."""
        self._executor.shutdown()
        if kind is None and self._flushing is not None:
            self._flushing.result()


def header_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """Give the beginning of a safetensors file: the length of its header, and the header.

    Args:
        tensors: In the order in which they follow.
        metadata: Strings for the header.
        room: Fewest bytes that it takes, a multiple of 8; spaces fill it.

    Raises:
        ValueError: A tensor has a dtype that is not in ``DTYPES``.

    Example:
        >>> header_of({"a": torch.zeros(2)}, {})[8:]
        b'{"__metadata__":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; a cache stores {', '.join(DTYPES)}.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (max(-len(text) % 8, room - 8 - len(text)))
    return len(text).to_bytes(8, "little") + text


def pieces_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Give the bytes of a CPU tensor in pieces that fit a processor's cache."""
    content = tensor_bytes(tensor)
    return (content[place : place + PIECE_BYTES] for place in range(0, len(content), PIECE_BYTES))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the bytes of a CPU tensor, in C order."""
    whole = tensor.detach().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a single element may be contiguous with any stride
    return flat.view(torch.uint8).numpy().data
