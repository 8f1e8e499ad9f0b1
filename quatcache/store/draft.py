"""A shard whose rows are written while more of them are put.

A shard that is written only once it is full keeps the device waiting until then, and whoever ends a fill waits for a
whole one. So the rows go to the file as they come, in a thread, and the header, which says how many they are, is
written last, in the room that was left for it.

The rows stay in memory until the shard is committed: pages of a file whose flush failed may be lost. Whatever goes
wrong here costs no row and is no error; the shard is then written as a whole, which says what is the matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from xxhash import xxh3_128

from quatcache.store.safetensors_writer import DTYPES, EarlyFlush, WritableFile, Written, header_of, pieces_of
from quatcache.store.unfinished import UnfinishedFile

__all__ = ["ShardDraft"]

HEADER_ROOM = 4096
"""Bytes before the values: enough for the header of a shard, and a page, so that rows begin where pages do."""

ALIGNMENT = 8  # of the keys, which follow the values


class ShardDraft:
    """The file of one shard, from its first rows on.

    Args:
        path: Where the shard will be. Its directory is not made; while it is not there, nothing is written.
        step: Bytes that are worth writing at once.

    Attributes:
        path: As given.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> draft = ShardDraft(Path(tempfile.mkdtemp()) / "shard.safetensors", step=16)
        >>> rows = torch.arange(6, dtype=torch.float64).reshape(3, 2)
        >>> draft.advance(rows[:2])
        >>> written = draft.finish({"keys": torch.arange(3), "values": rows}, {})
        >>> load_file(draft.path)["values"].shape
        torch.Size([3, 2])
    """

    def __init__(self, path: Path, step: int) -> None:
        """Write nothing yet."""
        self.path = path
        self._step = step
        self._unfinished: UnfinishedFile | None = None
        self._early: EarlyFlush | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="quatcache-draft")
        self._writing: Future[None] | None = None
        self._handed: torch.Tensor | None = None
        self._closed = False

    def advance(self, values: torch.Tensor) -> None:
        """Have rows written, if those that are not yet are worth it and those before them are.

        Args:
            values: All values of the shard so far, contiguous on the CPU. None of them may change until the shard is
                finished or discarded; more may follow them.
        """
        fresh = values[0 if self._handed is None else len(self._handed) :]
        size = fresh.numel() * fresh.element_size()
        busy = self._writing is not None and not self._writing.done()
        if self._closed or not size or size < self._step or busy:
            return
        try:
            if self._writing is not None:
                self._writing.result()  # behind a piece that is not there no other one may be written
            if self._unfinished is None:
                if values.dtype not in DTYPES.values() or size // len(fresh) % ALIGNMENT:
                    raise ValueError(f"keys would not follow rows of {size // len(fresh)} bytes where int64 may lie")
                self._unfinished = UnfinishedFile(self.path)
                self._early = EarlyFlush(self._unfinished)
                self._unfinished.write(bytes(HEADER_ROOM))
            assert self._early is not None
            self._writing = self._executor.submit(_append, self._unfinished, self._early, fresh)
            self._handed = values
        except (OSError, ValueError, RuntimeError):  # no right, no room, no descriptor, no further thread
            self.discard()

    def finish(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Written | None:
        """Write the rest of the shard, flush it, and give it its name.

        Args:
            tensors: Contiguous CPU tensors, "values" among them: the rows that were handed over, and those after them.
            metadata: Strings for the header.

        Returns:
            What was written; None if nothing was, because the rows are others or too few to have been begun, or
            because writing failed.
        """
        values = tensors["values"]
        try:
            return self._finish({"values": values, **tensors}, metadata) if self._begins(values) else None
        except (OSError, ValueError, RuntimeError):
            return None
        finally:
            self.discard()

    def _begins(self, values: torch.Tensor) -> bool:
        """Say whether what was handed over is the beginning of some values, in the same memory."""
        handed = self._handed
        return (
            handed is not None
            and handed.data_ptr() == values.data_ptr()
            and len(handed) <= len(values)
            and (handed.dtype, handed.shape[1:]) == (values.dtype, values.shape[1:])
        )

    def _finish(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Written:
        unfinished, early, writing, handed = self._unfinished, self._early, self._writing, self._handed
        assert unfinished is not None and early is not None and writing is not None and handed is not None
        header = header_of(tensors, metadata, HEADER_ROOM)
        if len(header) > HEADER_ROOM:
            raise ValueError(f"a header of {len(header)} bytes has no room")
        writing.result()
        self._executor.shutdown()
        digest, size = xxh3_128(header), HEADER_ROOM
        with early:
            for name, tensor in tensors.items():
                _append(unfinished, early, tensor[len(handed) :] if name == "values" else tensor)
            unfinished.rewind()
            unfinished.write(header)
            early.begin()  # the checksum is computed meanwhile
            for piece in chain.from_iterable(map(pieces_of, tensors.values())):
                digest.update(piece)
                size += len(piece)
        unfinished.publish()
        return Written(size, digest.hexdigest())

    def discard(self) -> None:
        """Write no more, and remove what was written and has not got its name."""
        self._closed = True
        self._executor.shutdown()
        if self._unfinished is not None:
            self._unfinished.discard()
        self._unfinished = self._early = self._handed = self._writing = None


def _append(file: WritableFile, early: EarlyFlush, tensor: torch.Tensor) -> None:
    for piece in pieces_of(tensor):
        file.write(piece)
        early.wrote(len(piece))
