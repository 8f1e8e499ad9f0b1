"""The ranks of one run fill a cache together: each reads a share of the samples, and encodes what it meets first.

Rank 0 holds the locks of the stores for all of them, says which samples must be read, and ends as a single process
would: it encodes whatever is missing then. So a rank that dies, comes late or has other data costs time only.

A sample is read once, by the rank whose share it is in, and its items are encoded at once unless another rank has
claimed their keys. With key extractors that cannot be: which item gives its row to the others is known when all keys
are. Their items are encoded in a second round, for which only those that give a row are read again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quatcache.encoders.calls import WINDOW
from quatcache.encoders.extracted import ExpectedRows
from quatcache.keys import KeyArray, KeyIndex, distinct
from quatcache.progress import FillProgress
from quatcache.read_through import Counts
from quatcache.store import DatasetTable, DiskStore
from quatcache.store.files import content_digest
from quatcache.store.parts import Claims
from quatcache.training.columns import ColumnsInMaking, Part
from quatcache.training.dataset_fill import DatasetFill
from quatcache.training.distributed import Together
from quatcache.training.encoder_fill import EncoderFill
from quatcache.training.keying import Chunk

__all__ = ["SharedFill"]

logger = logging.getLogger(__name__)

SAMPLED = 32
"""Samples by which ranks see that they have the same dataset."""

PLAN, ROWS, RESULT = "plan", "rows", "result"

Indices = npt.NDArray[np.int64]
Tensors = dict[str, torch.Tensor]


@dataclass
class SharedFill:
    """The fill of some datasets, as one rank sees it.

    Attributes:
        together: The ranks.
        fills: The datasets, in the same order on all ranks.
        batch_size: Items per encoder call, at most.
        num_workers: Processes that read.
        context: How they are started.
        read: Samples that this rank has read for its share.
    """

    together: Together
    fills: Sequence[DatasetFill]
    batch_size: int
    num_workers: int
    context: Any
    read: int = 0
    _claims: dict[str, Claims] = field(default_factory=dict)

    @property
    def _encoders(self) -> Sequence[EncoderFill]:
        return self.fills[0].encoders

    @property
    def is_possible(self) -> bool:
        """Whether all rows persist: rows of this process alone are no use to others."""
        return all(isinstance(encoder.store, DiskStore) for encoder in self._encoders)

    @property
    def total(self) -> int:
        """Count the samples that must be read by all ranks together, as this one sees it."""
        return sum(fill.to_read for fill in self.fills)

    def lead(self, advance: FillProgress) -> None:
        """Have the ranks fill together, as rank 0.

        Afterwards the datasets know what is left to read for this rank: nothing, if all went well.

        Args:
            advance: Told after each chunk.

        Raises:
            StoreError: The directory cannot be written.
        """
        if not self.is_possible:
            return
        indices = [fill.unread for fill in self.fills]
        about = {"stores": self._stores(), "datasets": [self._about(fill) for fill in self.fills]}
        tensors = {f"indices.{place}": torch.from_numpy(one) for place, one in enumerate(indices)}
        self.together.folder.write(PLAN, about, tensors)
        self._share(indices, advance)
        parts = [self._read_parts(rank, indices) for rank in range(self.together.folder.size)]
        self._refresh()
        shared_rows = {one.name: ExpectedRows(one.store) for one in self._encoders if one.extracted is not None}
        for place, fill in enumerate(self.fills):
            whole = fill.gather([part[place] for part in parts if part is not None], shared_rows)
            if not whole and shared_rows:  # which item gives its row goes by order: this rank reads on from here
                break
        else:
            if shared_rows:
                self._second_round([rank for rank, part in enumerate(parts) if rank and part is not None], advance)
        for fill in self.fills:
            fill.look_again()

    def conclude(self) -> None:
        """Tell the others, as rank 0, that everything is in the directory."""
        self.together.folder.write(RESULT, {"targets": [fill.targets_reason for fill in self.fills]}, {})

    def help(self, advance: FillProgress) -> None:
        """Do the share of a rank other than 0, and wait for the end.

        Afterwards the datasets must be looked up anew; what is missing then, this rank must encode alone.

        Args:
            advance: Told after each chunk.

        Raises:
            StoreError: The directory cannot be written.
        """
        folder = self.together.folder
        self.together.wait(0, lambda: folder.has(PLAN) or folder.has(RESULT))
        if not self._follow(folder.read(PLAN), advance):
            folder.write(f"part-{folder.rank}", {"parts": None}, {})  # in no case may rank 0 wait for this one
        self.together.wait(0, lambda: folder.has(RESULT))
        result = folder.read(RESULT)
        if result is not None:
            for fill, reason in zip(self.fills, result[0]["targets"], strict=False):
                fill.leave_targets(reason)
        self._refresh()

    def _follow(self, plan: tuple[dict[str, Any], Tensors] | None, advance: FillProgress) -> bool:
        """Do a share of what rank 0 has planned, if that fits what this rank has."""
        if plan is None or not self.is_possible:
            return False
        if plan[0] != {"stores": self._stores(), "datasets": [self._about(fill) for fill in self.fills]}:
            logger.info("Rank %d has other data than rank 0, and fills when that is done.", self.together.folder.rank)
            return False
        self._share([plan[1][f"indices.{place}"].numpy() for place in range(len(self.fills))], advance)
        if any(encoder.extracted is not None for encoder in self._encoders):
            self._help_in_second_round(advance)
        return True

    def _stores(self) -> dict[str, str]:
        return {
            encoder.name: encoder.store.directory.name
            for encoder in self._encoders
            if isinstance(encoder.store, DiskStore)
        }

    def _about(self, fill: DatasetFill) -> dict[str, Any]:
        """Describe a dataset well enough to tell it from another one."""
        size = len(fill.dataset)
        chunk = fill.chunk_reader.__getitems__(np.unique(np.linspace(0, size - 1, SAMPLED).astype(int)).tolist())
        keys = {name: torch.from_numpy(keys) for name, keys in chunk.keys.items()}
        return {"samples": size, "sampled": content_digest({"layout": chunk.layout}, keys)}

    def _refresh(self) -> None:
        for encoder in self._encoders:
            if isinstance(encoder.store, DiskStore):
                encoder.store.refresh()

    def _flush(self) -> None:
        for encoder in self._encoders:
            if isinstance(encoder.store, DiskStore):
                encoder.store.flush()
            encoder.note_effort()

    def _chunks_of(self, indices: Indices, rank: int | None = None) -> list[Indices]:
        """Give the share of a rank in chunks: every so-many-th one, for neighbours are often alike in length."""
        rank = self.together.folder.rank if rank is None else rank
        size = min(self.batch_size * WINDOW, max(-(-len(indices) // self.together.folder.size), 1))
        chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
        return chunks[rank :: self.together.folder.size]

    def _share(self, indices: Sequence[Indices], advance: FillProgress) -> None:
        """Read the samples of a share, encode what nobody else does, and leave their keys and targets."""
        abouts: list[dict[str, Any] | None] = []
        tensors: Tensors = {}
        with self._share_of_budget():
            for place, (fill, unread) in enumerate(zip(self.fills, indices, strict=True)):
                chunks = self._chunks_of(unread)
                if not chunks:
                    abouts.append(None)
                    continue
                mine = np.concatenate(chunks)
                columns = ColumnsInMaking(len(mine), None)
                done = 0
                for chunk in fill.chunks(chunks, self.num_workers, self.context):
                    counts = Counts()
                    for encoder in self._encoders:
                        if encoder.extracted is None:
                            counts += self._encode_own(fill, encoder, chunk)
                    columns.put(chunk._replace(indices=list(range(done, done + len(chunk.indices)))))
                    done += len(chunk.indices)
                    advance(len(chunk.indices), counts)
                self.read += done
                table = columns.table(fill.targets)
                reason = columns.targets_reason if fill.targets else fill.targets_reason
                abouts.append(Part(mine, table, reason).describe(str(place), tensors))
            self._flush()  # whoever sees the part must find its rows
        self.together.folder.write(f"part-{self.together.folder.rank}", {"parts": abouts}, tensors)

    def _encode_own(self, fill: DatasetFill, encoder: EncoderFill, chunk: Chunk) -> Counts:
        """Encode the items of a chunk that have no row and that no other rank encodes."""
        keys = chunk.keys[encoder.scheme.row_column].reshape(-1, 2)
        missing = encoder.lacking(keys)
        encoder.verify(chunk)
        firsts = missing[distinct(keys[missing])[0]]
        own = firsts[self._claims_of(encoder).take(keys[firsts])]
        present, elsewhere = len(keys) - len(encoder.store.missing(keys)), len(missing) - len(own)
        others = Counts(present + elsewhere, present, elsewhere)
        encoder.counts += others
        fill.counted[encoder.name] = fill.counted.get(encoder.name, 0) + len(keys)
        return others + self._encode(encoder, chunk, own, keys)

    def _encode(self, encoder: EncoderFill, chunk: Chunk, positions: Indices, keys: KeyArray) -> Counts:
        if not len(positions):
            return Counts()
        narrowed = {encoder.scheme.row_column: keys[positions].reshape(-1, 1, 2)}
        narrowed.setdefault(encoder.name, narrowed[encoder.scheme.row_column])
        items = [chunk.items[position] for position in positions.tolist()]
        return encoder.fill(chunk._replace(items=items, keys=narrowed), self.batch_size)

    def _claims_of(self, encoder: EncoderFill) -> Claims:
        assert isinstance(encoder.store, DiskStore)
        name = encoder.store.directory.name
        if name not in self._claims:
            self._claims[name] = self.together.folder.claims(name)
        return self._claims[name]

    @contextmanager
    def _share_of_budget(self) -> Iterator[None]:
        """Let each rank use its part of what is left of a budget; the last word has rank 0, with the whole of it."""
        limits = [encoder.max_size for encoder in self._encoders]
        for encoder in self._encoders:
            if encoder.max_size is not None:
                used = encoder.store.nbytes
                encoder.max_size = used + max(encoder.max_size - used, 0) // self.together.folder.size
        try:
            yield
        finally:
            for encoder, limit in zip(self._encoders, limits, strict=True):
                encoder.max_size = limit

    def _read_parts(self, rank: int, indices: Sequence[Indices]) -> list[Part | None] | None:
        """Wait for what a rank has read of these samples; None: it died, did not come, or has other data."""
        folder, name = self.together.folder, f"part-{rank}"
        if rank != folder.rank and not self.together.wait(rank, lambda: folder.has(name)):
            return None
        found = folder.read(name)
        if found is None or found[0]["parts"] is None:
            return None
        abouts, tensors = found[0]["parts"], found[1]
        parts = [Part.read(str(place), about, tensors) if about else None for place, about in enumerate(abouts)]
        for part, unread in zip(parts, indices, strict=True):
            share = self._chunks_of(unread, rank)
            if not np.array_equal(part.indices if part else [], np.concatenate(share) if share else []):
                return None
        return parts

    def _second_round(self, helpers: Sequence[int], advance: FillProgress) -> None:
        """Have the items encoded that give rows to all items of their extracted keys, by those that helped before."""
        tensors: Tensors = {}
        taken: dict[str, KeyIndex] = {}
        for place, fill in enumerate(self.fills):
            assert fill.table is not None
            samples = np.zeros(len(fill.table), bool)
            masks = {}
            for one in (one for one in self._encoders if one.extracted is not None):
                masks[one.name] = _givers(one, fill.table, taken)
                samples |= masks[one.name].any(axis=1)
            tensors[f"indices.{place}"] = torch.from_numpy(np.flatnonzero(samples))
            for one in (one for one in self._encoders if one.extracted is not None):
                rows = fill.table.keys[one.scheme.row_column]
                tensors[f"rows.{place}.{one.name}"] = torch.from_numpy(rows[samples])
                tensors[f"encode.{place}.{one.name}"] = torch.from_numpy(masks[one.name][samples])
        folder = self.together.folder
        folder.write(ROWS, {}, tensors)
        self._share_rows(tensors, advance)
        for rank in helpers:
            self.together.wait(rank, lambda name=f"{ROWS}-{rank}": folder.has(name))  # type: ignore[misc]
        self._refresh()

    def _help_in_second_round(self, advance: FillProgress) -> None:
        folder = self.together.folder
        self.together.wait(0, lambda: folder.has(ROWS) or folder.has(RESULT))
        plan = folder.read(ROWS)
        if plan is not None:
            self._share_rows(plan[1], advance)
        folder.write(f"{ROWS}-{folder.rank}", {}, {})

    def _share_rows(self, tensors: Mapping[str, torch.Tensor], advance: FillProgress) -> None:
        """Read this rank's share of the items that give rows, and encode them."""
        with self._share_of_budget():
            for place, fill in enumerate(self.fills):
                samples = tensors[f"indices.{place}"].numpy()
                chunks = self._chunks_of(samples)
                for chunk in fill.chunks(chunks, self.num_workers, self.context) if chunks else ():
                    which = np.searchsorted(samples, chunk.indices)
                    counts = Counts()
                    for one in (one for one in self._encoders if one.extracted is not None):
                        rows = tensors[f"rows.{place}.{one.name}"].numpy()[which].reshape(-1, 2)
                        positions = np.flatnonzero(tensors[f"encode.{place}.{one.name}"].numpy()[which].reshape(-1))
                        content = chunk.keys.get(one.scheme.content_column, chunk.keys[one.name]).reshape(-1, 2)
                        same = (content[positions] == rows[positions]).all(axis=1)  # else it was edited meanwhile
                        counts += self._encode(one, chunk, positions[same], rows)
                        fill.counted[one.name] = fill.counted.get(one.name, 0) + int(same.sum())
                    self.read += len(chunk.indices)
                    advance(len(chunk.indices), counts)
            self._flush()


def _givers(encoder: EncoderFill, table: DatasetTable, taken: dict[str, KeyIndex]) -> npt.NDArray[np.bool_]:
    """Mark the items ``(N, k)`` that must be encoded because their content is that of a row which is not there."""
    rows = table.keys[encoder.scheme.row_column]
    content = table.keys.get(encoder.scheme.content_column)
    flat = rows.reshape(-1, 2)
    own = np.arange(len(flat)) if content is None else np.flatnonzero((content == rows).all(axis=2).reshape(-1))
    own = own[encoder.lacking(flat[own])]
    own = own[distinct(flat[own])[0]]
    index = taken.setdefault(encoder.name, KeyIndex())
    own = own[index.find(flat[own]) < 0]
    index.add(flat[own], np.zeros(len(own), np.int64))
    mask = np.zeros(len(flat), bool)
    mask[own] = True
    return mask.reshape(rows.shape[:2])
