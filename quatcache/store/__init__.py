"""Stores: keys to values, in a bounded mapping, in the memory of a device or of a host, or in memory-mapped shards."""

from quatcache.store.budget import BudgetStore
from quatcache.store.directory import CacheDirectory, environment
from quatcache.store.disk import DiskStore
from quatcache.store.known import KnownModels
from quatcache.store.locked import LockedStore
from quatcache.store.memory import MemoryStore
from quatcache.store.protocol import Found, Positions, RowStore, Store
from quatcache.store.safetensors_writer import DTYPES
from quatcache.store.shared import SharedCache
from quatcache.store.tables import DatasetTable
from quatcache.store.tensor import TensorStore

__all__ = [
    "DTYPES",
    "BudgetStore",
    "CacheDirectory",
    "DatasetTable",
    "DiskStore",
    "Found",
    "KnownModels",
    "LockedStore",
    "MemoryStore",
    "Positions",
    "RowStore",
    "SharedCache",
    "Store",
    "TensorStore",
    "environment",
]
