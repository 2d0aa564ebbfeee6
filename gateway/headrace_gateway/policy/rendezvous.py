"""Which workers a key prefers, in order: rendezvous hashing, kept per bucket of keys.

Invariant: the order depends on the key and the set of names alone, so every gateway agrees on it;
a name that comes or goes changes nothing in the order of the others, so it moves its own share of
the keys and no more. Keys fall into BUCKETS buckets, and the highest weights of a bucket are found
once and kept until the set changes: a decision costs a look-up instead of a weight for each of 500
workers. The weights are products of two 64-bit hashes modulo 2^64 (multiply-shift), since a real
hash for each pair would cost half a millisecond.
Source: Thaler and Ravishankar, "A name-based mapping scheme for rendezvous", 1996; Dietzfelbinger
et al. 1997 (multiply-shift). Rejected: a hash ring, which needs many points a worker to be even;
rendezvous over groups of workers, then within one, which moves twice the keys it has to.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from struct import Struct

from headrace.policy.hashing import hash64

BUCKETS = 1 << 12
"""Each of 500 workers has 8 of them, give or take 3, which bounds on load make even; a power of
two."""
PREFERRED = 4
"""Names kept for a bucket: beyond them the least loaded is as good."""


class Rendezvous:
    """The preferred names of any key."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._seeds = 0
        self._lanes = Struct("<")
        self._orders: dict[int, tuple[str, ...]] = {}

    def set_names(self, names: Sequence[str]) -> None:
        """Replace the set; what stays the same costs nothing."""
        ordered = sorted(names)
        if ordered != self._names:
            self._names = ordered
            seeds = [hash64(name.encode()) for name in ordered]
            self._seeds = int.from_bytes(
                b"".join(seed.to_bytes(16, "little") for seed in seeds), "little"
            )
            self._lanes = Struct(f"<{2 * len(ordered)}Q")
            self._orders.clear()

    def preferred(self, key: bytes) -> tuple[str, ...]:
        """At most PREFERRED names in the key's own order; equal weights by name."""
        bucket = hash64(key) & (BUCKETS - 1)
        order = self._orders.get(bucket)
        if order is None:
            order = self._orders[bucket] = self._order(bucket)
        return order

    def _order(self, bucket: int) -> tuple[str, ...]:
        multiplier = hash64(bucket.to_bytes(8)) | 1
        # one product of all seeds, 128 bits apart, takes a fifth of the time of one for each
        products = (self._seeds * multiplier).to_bytes(self._lanes.size, "little")
        weights = list(self._lanes.unpack(products)[::2])
        best = []
        for weight in heapq.nlargest(PREFERRED, weights):
            first = weights.index(weight)
            weights[first] = -1
            best.append(self._names[first])
        return tuple(best)
