"""Which entries leave when room is needed: one keep-score, leaves before parents.

Invariants: an entry with a resident child is never a victim, since a chain is read from its head
and a tail without its head is of no use; each operation costs O(log n), amortized; equal scores
leave in the order of their arrival. A child counts only one depth below its parent, so no
input can make a ring of entries that protect each other for ever.

Source of the score: GreedyDual-Size-Frequency (L. Cherkasova, "Improving WWW proxies performance
with Greedy-Dual-Size-Frequency caching policy", HP Labs 1998-69), with a class floor added.
Rejected: second-touch admission (it loses the one reuse that most reused blocks get) and frequency
without aging (measured worse than LRU on conversation traces at middle sizes).
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from headrace.types import Band

Key = tuple[str, bytes]

FLOORS: Mapping[Band, float] = {Band.INTERACTIVE: 4.0, Band.STANDARD: 1.0, Band.BATCH: 0.0}
"""Head start of a class, in turnovers of the cache that an unused entry outlives."""

WORTH_MAX = 64.0
"""Turnovers that use and cost together may earn: nothing stays for ever without being used."""

TOKEN_MS_DEFAULT = 1.0
"""What a token is taken to cost where nobody measured."""

HEAP_SLACK = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What the policy is told of an entry.

    `size_bytes` is what it takes from the budget. `parent` is the hash before it, of the same kind,
    at `depth - 1`; empty for none. `cost_ms` of 0 means not measured.
    """

    size_bytes: int
    band: Band
    parent: bytes = b""
    depth: int = 0
    cost_tokens: int = 0
    cost_ms: float = 0.0

    @property
    def recompute_us(self) -> int:
        """Microseconds to compute it again; 0 only if nothing is known."""
        return math.ceil(1000 * (self.cost_ms or self.cost_tokens * TOKEN_MS_DEFAULT))


@dataclass(frozen=True, slots=True)
class Victim:
    """An entry that has to leave, and why it rather than another."""

    key: Key
    size_bytes: int
    score: float
    reason: str


class EvictionPolicy(Protocol):
    """Decides who leaves. It holds facts, never bytes; the store tells it all and obeys."""

    def admit(self, key: Key, facts: Facts, now_ms: int) -> None:
        """A new entry came in. It may be a victim at once: then it was worth less than the rest."""
        ...

    def touch(self, key: Key, now_ms: int, band: Band | None = None) -> None:
        """A resident entry was used, by a request of `band` if that is known."""
        ...

    def remove(self, key: Key) -> None:
        """A resident entry left for a reason of its own, not as a victim."""
        ...

    def victims(self, size_bytes: int, now_ms: int) -> list[Victim]:
        """Take out entries until at least `size_bytes` are free, or all are out; in order."""
        ...

    def check_integrity(self) -> None:
        """Assert that all indexes agree."""
        ...


@dataclass(slots=True)
class _Resident:
    key: Key
    facts: Facts
    sequence: int
    used_ms: int
    band: Band
    uses: int = 1
    score: float = 0.0


class LeafFirst(ABC):
    """What policies that rank by one score share: the chains, and a heap with lazy invalidation.

    A heap item is valid while its entry is resident, childless and of the same score; all others
    are skipped when they surface, and swept out once they are the majority.
    """

    def __init__(self) -> None:
        self._residents: dict[Key, _Resident] = {}
        # children by (kind, parent's hash) and parent's depth, whether or not the parent is here
        self._children: dict[tuple[Key, int], int] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._arrivals = 0
        self._aging = 0.0
        # of those whose cost is known; whole numbers, so that no rounding error adds up
        self._cost_us = 0
        self._cost_bytes = 0

    @abstractmethod
    def _score(self, entry: _Resident) -> float:
        """What `entry` is worth keeping, as of this use of it."""

    def _account(self, facts: Facts, sign: int) -> None:
        if facts.recompute_us:
            self._cost_us += sign * facts.recompute_us
            self._cost_bytes += sign * facts.size_bytes

    def admit(self, key: Key, facts: Facts, now_ms: int) -> None:
        assert key not in self._residents, "an entry is admitted once"
        self._arrivals += 1
        entry = _Resident(key, facts, self._arrivals, now_ms, facts.band)
        self._residents[key] = entry
        link = _parent_of(key, facts)
        if link is not None:
            self._children[link] = self._children.get(link, 0) + 1
        self._account(facts, 1)
        self._rank(entry)

    def touch(self, key: Key, now_ms: int, band: Band | None = None) -> None:
        entry = self._residents[key]
        entry.uses += 1
        entry.used_ms = now_ms
        if band is not None:
            entry.band = min(entry.band, band)
        self._rank(entry)

    def remove(self, key: Key) -> None:
        entry = self._residents.pop(key)
        self._account(entry.facts, -1)
        link = _parent_of(key, entry.facts)
        if link is None:
            return
        self._children[link] -= 1
        if self._children[link] == 0:
            del self._children[link]
            parent = self._residents.get(link[0])
            if parent is not None and self._is_leaf(parent):
                self._push(parent)

    def victims(self, size_bytes: int, now_ms: int) -> list[Victim]:
        chosen: list[Victim] = []
        freed_bytes = 0
        while freed_bytes < size_bytes and self._residents:
            entry = self._pop()
            self._aging = max(self._aging, entry.score)
            self.remove(entry.key)
            freed_bytes += entry.facts.size_bytes
            chosen.append(
                Victim(entry.key, entry.facts.size_bytes, entry.score, _reason(entry, now_ms))
            )
        return chosen

    def _is_leaf(self, entry: _Resident) -> bool:
        return (entry.key, entry.facts.depth) not in self._children

    def _rank(self, entry: _Resident) -> None:
        entry.score = self._score(entry)
        if self._is_leaf(entry):
            self._push(entry)

    def _push(self, entry: _Resident) -> None:
        heapq.heappush(self._heap, (entry.score, entry.sequence, entry.key))
        if len(self._heap) > 2 * len(self._residents) + HEAP_SLACK:
            # a set: an entry may stand in the heap twice with one score
            self._heap = sorted({item for item in self._heap if self._valid(item)})

    def _valid(self, item: tuple[float, int, Key]) -> bool:
        score, sequence, key = item
        entry = self._residents.get(key)
        return (
            entry is not None
            and entry.sequence == sequence
            and entry.score == score
            and self._is_leaf(entry)
        )

    def _pop(self) -> _Resident:
        while True:
            assert self._heap, "where entries are, one of them is a leaf"
            item = heapq.heappop(self._heap)
            if self._valid(item):
                return self._residents[item[2]]

    def check_integrity(self) -> None:
        children: dict[tuple[Key, int], int] = {}
        for entry in self._residents.values():
            link = _parent_of(entry.key, entry.facts)
            if link is not None:
                children[link] = children.get(link, 0) + 1
        assert children == self._children, "children are counted as they are"
        valid = {item[2] for item in self._heap if self._valid(item)}
        leaves = {entry.key for entry in self._residents.values() if self._is_leaf(entry)}
        assert valid == leaves, "the heap ranks the leaves, all of them and no other"
        costs = [e.facts for e in self._residents.values() if e.facts.recompute_us]
        assert self._cost_us == sum(facts.recompute_us for facts in costs), "costs add up"
        assert self._cost_bytes == sum(facts.size_bytes for facts in costs), "sizes add up"
        assert len(self._heap) <= 2 * len(self._residents) + HEAP_SLACK + 1, "the heap is swept"


def _parent_of(key: Key, facts: Facts) -> tuple[Key, int] | None:
    return ((key[0], facts.parent), facts.depth - 1) if facts.parent and facts.depth else None


def _reason(entry: _Resident, now_ms: int) -> str:
    return (
        f"lowest keep-score {entry.score:.3f} among leaves: {entry.band.label}, "
        f"used {entry.uses}x, idle {now_ms - entry.used_ms} ms, "
        f"{entry.facts.recompute_us / 1000:g} ms to recompute {entry.facts.size_bytes} bytes"
    )


class KeepScore(LeafFirst):
    """keep-score = class floor + L + uses x recompute cost / bytes.

    L is the highest score evicted so far: what came or was used later starts above it. Cost per
    byte is taken relative to that of all residents together, so that the average entry is worth 1,
    whatever the model and machine, and floors mean the same everywhere. An entry without a cost
    counts as average.
    """

    def _score(self, entry: _Resident) -> float:
        facts, worth = entry.facts, 1.0
        if facts.recompute_us:
            usual = self._cost_us / self._cost_bytes
            worth = facts.recompute_us / facts.size_bytes / usual
        return FLOORS[entry.band] + self._aging + min(entry.uses * worth, WORTH_MAX)


class LeastRecentlyUsed(LeafFirst):
    """Plain LRU among leaves, for comparison: the score is the number of the last use."""

    def __init__(self) -> None:
        super().__init__()
        self._uses = 0

    def _score(self, entry: _Resident) -> float:  # noqa: ARG002  # recency asks nothing of the entry
        self._uses += 1
        return float(self._uses)


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "keep-score": KeepScore,
    "lru": LeastRecentlyUsed,
}
"""By the name that settings use."""
