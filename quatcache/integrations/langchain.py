"""Embeddings for LangChain that come from the cache."""

from __future__ import annotations

from quatcache.embedding_cache import EmbeddingCache, require_cache
from quatcache.errors import MissingDependencyError

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise MissingDependencyError("langchain-core is not installed: pip install 'quatcache[langchain]'") from error

__all__ = ["CachedEmbeddings"]


class CachedEmbeddings(Embeddings):
    """LangChain's interface to one cache for documents, and perhaps another one for queries.

    Queries are cached too. Any other ``Embeddings`` can be cached by its function:
    ``EmbeddingCache(other.embed_documents, save_dir, identity="its model, a version")``.

    Args:
        documents: Encodes documents.
        queries: Encodes queries, where the encoder has a role or prompt of their own for them:
            ``EmbeddingCache(SentenceTransformerEncoder(model, role="query"), save_dir)``. None: as documents.
        batch_size: Texts per encoder call, at most.

    Raises:
        ConfigError: One of them is no EmbeddingCache.

    Example:
        >>> embeddings = CachedEmbeddings(EmbeddingCache(lambda texts: [[float(len(text))] for text in texts]))
        >>> embeddings.embed_documents(["oak", "maple"]), embeddings.embed_query("oak")
        ([[3.0], [5.0]], [3.0])
    """

    def __init__(self, documents: EmbeddingCache, queries: EmbeddingCache | None = None, batch_size: int = 32) -> None:
        self.documents = require_cache(documents, "documents")
        self.queries = self.documents if queries is None else require_cache(queries, "queries")
        self.batch_size = batch_size

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Give the vectors of documents.

        Args:
            texts: N texts.

        Returns:
            N lists of D numbers.
        """
        rows = self.documents.encode(texts, self.batch_size, convert_to_numpy=True)  # which refuses sequences
        return rows.tolist()  # type: ignore[no-any-return]

    def embed_query(self, text: str) -> list[float]:
        """Give the vector of a query.

        Args:
            text: The query.

        Returns:
            D numbers.
        """
        rows = self.queries.encode([text], self.batch_size, convert_to_numpy=True)
        return rows[0].tolist()  # type: ignore[no-any-return]
