"""LangChain's Embeddings from the cache."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from quatcache import EmbeddingCache
from quatcache.encoders import SentenceTransformerEncoder
from quatcache.errors import ConfigError
from quatcache.integrations.langchain import CachedEmbeddings
from tests.fits import HashingEncoder, texts
from tests.ragged import LettersEncoder
from tests.tiny import write_tiny

TEXTS = texts(20)


def test_documents_and_queries_are_lists_of_numbers_and_encoded_once(tmp_path):
    cached = CachedEmbeddings(EmbeddingCache(HashingEncoder(), tmp_path))
    documents = cached.embed_documents([*TEXTS, TEXTS[0]])
    assert isinstance(cached, Embeddings) and len(documents) == 21 and documents[0] == documents[-1]
    assert all(type(number) is float for row in documents for number in row)
    assert cached.embed_query(TEXTS[3]) == documents[3]
    assert asyncio.run(cached.aembed_query(TEXTS[3])) == documents[3]
    assert asyncio.run(cached.aembed_documents(TEXTS[:2])) == documents[:2]
    assert cached.documents.stats.computed == 20 and cached.embed_documents([]) == []


def test_a_vector_store_searches_with_it():
    store = InMemoryVectorStore(CachedEmbeddings(EmbeddingCache(HashingEncoder())))
    store.add_documents([Document(page_content=text) for text in TEXTS])
    (found,) = store.similarity_search(TEXTS[7], k=1)
    assert found.page_content == TEXTS[7]


def test_queries_may_have_a_role_of_their_own(tmp_path, minilm_path):
    path = write_tiny(tmp_path / "model", minilm_path)
    caches = [EmbeddingCache(SentenceTransformerEncoder(path, role=role)) for role in ("document", "query")]
    cached = CachedEmbeddings(*caches)
    assert cached.embed_query(TEXTS[0]) != pytest.approx(cached.embed_documents([TEXTS[0]])[0])
    assert cached.embed_query(TEXTS[0]) == pytest.approx(caches[1].encode([TEXTS[0]])[0].tolist())


@pytest.mark.parametrize("given", [("model",), (EmbeddingCache(HashingEncoder()), 32)], ids=str)
def test_what_is_no_cache_is_refused(given):
    with pytest.raises(ConfigError, match=r"is ('model'|32); pass EmbeddingCache\(encoder, save_dir=\.\.\.\)"):
        CachedEmbeddings(*given)


def test_sequences_are_refused():
    cached = CachedEmbeddings(EmbeddingCache(LettersEncoder()))
    for call in (lambda: cached.embed_query("oak"), lambda: cached.embed_documents(["oak", "elm"])):
        with pytest.raises(ConfigError, match="the encoder gives sequences of different lengths"):
            call()


def test_other_embeddings_are_cached_by_their_function(tmp_path):
    other = DeterministicFakeEmbedding(size=6)
    for computed in (20, 0):
        cached = CachedEmbeddings(EmbeddingCache(other.embed_documents, tmp_path, identity="fake, 6"))
        rows = cached.embed_documents(TEXTS)
        assert rows[4] == pytest.approx(other.embed_query(TEXTS[4]), abs=1e-6)
        assert cached.documents.stats.computed == computed
