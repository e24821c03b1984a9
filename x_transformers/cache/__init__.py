"""Key/value caches for cached decoding."""

from x_transformers.cache.entries import Entry, Shape, StaticEntry
from x_transformers.cache.kv_cache import NO_PREFIX, CacheHeader, KVCache, Reach
from x_transformers.cache.new_tokens import tokens_to_run
from x_transformers.cache.static import StaticCache

__all__ = [
    "NO_PREFIX",
    "CacheHeader",
    "Entry",
    "KVCache",
    "Reach",
    "Shape",
    "StaticCache",
    "StaticEntry",
    "tokens_to_run",
]
