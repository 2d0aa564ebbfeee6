"""Entries by key within a byte budget, in RAM.

Invariant: what all entries are charged (their bytes and ENTRY_OVERHEAD_BYTES each) never exceeds
the budget, not even between two steps of a put: room is made first. Which entries leave is the
policy's decision alone. Bytes once stored are never changed, so that a reader may still be
sending them when their entry is evicted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from headrace.frames import EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.policy.eviction import EvictionPolicy, Facts, Key, Victim

ENTRY_OVERHEAD_BYTES = 1024
"""Charged beside an entry's bytes: about what its key, facts and places in the indexes take."""

TENANTS_MAX = 256
OTHER_TENANTS = "(others)"


class Outcome(StrEnum):
    """What became of an entry that was put."""

    KEPT = "kept"
    PRESENT = "present"
    TOO_LARGE = "too_large"
    OUTRANKED = "outranked"
    SKIPPED = "skipped"


@dataclass(slots=True)
class Tally:
    """Counters of one kind or one tenant; `entries` and `bytes` are what is resident now."""

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    kept: int = 0
    present: int = 0
    refused: int = 0
    evictions: int = 0
    corrupt: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry: what its put said, its bytes, and the name its tenant is counted under."""

    facts: EntryFacts
    data: memoryview
    tenant: str

    @property
    def charged_bytes(self) -> int:
        return charged_bytes(self.facts)


def charged_bytes(facts: EntryFacts) -> int:
    """What an entry takes from the budget."""
    return facts.size_bytes + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Run:
    """The leading run found for a list of keys; `more`: cut short by the caller's limit."""

    entries: list[Stored] = field(default_factory=list)
    bytes: int = 0
    more: bool = False


class Store:
    """Bytes by key. One thread calls it; nothing here waits."""

    def __init__(self, budget_bytes: int, policy: EvictionPolicy) -> None:
        assert budget_bytes > 0, "settings see to a budget"
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.by_kind: dict[str, Tally] = {}
        self.by_tenant: dict[str, Tally] = {}
        self._policy = policy
        self._entries: dict[Key, Stored] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: EntryKey) -> bool:
        return key in self._entries

    def can_hold(self, facts: EntryFacts) -> bool:
        """Whether the entry fits at all, were the store empty."""
        return charged_bytes(facts) <= self.budget_bytes

    def get_run(
        self, keys: Sequence[EntryKey], now_ms: int, limit_bytes: int, band: Band | None = None
    ) -> Run:
        """The entries of `keys` up to the first that is missing, at most `limit_bytes` of them."""
        found: list[Stored] = []
        size_bytes = 0
        more = False
        for key in keys:
            stored = self._entries.get(key)
            if stored is None:
                self._kind(key).misses += len(keys) - len(found)
                break
            if size_bytes + stored.facts.size_bytes > limit_bytes:
                more = True
                break
            self._policy.touch(key, now_ms, band)
            self._kind(key).hits += 1
            self.by_tenant[stored.tenant].hits += 1
            size_bytes += stored.facts.size_bytes
            found.append(stored)
        return Run(found, size_bytes, more)

    def put(self, facts: EntryFacts, data: memoryview | None, now_ms: int) -> Outcome:
        """Take an entry in, making room first. `data` belongs to the store from here on.

        Without `data` (its bytes were skipped, as the entry was there or the service was busy)
        this counts as a use of an entry that is there, and as a refusal of any other.
        """
        assert data is None or len(data) == facts.size_bytes, "the frame was checked"
        if facts.key in self._entries:
            self._use_again(facts, now_ms)
            return Outcome.PRESENT
        tenant = self._tenant_label(facts.tenant)
        if not self.can_hold(facts):
            return self._refuse(facts.key, tenant, Outcome.TOO_LARGE)
        if data is None:
            return self._refuse(facts.key, tenant, Outcome.SKIPPED)
        if not self._make_room(facts, now_ms):
            return self._refuse(facts.key, tenant, Outcome.OUTRANKED)
        self._entries[facts.key] = Stored(facts, data, tenant)
        self.used_bytes += charged_bytes(facts)
        for tally in (self._kind(facts.key), self.by_tenant[tenant]):
            tally.entries += 1
            tally.bytes += facts.size_bytes
            tally.kept += 1
        return Outcome.KEPT

    def _use_again(self, facts: EntryFacts, now_ms: int) -> None:
        self._policy.touch(facts.key, now_ms, facts.band)
        self._kind(facts.key).present += 1
        self.by_tenant[self._entries[facts.key].tenant].present += 1

    def verify(self, key: EntryKey) -> bool:
        """Whether the entry was corrupt, and is gone now. Takes 0.2 ms a MB."""
        stored = self._entries.get(key)
        if stored is None or zlib.crc32(stored.data) == stored.facts.crc:
            return False
        self._policy.remove(key)
        self._forget(stored)
        self._kind(key).corrupt += 1
        self.by_tenant[stored.tenant].corrupt += 1
        return True

    def _make_room(self, facts: EntryFacts, now_ms: int) -> bool:
        """Room for `facts`, which the policy knows of then; False if it is worth less than all."""
        self._policy.admit(facts.key, _policy_facts(facts), now_ms)
        missing_bytes = self.used_bytes + charged_bytes(facts) - self.budget_bytes
        victims = self._policy.victims(missing_bytes, now_ms) if missing_bytes > 0 else []
        outranked = False
        for victim in victims:
            if victim.key == facts.key:
                outranked = True
            else:
                self._evict(victim)
        return not outranked

    def _evict(self, victim: Victim) -> None:
        stored = self._entries[victim.key]
        self._forget(stored)
        self._kind(stored.facts.key).evictions += 1
        self.by_tenant[stored.tenant].evictions += 1

    def _forget(self, stored: Stored) -> None:
        del self._entries[stored.facts.key]
        self.used_bytes -= stored.charged_bytes
        for tally in (self._kind(stored.facts.key), self.by_tenant[stored.tenant]):
            tally.entries -= 1
            tally.bytes -= stored.facts.size_bytes

    def _refuse(self, key: EntryKey, tenant: str, outcome: Outcome) -> Outcome:
        self._kind(key).refused += 1
        self.by_tenant[tenant].refused += 1
        return outcome

    def _kind(self, key: EntryKey) -> Tally:
        return self.by_kind.setdefault(key.kind, Tally())

    def _tenant_label(self, tenant: str) -> str:
        """The name to count `tenant` under, with its tally in place."""
        if tenant not in self.by_tenant and len(self.by_tenant) >= TENANTS_MAX:
            tenant = OTHER_TENANTS
        self.by_tenant.setdefault(tenant, Tally())
        return tenant

    def stats(self) -> dict[str, Any]:
        """Everything counted, as nested maps of numbers; misses have no owner, so no tenant."""
        return {
            "budget_bytes": self.budget_bytes,
            "used_bytes": self.used_bytes,
            "entries": len(self._entries),
            "by_kind": {kind: asdict(tally) for kind, tally in self.by_kind.items()},
            "by_tenant": {tenant: asdict(tally) for tenant, tally in self.by_tenant.items()},
        }

    def check_integrity(self) -> None:
        """Assert that budget, counters, bytes and policy agree. Takes time in all entries."""
        entries = self._entries.values()
        assert self.used_bytes == sum(stored.charged_bytes for stored in entries), "charges add up"
        assert self.used_bytes <= self.budget_bytes, "the budget holds"
        assert all(len(stored.data) == stored.facts.size_bytes for stored in entries)
        for tallies in (self.by_kind, self.by_tenant):
            assert sum(tally.entries for tally in tallies.values()) == len(self._entries)
            size_bytes = sum(stored.facts.size_bytes for stored in entries)
            assert sum(tally.bytes for tally in tallies.values()) == size_bytes
        self._policy.check_integrity()


def _policy_facts(facts: EntryFacts) -> Facts:
    return Facts(
        size_bytes=charged_bytes(facts),
        band=facts.band,
        parent=facts.parent,
        depth=facts.depth,
        cost_tokens=facts.cost_tokens,
        cost_ms=facts.cost_ms,
    )
