"""Samples and batches: what datasets return, and what a training step gets."""

from quatcache.data.batches import Batch
from quatcache.data.cached_dataset import CachedDataset
from quatcache.data.samples import ReadSample, SimilarityGroupSample, SimilarityPairSample, read_sample

__all__ = ["Batch", "CachedDataset", "ReadSample", "SimilarityGroupSample", "SimilarityPairSample", "read_sample"]
