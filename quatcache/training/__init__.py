"""Fine-tuning with Lightning: the model to subclass, the cache config, and the callback."""

from quatcache.training.callback import CacheCallback
from quatcache.training.config import CacheConfig, CacheType
from quatcache.training.messages import show_messages
from quatcache.training.module import TrainableModel
from quatcache.training.report import CacheReport, EncoderReport

__all__ = ["CacheCallback", "CacheConfig", "CacheReport", "CacheType", "EncoderReport", "TrainableModel"]

show_messages()
