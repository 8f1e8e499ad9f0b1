"""What a hit costs: batches of 1,000 texts whose rows are all there, in caches for functions and for embeddings.

The caches of single calls are asked item by item, which is all they can do. The texts of a batch are new objects, as a
dataset gives them, so that no hash of a string is at hand. A cache is filled by being asked; its answers are held
against the rows before any is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quatcache.demo.icd10 import read_tabular
from quatcache.keys import content_keys
from quatcache.memoize import memoize_batch
from quatcache.read_through import read_through
from quatcache.store import CacheDirectory, MemoryStore, TensorStore

__all__ = ["CONTENDERS", "Source", "look_up"]

WIDTH = 384
BATCH = 1000


class Source:
    """What is cached: a row for each text, and a count of the texts that were asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.rows = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(0))
        self.number = {text: position for position, text in enumerate(texts)}
        self.asked = 0

    def one(self, text: str) -> Tensor:
        """Give a row ``(384,)``."""
        self.asked += 1
        return self.rows[self.number[text]].clone()

    def many(self, batch: list[str]) -> list[Tensor]:
        """Give rows."""
        return [self.one(text) for text in batch]

    def tensor(self, batch: Sequence[str]) -> Tensor:
        """Give rows ``(B, 384)``."""
        self.asked += len(batch)
        return self.rows[[self.number[text] for text in batch]]


@functools.cache
def diagnoses() -> tuple[str, ...]:
    """Give distinct short texts, of about seven words."""
    return tuple(dict.fromkeys(diagnosis.text for diagnosis in read_tabular()))


Ask = Callable[[list[str]], Any]


def one_by_one(cached: Callable[[str], Any]) -> Ask:
    """Ask for the items of a batch one after the other."""
    return lambda batch: [cached(text) for text in batch]


def with_dict(source: Source, folder: Path) -> Ask:
    """Keep a plain dict."""
    kept: dict[str, Tensor] = {}

    def cached(text: str) -> Tensor:
        row = kept.get(text)
        if row is None:
            row = kept[text] = source.one(text)
        return row

    return one_by_one(cached)


def with_lru_cache(source: Source, folder: Path) -> Ask:
    """Decorate with ``functools.lru_cache``."""
    return one_by_one(functools.lru_cache(maxsize=1 << 20)(source.one))


def with_cachetools(source: Source, folder: Path) -> Ask:
    """Decorate with ``cachetools.cached``."""
    import cachetools

    return one_by_one(cachetools.cached(cachetools.LRUCache(1 << 20))(source.one))


def with_batche(source: Source, folder: Path, maxsize: int | None = None) -> Ask:
    """Decorate with batche, for ever or with an LRU cache."""
    from batche import cache_batch_variable

    def cached(batch):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # it cannot read annotations as strings
        return source.many(batch)

    return cache_batch_variable("batch", maxsize=maxsize)(cached)  # type: ignore[no-any-return]


def with_batche_lru(source: Source, folder: Path) -> Ask:
    """Decorate with batche and a bound."""
    return with_batche(source, folder, 1 << 20)


def with_joblib(source: Source, folder: Path) -> Ask:
    """Decorate with ``joblib.Memory``: a file for each call."""
    import joblib

    def cached(text: str) -> Any:
        return source.one(text).numpy()

    return one_by_one(joblib.Memory(folder / "joblib", verbose=0).cache(cached))


def with_diskcache(source: Source, folder: Path) -> Ask:
    """Decorate with ``diskcache.Cache.memoize``."""
    import diskcache

    def cached(text: str) -> bytes:
        return source.one(text).numpy().tobytes()

    kept = diskcache.Cache(str(folder / "diskcache")).memoize()(cached)
    return lambda batch: [torch.frombuffer(bytearray(kept(text)), dtype=torch.float32) for text in batch]


def with_langchain(source: Source, folder: Path) -> Ask:
    """Use ``CacheBackedEmbeddings`` in memory."""
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_core.embeddings import Embeddings
    from langchain_core.stores import InMemoryByteStore

    class Rows(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            rows: list[list[float]] = source.tensor(texts).tolist()
            return rows

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    cached = CacheBackedEmbeddings.from_bytes_store(
        Rows(), InMemoryByteStore(), namespace="rows", key_encoder="blake2b"
    )
    return cached.embed_documents


def through(source: Source, store: Any, make_keys: Callable[[list[str]], Any], compute: Callable[[Any], Any]) -> Ask:
    """Read through a store of quatcache."""

    def ask(batch: list[str]) -> Any:
        return read_through(make_keys(batch), lambda positions: compute([batch[p] for p in positions]), store)

    return ask


def with_memory_store(source: Source, folder: Path) -> Ask:
    """Read through a bounded dict of Python objects."""
    import cachetools

    return through(source, MemoryStore(cachetools.LRUCache(1 << 20)), list, source.many)


def with_decorator(source: Source, folder: Path, maxsize: int | None = None) -> Ask:
    """Decorate with ``memoize_batch``, for ever or with an LRU cache."""

    def cached(batch: list[str]) -> list[Tensor]:
        return source.many(batch)

    return memoize_batch("batch", maxsize=maxsize)(cached)


def with_decorator_lru(source: Source, folder: Path) -> Ask:
    """Decorate with ``memoize_batch`` and a bound."""
    return with_decorator(source, folder, 1 << 20)


def with_tensor_store(source: Source, folder: Path) -> Ask:
    """Read through rows in memory, by content keys."""
    return through(source, TensorStore(), content_keys, source.tensor)


def with_disk_store(source: Source, folder: Path) -> Ask:
    """Read through memory-mapped rows, by content keys."""
    store = CacheDirectory(folder / "quatcache").store("0" * 32, {})
    ask = through(source, store, content_keys, source.tensor)
    ask(list(source.number))
    store.flush()  # what is not committed yet would be read from memory
    source.asked = 0
    return ask


def with_row_numbers(source: Source, folder: Path) -> Ask:
    """Hash, find and gather, with nothing around it."""
    store, texts = TensorStore(), list(source.number)
    store.put_many(content_keys(texts), source.tensor(texts))
    source.asked = 0
    return lambda batch: store.gather(torch.from_numpy(store.rows_of(content_keys(batch))))


@dataclass(frozen=True)
class Contender:
    """One cache.

    Attributes:
        make: Builds it; the answer takes a batch.
        batches: How many batches a pass has; caches of files get one.
        fills: Whether it can be asked for what is not there.
    """

    make: Callable[[Source, Path], Ask]
    batches: int = 10
    fills: bool = True


CONTENDERS = {
    "dict": Contender(with_dict),
    "lru_cache": Contender(with_lru_cache),
    "cachetools": Contender(with_cachetools),
    "batche": Contender(with_batche),
    "batche, bounded": Contender(with_batche_lru),
    "joblib.Memory": Contender(with_joblib, batches=1),
    "diskcache": Contender(with_diskcache, batches=1),
    "langchain": Contender(with_langchain, batches=1),
    "quatcache, memoize_batch": Contender(with_decorator),
    "quatcache, memoize_batch, bounded": Contender(with_decorator_lru),
    "quatcache, MemoryStore": Contender(with_memory_store),
    "quatcache, TensorStore": Contender(with_tensor_store),
    "quatcache, DiskStore": Contender(with_disk_store, fills=False),
    "quatcache, key and gather": Contender(with_row_numbers, fills=False),
}


def as_tensor(answer: Any) -> Tensor:
    """Bring an answer into the form that a training step needs, ``(B, 384)``."""
    if isinstance(answer, Tensor):
        return answer
    first = answer[0]
    return torch.stack(answer) if isinstance(first, Tensor) else torch.stack([torch.as_tensor(row) for row in answer])


def fresh(texts: Sequence[str]) -> list[str]:
    """Make new strings of the same content, whose hashes nobody has computed."""
    return [text.encode().decode() for text in texts]


def look_up(contender: str, passes: int, folder: str) -> dict[str, Any]:
    """Time one cache.

    Args:
        contender: A name of ``CONTENDERS``.
        passes: How often all batches are looked up; the fastest pass counts.
        folder: Where a cache on disk may write.

    Returns:
        Microseconds an item, as the cache gives it and as one tensor a batch; and, of a batch of three misses of which
        two are equal, how many were computed.
    """
    chosen = CONTENDERS[contender]
    texts = diagnoses()[: chosen.batches * BATCH]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
    batches = [[texts[i] for i in order[start : start + BATCH]] for start in range(0, len(texts), BATCH)]
    source = Source(texts)
    ask = chosen.make(source, Path(folder))
    computed = None
    if chosen.fills:
        ask([texts[0], texts[0], texts[1]])
        computed = source.asked
    for batch in batches:
        ask(batch)
    source.asked = 0
    each, whole = [], []
    for _ in range(passes):
        seconds = [0.0, 0.0]
        for batch in batches:
            given = fresh(batch)
            started = time.perf_counter()
            answer = ask(given)
            between = time.perf_counter()
            rows = as_tensor(answer)
            ended = time.perf_counter()
            seconds[0] += between - started
            seconds[1] += ended - started
            torch.testing.assert_close(rows, source.rows[[source.number[text] for text in batch]], rtol=0, atol=0)
        each.append(seconds[0])
        whole.append(seconds[1])
    if source.asked:
        raise SystemExit(f"{contender} computed {source.asked} items that it had; no figure is given")
    return {
        "us_each": 1e6 * min(each) / len(texts),
        "us_tensor": 1e6 * min(whole) / len(texts),
        "computed_of_three": computed,
    }
