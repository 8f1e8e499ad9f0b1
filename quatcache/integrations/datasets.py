"""Embeddings as a column of a Hugging Face dataset.

``Dataset.map`` caches its result under a fingerprint of the function, which it finds by pickling it: of an encoder that
is hundreds of megabytes, other ones in the next process. So the fingerprint is made here, of the identity of the
encoder: a result is found again by any process whose encoder is the same, and by none whose encoder was changed. Where
the identity does not decide the result, it is never found again: with a function of which nothing is known, and with a
key extractor, because rows then depend on what was met before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from quatcache.embedding_cache import EmbeddingCache, require_cache
from quatcache.errors import ConfigError, MissingDependencyError, shorten

try:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from datasets.fingerprint import Hasher, generate_random_fingerprint
except ImportError as error:
    raise MissingDependencyError("datasets is not installed: pip install 'quatcache[datasets]'") from error

__all__ = ["EmbedColumn", "add_embeddings"]

_Data = TypeVar("_Data")

_WITHOUT_EFFECT = ("num_proc", "desc", "load_from_cache_file", "keep_in_memory", "cache_file_name", "writer_batch_size",
                   "suffix_template", "new_fingerprint")  # fmt: skip


class EmbedColumn:
    """A function for ``map(..., batched=True)``: from a batch with a column of items to one of their embeddings.

    Args:
        cache: Encodes the items.
        column: Of the items.
        into: Column that is added.
        batch_size: Items per encoder call, at most.

    Raises:
        ConfigError: ``cache`` is no EmbeddingCache; when called: there is no such column, or it has one row alone.

    Example:
        >>> embed = EmbedColumn(EmbeddingCache(lambda texts: [[float(len(text))] for text in texts]))
        >>> embed({"text": ["oak", "maple"]})["embedding"].tolist()
        [[3.0], [5.0]]
    """

    def __init__(
        self, cache: EmbeddingCache, column: str = "text", into: str = "embedding", batch_size: int = 32
    ) -> None:
        self.cache = require_cache(cache, "cache")
        self.column = column
        self.into = into
        self.batch_size = batch_size

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Embed a batch."""
        if self.column not in getattr(batch, "column_names", batch):  # a table of Arrow contains its values
            raise self._lacks(list(batch))
        items = batch[self.column]
        if isinstance(items, str | bytes) or not hasattr(items, "__len__"):  # its letters are not meant
            raise ConfigError(f"column {self.column!r} is {shorten(items)}, of one row; use map(..., batched=True).")
        return {self.into: self.cache.encode(list(items), self.batch_size, convert_to_numpy=True)}

    def _lacks(self, columns: list[str]) -> ConfigError:
        return ConfigError(f"column is {self.column!r}; the dataset has {shorten(columns)}.")

    def __getstate__(self) -> dict[str, Any]:
        """Add the identity to what the library pickles for a fingerprint of its own: a name does not tell the model."""
        return {**vars(self), "identity": self.cache.identity.digest}

    def fingerprint(self, dataset: Dataset, **settings: Any) -> str:
        """Give the fingerprint of what ``map`` makes of a dataset, for its ``new_fingerprint``.

        Args:
            dataset: The dataset.
            settings: What else ``map`` is given.

        Returns:
            Equal for equal data, settings and encoders, in any process; another one each time where the identity of
            the encoder does not decide its rows.
        """
        if not self.cache.is_identified:
            fresh: str = generate_random_fingerprint()
            return fresh
        decisive = {name: value for name, value in sorted(settings.items()) if name not in _WITHOUT_EFFECT}
        made_of = [dataset._fingerprint, self.cache.identity.digest, str(self.cache.dtype), self.column, self.into]
        digest: str = Hasher.hash([*made_of, decisive])
        return digest


def add_embeddings(
    dataset: _Data,
    cache: EmbeddingCache,
    column: str = "text",
    into: str = "embedding",
    *,
    encode_batch_size: int = 32,
    **settings: Any,
) -> _Data:
    """Add a column of embeddings to a dataset, by its ``map``.

    Args:
        dataset: A ``Dataset``, an ``IterableDataset``, or a dict of them as the library makes it.
        cache: Encodes the items. With ``num_proc``, give it a ``save_dir``: processes share rows through it alone.
        column: Of the items.
        into: Column that is added.
        encode_batch_size: Items per encoder call, at most.
        settings: Of ``map``: ``batch_size`` (rows that are looked up together, 1,000 by default), ``num_proc``, and so
            on; not ``batched`` and ``new_fingerprint``.

    Returns:
        A dataset of the same kind.

    Raises:
        ConfigError: ``dataset`` or ``cache`` is something else, or there is no such column.

    Example:
        >>> from datasets import Dataset
        >>> cache = EmbeddingCache(lambda texts: [[float(len(text))] for text in texts])
        >>> add_embeddings(Dataset.from_dict({"text": ["oak", "maple"]}), cache)["embedding"][:]
        [[3.0], [5.0]]
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        added = {
            name: add_embeddings(part, cache, column, into, encode_batch_size=encode_batch_size, **settings)
            for name, part in dataset.items()
        }
        return type(dataset)(added)  # type: ignore[no-any-return]
    embed, data = EmbedColumn(cache, column, into, encode_batch_size), dataset
    if not isinstance(data, Dataset | IterableDataset):
        raise ConfigError(f"dataset is {shorten(data)}; pass a Dataset or an IterableDataset.")
    if data.column_names is not None and column not in data.column_names:  # streams may not know theirs
        raise embed._lacks(data.column_names)
    if isinstance(data, Dataset):
        settings["new_fingerprint"] = embed.fingerprint(data, **settings)
    return data.map(embed, batched=True, **settings)  # type: ignore[no-any-return]
