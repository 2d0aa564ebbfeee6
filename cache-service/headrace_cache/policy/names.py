"""Policies by the name that settings use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headrace_cache.policy.classic import (
    FirstInFirstOut,
    GreedyDualSizeFrequency,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
)
from headrace_cache.policy.eviction import EvictionPolicy
from headrace_cache.policy.keep_score import KeepScore
from headrace_cache.policy.s3_fifo import S3Fifo
from headrace_cache.policy.sieve import Sieve

POLICIES: Mapping[str, Callable[[int | None], EvictionPolicy]] = {
    "keep-score": KeepScore,
    "fifo": FirstInFirstOut,
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "gdsf": GreedyDualSizeFrequency,
    "sieve": Sieve,
    "s3-fifo": S3Fifo,
}
"""Each takes the bytes that pins may hold, None for no limit."""
