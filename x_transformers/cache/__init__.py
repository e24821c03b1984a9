"""Key/value caches for cached decoding."""

from x_transformers.cache.entries import Entry, Shape, StaticEntry
from x_transformers.cache.kv_cache import CacheHeader, KVCache, Reach
from x_transformers.cache.static import StaticCache

__all__ = ["CacheHeader", "Entry", "KVCache", "Reach", "Shape", "StaticCache", "StaticEntry"]
