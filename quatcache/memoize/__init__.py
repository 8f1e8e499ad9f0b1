"""Batch functions that compute each item once: decorators, without Lightning and without an encoder."""

from quatcache.memoize.batch_function import BatchFunction, cache_batch_variable, memoize_batch
from quatcache.memoize.bounds import CacheInfo

__all__ = ["BatchFunction", "CacheInfo", "cache_batch_variable", "memoize_batch"]
