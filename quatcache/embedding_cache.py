"""The cache of a frozen encoder without a trainer: items go in, rows come out, and each distinct item is encoded once.

It shares rows with fits: the same directory, the same keys, the same identities. What a fit has cached is found here,
and what was encoded here is found by the next fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from quatcache.encoders.current_rows import AUTOCAST, CurrentRows
from quatcache.encoders.encoder import Encoder
from quatcache.encoders.encoder_rows import EncoderRows
from quatcache.encoders.function import FunctionEncoder, as_encoder
from quatcache.encoders.identity import JSON, Identity
from quatcache.errors import ConfigError, shorten
from quatcache.keys import KeyExtractor
from quatcache.progress import fill_progress
from quatcache.read_through import Counts
from quatcache.sequences import PaddedSequences
from quatcache.settings import byte_budget, check_save_dir, check_verify, float_dtype, is_count
from quatcache.store import CacheDirectory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["EmbeddingCache", "EmbeddingCacheStats", "require_cache"]

WINDOW = 2048
"""Items of a stream that are looked up, sorted and encoded together: a few megabytes of vectors."""


@dataclass(frozen=True)
class EmbeddingCacheStats:
    """What a cache has done since it was made, and what it holds.

    Attributes:
        hits: Items that had a row.
        computed: Items that the encoder was called for.
        duplicates: Items equal to one beside them, which was computed.
        rows: Rows of the encoder as it is now, by whomever they were put.
        nbytes: Their size in bytes, without keys.
        verified: Stored rows that were encoded again and compared, and agreed.
        seconds: Time in the encoder, collating included.
    """

    hits: int
    computed: int
    duplicates: int
    rows: int
    nbytes: int
    verified: int
    seconds: float

    @property
    def asked(self) -> int:
        """Items that were asked for."""
        return self.hits + self.computed + self.duplicates


class EmbeddingCache:
    """Encodes items with a frozen encoder, each distinct one once: in this call, in all calls and, on disk, for ever.

    Threads may share one cache, and processes one directory. Each item is then still encoded once in total: whoever
    comes first encodes it, the others wait and read its row. Who finds all rows there waits for nobody, and the encoder
    is loaded only if a row is missing. After a call everything is committed, and during a long one at least every 30
    seconds: a program that was killed goes on where it stopped. If nothing more can be written, items are encoded all
    the same, and a warning says so.

    An encoder may be changed between two calls; rows are then those of the changed one. In memory, rows of before are
    let go; on disk they stay, and are found again if it is changed back.

    Args:
        encoder: An :class:`~quatcache.encoders.Encoder` that is not trainable; a loaded ``SentenceTransformer``, which
            is frozen in place, its directory or its hub name; or a function from a list of items to their rows (a
            tensor or array ``(B, D)``, or a list of vectors).
        save_dir: Directory in which rows persist, the same as that of fits; None: in memory, as long as this object.
        identity: Of a function, what decides its rows: a name with a version, or JSON values by name. It is needed with
            ``save_dir``, because nothing of it can be found out. Of everything else the identity is found.
        key_extractor: From an item to a str, bytes, int, float, bool, None or tuple of these; items of equal keys share
            the row of the first of them that this object meets. None: the content of an item is its key.
        dtype: Storage dtype of floating rows, such as ``"float16"``; None: as the encoder gives them.
        max_size: Budget in bytes for rows, a number or a size such as ``"8GiB"``; items beyond it are encoded each
            time.
        verify: Stored rows that are encoded again and compared before they are used: ``"auto"``: 8, if library versions
            or hardware are not those of the fill; a number: so many; 0: none.
        precision: As of the trainer whose rows are shared: "32-true", "bf16-mixed" or "16-mixed".
        device: Where the encoder computes, to which it is moved; None: where it is. Rows are always on the CPU.
        checksums: Compare each file with its checksum when it is opened.
        memory_map: Map files into memory; False: read them whole, which network disks do faster.

    Raises:
        ConfigError: A setting that cannot work; the message gives it and the remedy.

    Example:
        >>> cache = EmbeddingCache(lambda texts: [[float(len(text)), 1.0] for text in texts])
        >>> cache.encode(["oak", "elm", "oak", "maple"])
        tensor([[3., 1.],
                [3., 1.],
                [3., 1.],
                [5., 1.]])
        >>> cache.stats.computed, cache.stats.duplicates, cache.contains(["elm", "fir"]).tolist()
        (3, 1, [True, False])
    """

    def __init__(
        self,
        encoder: Encoder | SentenceTransformer | str | PathLike[str] | Callable[[list[Any]], Any],
        save_dir: str | PathLike[str] | None = None,
        *,
        identity: str | Mapping[str, JSON] | None = None,
        key_extractor: KeyExtractor | None = None,
        dtype: torch.dtype | str | None = None,
        max_size: int | str | None = None,
        verify: Literal["auto"] | int = "auto",
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        device: torch.device | str | None = None,
        checksums: bool = True,
        memory_map: bool = True,
    ) -> None:
        """Open nothing yet."""
        check_save_dir(save_dir)
        check_verify(verify)
        storage, budget = float_dtype(dtype), byte_budget(max_size)
        if key_extractor is not None and not callable(key_extractor):
            raise ConfigError(f"key_extractor is {shorten(key_extractor)}; give a function from an item to its key.")
        if precision not in AUTOCAST:
            raise ConfigError(f"precision is {precision!r}; use one of {', '.join(map(repr, AUTOCAST))}.")
        self.encoder: Encoder = as_encoder(encoder, identity)
        if save_dir is not None and isinstance(self.encoder, FunctionEncoder) and not self.encoder.is_identified:
            raise ConfigError(
                f"encoder is the function {self.encoder.name} without an identity, so its rows in save_dir could be "
                "those of another one; pass identity='a name, a version', and another one whenever its rows change."
            )
        if device is not None:
            self.encoder.to(device)
        self._settings: dict[str, Any] = {
            "save_dir": None if save_dir is None else os.fspath(save_dir),
            "key_extractor": key_extractor,
            "dtype": dtype,
            "max_size": max_size,
            "verify": verify,
            "precision": precision,
            "checksums": checksums,
            "memory_map": memory_map,
        }
        directory = None
        if save_dir is not None:
            directory = CacheDirectory(save_dir, verify_checksums=checksums, memory_map=memory_map)
            self._settings["save_dir"] = str(directory.path)  # a later chdir must not move it
        name = self.encoder.name if isinstance(self.encoder, FunctionEncoder) else type(self.encoder).__name__
        self._current = CurrentRows(name, self.encoder, directory, storage, verify=verify, precision=precision)
        self._rows = EncoderRows(self._current, directory, key_extractor=key_extractor, dtype=storage, max_size=budget)

    def encode(
        self,
        items: Iterable[Any],
        batch_size: int = 32,
        show_progress_bar: bool = False,
        *,
        convert_to_numpy: bool = False,
    ) -> Any:
        """Give the rows of items, in their order.

        Args:
            items: N items: what the encoder takes, in a list or anything that can be made one.
            batch_size: Items per encoder call, at most; on the CPU a call of a text encoder also ends at about 2,048
                tokens.
            show_progress_bar: Whether to show a bar.
            convert_to_numpy: Give an array; of bfloat16, which NumPy lacks, as float32.

        Returns:
            A new tensor ``(N, D)``, or ``(N, *shape)``, on the CPU in the encoder's dtype; of an encoder of sequences
            :class:`~quatcache.sequences.PaddedSequences`. Of no items ``(0, D)``, with D as far as it is known.

        Raises:
            ConfigError: ``items`` is a single text or no collection, or ``batch_size`` is below 1.
            KeyTypeError: An item without canonical bytes, and no key extractor.
            CollateError: The encoder cannot collate an item.
            EncoderOutputError: It gave something other than one finite row per item.
            NotFrozenError: It can change, or gives other rows each time; or it was changed meanwhile.
            StaleRowsError: Stored rows are not what it gives now.
            StoreError: The directory cannot be read, or holds no rows and cannot be written.

        Example:
            >>> cache = EmbeddingCache(lambda numbers: [[n, n * n] for n in numbers])
            >>> cache.encode([2, 3], convert_to_numpy=True).tolist()
            [[2, 4], [3, 9]]
        """
        listed = _listed(items)
        _check_batch_size(batch_size)
        with fill_progress(len(listed), True, "Encoding") if show_progress_bar else nullcontext(_advance) as advance:
            rows = self._rows.answer(listed, batch_size, advance)
        if not convert_to_numpy:
            return rows
        if isinstance(rows, PaddedSequences):
            raise ConfigError(
                "convert_to_numpy is True, and the encoder gives sequences of different lengths; leave it False, and "
                "take values and mask of what encode returns."
            )
        return (rows.float() if rows.dtype is torch.bfloat16 else rows).numpy()

    def encode_iter(self, items: Iterable[Any], batch_size: int = 32, window: int | None = None) -> Iterator[Any]:
        """Give the rows of a stream batch by batch, in its order and in constant memory.

        What was yielded is in the cache, committed. Without ``save_dir`` that is memory: set ``max_size``, or the rows
        of an endless stream fill it.

        Args:
            items: Items, in anything that can be iterated over, once.
            batch_size: Items per batch that is yielded, the last one excepted, and at most so many per encoder call.
            window: Items that are read ahead, and sorted and encoded together, at least ``batch_size``; rounded up to
                whole batches. None: about 2,048.

        Yields:
            Rows ``(batch_size, *row_shape)`` as of :meth:`encode`.

        Raises:
            ConfigError: ``items`` is a single text or cannot be iterated over, or a size is too small.

        Example:
            >>> cache = EmbeddingCache(lambda numbers: [[float(n)] for n in numbers])
            >>> [rows.flatten().tolist() for rows in cache.encode_iter(range(5), batch_size=2)]
            [[0.0, 1.0], [2.0, 3.0], [4.0]]
        """
        _check_batch_size(batch_size)
        if window is not None and not is_count(window, batch_size):
            raise ConfigError(f"window is {window!r}; give the items that are read ahead, at least batch_size.")
        size = -(-(max(WINDOW, batch_size) if window is None else window) // batch_size) * batch_size
        return self._iterate(_iterator(items), batch_size, size)

    def _iterate(self, items: Iterator[Any], batch_size: int, window: int) -> Iterator[Any]:
        while listed := list(islice(items, window)):
            rows = self._rows.answer(listed, batch_size, _advance)
            for start in range(0, len(listed), batch_size):
                yield rows[start : start + batch_size]

    def contains(self, items: Iterable[Any]) -> npt.NDArray[np.bool_]:
        """Say which items have a row; nothing is encoded.

        Args:
            items: N items.

        Returns:
            ``(N,)`` bool.

        Raises:
            ConfigError: ``items`` is a single text or no collection.
            KeyTypeError: An item without canonical bytes, and no key extractor.
        """
        return self._rows.contains(_listed(items))

    @property
    def stats(self) -> EmbeddingCacheStats:
        """What was done so far, and what there is."""
        opened, counts = self._current.open(), self._rows.counts
        return EmbeddingCacheStats(
            hits=counts.hits,
            computed=counts.computed,
            duplicates=counts.duplicates,
            rows=len(opened.store),
            nbytes=opened.store.nbytes,
            verified=0 if opened.canary is None else opened.canary.compared,
            seconds=self._rows.seconds,
        )

    @property
    def identity(self) -> Identity:
        """All that decides the rows of the encoder, as it is now."""
        return self._current.open().identity

    @property
    def is_identified(self) -> bool:
        """Whether the identity decides all rows: not those of a function without one, nor of items that share a key."""
        encoder = self.encoder
        identified = not isinstance(encoder, FunctionEncoder) or encoder.is_identified
        return identified and self._settings["key_extractor"] is None

    @property
    def save_dir(self) -> str | None:
        """Where rows persist; None: nowhere."""
        save_dir: str | None = self._settings["save_dir"]
        return save_dir

    @property
    def dtype(self) -> torch.dtype | None:
        """Storage dtype of floating rows; None: as the encoder gives them."""
        return float_dtype(self._settings["dtype"])

    def __reduce__(self) -> tuple[Any, ...]:
        """Send encoder and settings to another process; rows in memory stay here."""
        return partial(EmbeddingCache, **self._settings), (self.encoder,)

    def __repr__(self) -> str:
        """Say what is cached where."""
        return f"EmbeddingCache({self._current.name}, save_dir={self.save_dir!r})"


def _listed(items: Any) -> Sequence[Any]:
    if isinstance(items, np.ndarray) and items.dtype.kind in "UO" and items.ndim:  # as Python's own texts
        return items.tolist()  # type: ignore[no-any-return]
    return items if isinstance(items, list | tuple) else list(_iterator(items))


def _iterator(items: Any) -> Iterator[Any]:
    if isinstance(items, str | bytes | bytearray):
        raise ConfigError(f"items is the single text {shorten(items)}; pass a list of items.")
    # the keys of a mapping or the columns of a table are hardly meant, and a set has no order
    if not isinstance(items, Mapping | Set) and not hasattr(items, "columns"):
        try:
            return iter(items)
        except TypeError:
            pass
    raise ConfigError(f"items is {shorten(items)}, a {type(items).__name__}; pass a list of items.")


def _check_batch_size(batch_size: object) -> None:
    if not is_count(batch_size, 1):
        raise ConfigError(f"batch_size is {batch_size!r}; give the items per encoder call, at least 1.")


def _advance(samples: int, counts: Counts) -> None:
    """Show nothing."""


def require_cache(value: Any, name: str) -> EmbeddingCache:
    """Give a cache that was passed to an integration.

    Args:
        value: What was passed.
        name: Of the argument.

    Raises:
        ConfigError: It is no EmbeddingCache.
    """
    if not isinstance(value, EmbeddingCache):
        raise ConfigError(f"{name} is {shorten(value)}; pass EmbeddingCache(encoder, save_dir=...).")
    return value
