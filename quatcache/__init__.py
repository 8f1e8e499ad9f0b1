"""quatcache: the frozen-encoder embedding cache for fine-tuning in PyTorch Lightning.

A frozen encoder gives the same vector for the same item, so nobody should pay for it twice. Subclass
:class:`TrainableModel`, return a :class:`CacheConfig` from ``configure_caches()``, and call plain ``trainer.fit``.

Every name resolves on first use: ``import quatcache`` loads neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quatcache.data import CachedDataset, SimilarityGroupSample, SimilarityPairSample
    from quatcache.embedding_cache import EmbeddingCache, EmbeddingCacheStats
    from quatcache.encoders import Encoder
    from quatcache.errors import BatchFunctionError, QuatcacheError
    from quatcache.memoize import cache_batch_variable, memoize_batch
    from quatcache.sequences import PaddedSequences
    from quatcache.servable import ServableModel
    from quatcache.store import SharedCache
    from quatcache.training import CacheCallback, CacheConfig, CacheReport, CacheType, TrainableModel

__all__ = [
    "BatchFunctionError",
    "CacheCallback",
    "CacheConfig",
    "CacheReport",
    "CacheType",
    "CachedDataset",
    "EmbeddingCache",
    "EmbeddingCacheStats",
    "Encoder",
    "PaddedSequences",
    "QuatcacheError",
    "ServableModel",
    "SharedCache",
    "SimilarityGroupSample",
    "SimilarityPairSample",
    "TrainableModel",
    "__version__",
    "cache_batch_variable",
    "memoize_batch",
]

__version__ = "0.1.0"

_HOMES = {
    "BatchFunctionError": "quatcache.errors",
    "CacheCallback": "quatcache.training",
    "CacheConfig": "quatcache.training",
    "CacheReport": "quatcache.training",
    "CacheType": "quatcache.training",
    "CachedDataset": "quatcache.data",
    "EmbeddingCache": "quatcache.embedding_cache",
    "EmbeddingCacheStats": "quatcache.embedding_cache",
    "Encoder": "quatcache.encoders",
    "PaddedSequences": "quatcache.sequences",
    "QuatcacheError": "quatcache.errors",
    "ServableModel": "quatcache.servable",
    "SharedCache": "quatcache.store",
    "SimilarityGroupSample": "quatcache.data",
    "SimilarityPairSample": "quatcache.data",
    "TrainableModel": "quatcache.training",
    "cache_batch_variable": "quatcache.memoize",
    "memoize_batch": "quatcache.memoize",
}


def __getattr__(name: str) -> Any:
    """Import what defines a public name, the first time it is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
