"""How the items of one encoder get their keys: by their content, by what a key extractor returns, or by their index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from quatcache.encoders.encoder import Encoder
from quatcache.errors import KeyTypeError, shorten
from quatcache.keys import KeyArray, KeyExtractor, content_keys, extracted_keys, index_keys, index_salt

__all__ = ["KeyScheme"]


@dataclass(frozen=True)
class KeyScheme:
    """How one encoder keys items.

    Attributes:
        name: The encoder's name.
        content: Narrows an item to what the encoder sees; None: the item itself.
        extractor: The user's key extractor; None: keys are hashes of the content.
        salt: Set for items without canonical bytes: keys then stand for indices of one run.

    Example:
        >>> scheme = KeyScheme("default", extractor=str.lower)
        >>> one, other = scheme.keys(["Oak", "oak"], np.arange(2))
        >>> bool((one == other).all())
        True
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
