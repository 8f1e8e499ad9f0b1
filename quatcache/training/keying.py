"""How the items of a dataset get their keys for one encoder, and the reading of a dataset in chunks.

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
from quatcache.encoders.encoder import Encoder
from quatcache.errors import KeyTypeError, shorten
from quatcache.keys import KeyArray, KeyExtractor, content_keys, extracted_keys, index_keys, index_salt

__all__ = ["Chunk", "ChunkReader", "KeyScheme", "unkeyable"]

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


@dataclass(frozen=True)
class KeyScheme:
    """How one encoder keys items.

    Attributes:
        name: The encoder's name.
        content: Narrows an item to what the encoder sees; None: the item itself.
        extractor: The user's key extractor; None: keys are hashes of the content.
        salt: Set for items without canonical bytes: keys then stand for indices of one run.
    """

    name: str
    content: Callable[[Any], Any] | None = None
    extractor: KeyExtractor | None = None
    salt: bytes | None = None

    @classmethod
    def of(cls, name: str, encoder: Encoder, extractor: KeyExtractor | None) -> KeyScheme:
        """Give the scheme of an encoder."""
        narrows = type(encoder).content is not Encoder.content
        return cls(name, encoder.content if narrows else None, extractor)

    def by_index(self) -> KeyScheme:
        """Give the fallback for items without canonical bytes."""
        return replace(self, salt=index_salt())

    @property
    def content_column(self) -> str:
        """Name of the column of content keys beside extracted ones."""
        return f"{self.name}#content"

    @property
    def row_column(self) -> str:
        """Name of the column of keys that rows are stored under."""
        return self.name if self.extractor is None else f"{self.name}#row"

    def keys_like(self, other: KeyScheme) -> bool:
        """Say whether another encoder's keys are the same for every item."""
        return self.content == other.content and self.extractor is other.extractor and self.salt == other.salt

    def keys(self, items: Sequence[Any], places: npt.NDArray[np.int64]) -> KeyArray:
        """Key N items.

        Args:
            items: The items.
            places: The place of each item in its dataset, for index keys.

        Returns:
            Keys ``(N, 2)``.

        Raises:
            KeyTypeError: An item without canonical bytes, or an extractor that returns an unsupported type.
        """
        if self.extractor is not None:
            return extracted_keys([self._extract(item) for item in items])
        if self.salt is not None:
            return index_keys(places.tolist(), self.salt)
        return self.content_keys(items)

    def content_keys(self, items: Sequence[Any]) -> KeyArray:
        """Hash what the encoder sees of N items."""
        return content_keys(items if self.content is None else [self.content(item) for item in items])

    def _extract(self, item: Any) -> Any:
        assert self.extractor is not None
        try:
            return self.extractor(item)
        except Exception as error:
            raise KeyTypeError(
                f"the key extractor of encoder {self.name!r} failed on item {shorten(item)} "
                f"({type(error).__name__}: {error}); correct the extractor or the item."
            ) from error


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
