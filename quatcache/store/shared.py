"""Items of a dataset in memory that all processes of a host share.

Names, arguments and defaults are those of stocaching 0.2.1, and those that 0.1 had besides. What differs is what went
wrong there: after ``cache[i] = x`` the slot is set, and ``get_slot`` finds it; a second ``set_slot`` of a slot is no
error but keeps what is there, because two workers may well meet one sample; an empty slot is never read as zeros.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Self

from quatcache.errors import ConfigError, SlotIndexError, SlotStateError
from quatcache.store.protocol import Found
from quatcache.store.safetensors_writer import tensor_bytes
from quatcache.store.segment import attach_segment, open_segment
from quatcache.store.segment_files import get_shm_size
from quatcache.store.slot_files import load_slots, save_slots
from quatcache.store.slot_layout import NO_SLOT, SET, Indices, SlotSpec, SlotStats
from quatcache.store.slot_values import as_index, as_indices, as_item, as_items, planned_slots
from quatcache.store.slots import Slots
from quatcache.units import readable_size

__all__ = ["SharedCache", "SlotStats", "get_shm_size"]

logger = logging.getLogger(__name__)


class SharedCache:
    """A slot for each sample of a dataset, in memory that all processes of a host share.

    Whatever process writes a slot, all find it: workers of a ``DataLoader``, forked or spawned, and the ranks of a
    distributed run that give the same ``name``. A slot is found only once its data are there, so no process reads half
    an item, and one that is killed while it writes leaves an empty slot.

    Where the dataset does not fit, some samples have no slot: reading them finds nothing, writing them does nothing.

    Args:
        size_limit_gib: Most GiB that the data and a byte of state for each sample take, at once and not as slots
            are written. On top come 4 bytes a sample, and 8 more with ``seed``.
        dataset_len: Samples of the dataset, > 0.
        data_dims: Shape of one item, such as ``(C, H, W)``; ``()`` for one number.
        dtype: A torch dtype or its name; also "8-bit", "16-bit", "32-bit", "64-bit" for unsigned integers.
        name: Attach to the cache of this name if a process of this host has it, else make it; None: a new one, for this
            process and those it hands it to.
        seed: Choose those samples that have a slot by this seed from the whole dataset; None: the first ones have.

    Raises:
        ConfigError: No such cache is possible, or the name is one of another cache.
        StoreError: There is not so much shared memory.

    Example:
        >>> cache = SharedCache(size_limit_gib=1, dataset_len=100, data_dims=(3, 4, 4), dtype=torch.uint8)
        >>> cache.get_slot(7) is None
        True
        >>> cache.set_slot(7, torch.zeros(3, 4, 4, dtype=torch.uint8))
        >>> cache.get_slot(7).shape, cache.stats().present
        (torch.Size([3, 4, 4]), 1)
    """

    def __init__(
        self,
        size_limit_gib: float,
        dataset_len: int,
        data_dims: Sequence[int],
        dtype: torch.dtype | str = torch.uint8,
        *,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        """Take the memory, or attach to it."""
        self._open(planned_slots(size_limit_gib, dataset_len, data_dims, dtype, seed), name)

    def _open(self, spec: SlotSpec, name: str | None) -> None:
        self._name = f"cache-{secrets.token_hex(8)}" if name is None else name
        segment, new = open_segment(self._name, Slots.size(spec), partial(Slots.initialise, spec))
        self._view(Slots(segment))
        if self._slots.spec != spec:
            raise ConfigError(
                f"the shared cache {self._name!r} is for {self._slots.spec}, not for {spec}; give the same "
                "arguments in all processes, or another name."
            )
        size = readable_size(spec.slots * spec.item_bytes)
        logger.info("%s a shared cache for %s: %s", "made" if new else "attached to", spec, size)

    def _view(self, slots: Slots) -> None:
        self._slots, self._segment, self._array = slots, slots.segment, slots.array
        self._state_of, self._row_of, self._samples = slots.state_of, slots.row_of, slots.spec.samples

    def __getstate__(self) -> dict[str, str]:
        """Pickle the way to the memory, not what is in it."""
        return {"name": self._name, "path": str(self._segment.path)}

    def __setstate__(self, state: dict[str, str]) -> None:
        """Attach to the memory in the process that unpickles."""
        self._name = state["name"]
        self._view(Slots(attach_segment(Path(state["path"]))))

    def beside(self, label: str, dims: Sequence[int], dtype: torch.dtype) -> Self:
        """Make a second cache for the same samples: their targets, for instance.

        Args:
            label: Its name is that of this cache, a dot and this.
            dims: Shape of one of its items.
            dtype: Their dtype.
        """
        spec = self._slots.spec
        other = object.__new__(type(self))
        other._open(replace(spec, dims=tuple(dims), dtype=dtype), f"{self._name}.{label}")
        return other

    @property
    def spec(self) -> SlotSpec:
        """What is cached: how many samples and slots, and their shape and dtype."""
        return self._slots.spec

    @property
    def name(self) -> str:
        """What other processes of this host give as ``name`` to attach."""
        return self._name

    @property
    def array(self) -> torch.Tensor:
        """The data, a tensor ``(slots, *data_dims)`` in shared memory; what empty slots hold is nobody's item."""
        return self._array

    underlying_array = array

    @property
    def aux_array(self) -> torch.Tensor:
        """For each sample whether it is cached: 0 no, 1 yes, 2 it has no slot; uint8 ``(dataset_len,)``, shared."""
        return torch.from_numpy(self._slots.states)

    @property
    def indices(self) -> torch.Tensor:
        """The samples that have a slot, int64 ``(slots,)``, ascending: row i of ``array`` is that of ``indices[i]``."""
        return torch.from_numpy(np.flatnonzero(self._slots.states != NO_SLOT))

    def __len__(self) -> int:
        """Count the slots."""
        return self._slots.spec.slots

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._slots.spec}, name={self._name!r})"

    def __getitem__(self, idx: int) -> torch.Tensor:
        """View the slot of a sample; see :meth:`get_slot`.

        Raises:
            SlotIndexError: It has none.
            SlotStateError: The slot is empty.
        """
        slot = self.get_slot(idx, allow_oob_idx=False, allow_empty_slot=False)
        assert slot is not None
        return slot

    def __setitem__(self, idx: int, value: Any) -> None:
        """Write the slot of a sample, whatever it held; errors as for :meth:`set_slot`."""
        self.set_slot(idx, value, allow_oob_idx=False, allow_overwrite=True)

    def get_slot(self, idx: int, allow_oob_idx: bool = True, allow_empty_slot: bool = True) -> torch.Tensor | None:
        """View the slot of a sample.

        Args:
            idx: Index in the dataset.
            allow_oob_idx: False: a sample that has no slot is an error.
            allow_empty_slot: False: an empty slot is an error.

        Returns:
            The item, or None. It is no copy: who changes it in place changes the cache, and it changes when the slot is
            written over or the cache cleared. :meth:`get_slots` copies.

        Raises:
            SlotIndexError: The index is not in the dataset, or has no slot where it had to.
            SlotStateError: The slot is empty where it had to be set.
        """
        index = as_index(idx, self._samples)
        state = self._state_of[index]
        tally = self._slots.tally or self._slots.claim_tally()
        if state == SET:
            tally[0] += 1
            return self._array[index if self._row_of is None else self._row_of[index]]
        tally[1] += 1
        if state == NO_SLOT and not allow_oob_idx:
            raise self._without_slot(idx)
        if state != NO_SLOT and not allow_empty_slot:
            raise SlotStateError(f"slot {idx} is empty; set it first, or read it by get_slot, which gives None.")
        return None

    def set_slot(self, idx: int, value: Any, allow_oob_idx: bool = True, allow_overwrite: bool | None = None) -> None:
        """Write the slot of a sample; nothing happens if it has none.

        Args:
            idx: Index in the dataset.
            value: The item, of the shape and dtype of the cache: a tensor, an array, or a number.
            allow_oob_idx: False: a sample that has no slot is an error.
            allow_overwrite: What becomes of a slot that is set. None: it stays as it is. True: it is written, and is
                empty meanwhile; if its bytes are the same, nothing happens. False: that is an error, as by default
                in stocaching, where workers that meet one sample at a time fail by it.

        Raises:
            SlotIndexError: The index is not in the dataset, or has no slot where it had to.
            SlotStateError: The slot is set where it had to be empty.
            SlotValueError: The value has another shape or dtype.
        """
        index = as_index(idx, self._samples)
        state = self._state_of[index]
        item = as_item(value, self._slots.spec)
        if state == NO_SLOT:
            if not allow_oob_idx:
                raise self._without_slot(idx)
            return
        if state == SET and allow_overwrite is None:
            return
        if not self._slots.write_one(index, item, overwrite=bool(allow_overwrite)) and allow_overwrite is False:
            raise SlotStateError(f"slot {idx} is set; allow_overwrite=True writes it all the same, None keeps it.")

    def is_slot_empty(self, idx: int) -> bool:
        """Say whether the slot of a sample is empty; one that holds zeros is not.

        Raises:
            SlotIndexError: The index is not in the dataset, or has no slot.
        """
        state = self._state_of[as_index(idx, self._samples)]
        if state == NO_SLOT:
            raise self._without_slot(idx)
        return state != SET

    def copy_slot(self, idx: int) -> torch.Tensor | None:
        """Copy the item of a sample: what :meth:`get_slots` does for one.

        Returns:
            The item, or None; also None if it is being written over.

        Raises:
            SlotIndexError: The index is not in the dataset.
        """
        return self._slots.read_one(as_index(idx, self._samples))

    def get_slots(self, indices: Sequence[int] | torch.Tensor | Indices, *, shared: bool = False) -> Found:
        """Copy many items in one go.

        Args:
            indices: N indices in the dataset.
            shared: Copy into shared memory, where another process gets it without a further copy.

        Returns:
            ``positions`` of those that were found among the indices, int64 ``(n,)``, ascending, and their ``values``
            ``(n, *data_dims)``. An item that is being written over is not found.

        Raises:
            SlotIndexError: An index is not in the dataset.
        """
        return self._slots.read(as_indices(indices, self._samples), shared=shared)

    def set_slots(
        self,
        indices: Sequence[int] | torch.Tensor | Indices,
        values: torch.Tensor | npt.NDArray[Any],
        allow_oob_idx: bool = True,
        allow_overwrite: bool | None = None,
    ) -> None:
        """Write many slots in one go.

        Args:
            indices: N indices in the dataset. Of one given twice the first item counts, with ``allow_overwrite=True``
                the last.
            values: Their items, ``(N, *data_dims)``.
            allow_oob_idx: As for :meth:`set_slot`, and so are the rest and the errors; after one nothing is written.
            allow_overwrite: As for :meth:`set_slot`.
        """
        wanted = as_indices(indices, self._samples)
        items = as_items(values, len(wanted), self._slots.spec)
        states = self._slots.states[wanted]
        if not allow_oob_idx and (states == NO_SLOT).any():
            raise self._without_slot(int(wanted[states == NO_SLOT][0]))
        if allow_overwrite is False and (states == SET).any():
            raise SlotStateError(
                f"slot {wanted[states == SET][0]} is set; allow_overwrite=True writes it all the same, None keeps it."
            )
        source = np.frombuffer(tensor_bytes(items), np.uint8).reshape(len(wanted), self._slots.spec.item_bytes)
        chosen = np.unique(wanted[::-1] if allow_overwrite else wanted, return_index=True)[1]
        if allow_overwrite:
            chosen = len(wanted) - 1 - chosen
        chosen = chosen[states[chosen] != NO_SLOT]
        if len(chosen) < len(wanted):
            wanted, source = wanted[chosen], source[chosen]
        if len(wanted):
            self._slots.write(wanted, source, overwrite=bool(allow_overwrite))

    def clear(self) -> None:
        """Empty all slots. Views that were given before change once others write."""
        self._slots.clear()

    def stats(self) -> SlotStats:
        """Say what is cached, and how often all processes together found what they looked for."""
        return self._slots.stats()

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the slots that are set into a safetensors file, atomically; other writers wait.

        Returns:
            How many they are.

        Raises:
            StoreError: The file cannot be written.
        """
        return save_slots(Path(path), self._slots)

    def load(self, path: str | os.PathLike[str]) -> int:
        """Fill empty slots from a file of :meth:`save`; those that are set stay.

        The caches need the same ``dataset_len``, ``data_dims`` and dtype; which samples have a slot may differ.

        Returns:
            How many slots were filled.

        Raises:
            FormatError: The file is missing, damaged, or of other items; then no slot is filled.
            StoreError: It cannot be read.
        """
        return load_slots(Path(path), self._slots)

    def _without_slot(self, idx: int) -> SlotIndexError:
        return SlotIndexError(
            f"sample {idx} has no slot: {len(self)} of {self._samples} have one; give more size_limit_gib, or allow it."
        )
