"""Sequence state: `KVCache`, and what it stores for a layer."""

from dsv4.cache.cache import KVCache, Step
from dsv4.cache.layer import BLOCK, LayerCache, cache_bytes, entries_per_page

__all__ = ["BLOCK", "KVCache", "LayerCache", "Step", "cache_bytes", "entries_per_page"]
