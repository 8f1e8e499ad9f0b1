"""The reading of a dataset in chunks whose items are keyed for every encoder.

A chunk is read, taken apart and keyed where the loader of the fill runs it, in a worker if there are any. Row numbers
are never given out there: only the store hands out rows, so workers cannot disagree about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from quatcache.data.batches import given_samples
from quatcache.data.samples import SampleColumns, in_columns, target_column
from quatcache.encoders.key_scheme import KeyScheme
from quatcache.errors import KeyTypeError
from quatcache.keys import KeyArray

__all__ = ["Chunk", "ChunkReader", "unkeyable"]

TRIED = 8


class Chunk(NamedTuple):
    """Some samples of a dataset, read and keyed.

    Attributes:
        indices: Their n indices.
        items: Their n * k items, sample by sample.
        targets: Their target columns; a list where the values make no tensor.
        layout: Name of their layout.
        keys: For each encoder the keys, int64 ``(n, k, 2)``; and for one with a key extractor the content keys as well,
            under :attr:`KeyScheme.content_column`, if its items have any.
    """

    indices: Sequence[int]
    items: list[Any]
    targets: tuple[Any, ...]
    layout: str
    keys: dict[str, KeyArray]

    @property
    def batch_order(self) -> npt.NDArray[np.int64]:
        """Positions of the items as a batch has them: the first of all samples before the second ones."""
        order: npt.NDArray[np.int64] = np.arange(len(self.items)).reshape(len(self.indices), -1).T.reshape(-1)
        return order


@dataclass
class ChunkReader(Dataset[Any]):
    """A dataset in keyed chunks: given the indices of a chunk, it returns the :class:`Chunk`.

    Attributes:
        dataset: The user's map-style dataset.
        reader: Takes a sample apart.
        schemes: How each encoder keys items.
        number: Of the dataset within the run; it keeps index keys of several datasets apart.
    """

    dataset: Any
    reader: Callable[[Any], Any]
    schemes: Sequence[KeyScheme]
    number: int = 0

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Chunk:
        """Read a chunk of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Chunk:
        """Read and key samples.

        Raises:
            SampleError: A sample of no supported kind, or kinds mixed.
            KeyTypeError: An item that cannot be keyed.
        """
        return self.keyed(self.read(indices), indices)

    def read(self, indices: Sequence[int]) -> SampleColumns:
        """Read samples; see :meth:`__getitems__`."""
        return in_columns(given_samples(self.dataset, indices), self.reader)

    def keyed(self, samples: SampleColumns, indices: Sequence[int]) -> Chunk:
        """Key samples that were read; see :meth:`__getitems__`."""
        layout, items, size = samples.layout, samples.items, len(indices)
        width = layout.items_per_sample
        places = np.asarray(indices, np.int64).repeat(width) * width + np.tile(np.arange(width), size)
        places = places + (self.number << 48)
        keys: dict[str, KeyArray] = {}
        for place, scheme in enumerate(self.schemes):
            alike = next((other for other in self.schemes[:place] if scheme.keys_like(other)), None)
            if alike is not None:  # hashed already
                keys[scheme.name] = keys[alike.name]
            else:
                keys[scheme.name] = scheme.keys(items, places).reshape(size, width, 2)
            if scheme.extractor is not None:
                with suppress(KeyTypeError):  # nothing to compare: perhaps the extractor was given for that reason
                    keys[scheme.content_column] = scheme.content_keys(items).reshape(size, width, 2)
        return Chunk(list(indices), items, tuple(map(_uniform_column, samples.targets)), layout.name, keys)


def _uniform_column(values: Sequence[Any]) -> Any:
    """Stack targets as a loader does, but leave a list of values that another batch could stack to another dtype."""
    kinds: set[Any] = set(map(type, values))
    if any(hasattr(kind, "dtype") for kind in kinds):
        kinds = {getattr(value, "dtype", type(value)) for value in values}
    return target_column(values) if len(kinds) == 1 else list(values)


def unkeyable(scheme: KeyScheme, readers: Iterable[ChunkReader]) -> str | None:
    """Find out whether the items of some dataset have no canonical bytes, by looking at its first ones.

    Args:
        scheme: How an encoder keys items.
        readers: The datasets.

    Returns:
        The error that keying raised; None if all is well, or if the user extracts keys.
    """
    if scheme.extractor is not None:
        return None
    for reader in readers:
        try:
            replace(reader, schemes=[scheme]).__getitems__(range(min(TRIED, len(reader))))
        except KeyTypeError as error:
            return str(error)
    return None
