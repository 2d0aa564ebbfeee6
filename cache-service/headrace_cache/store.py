"""Entries by key within a byte budget, in RAM.

Invariant: what all entries are charged (their bytes and ENTRY_OVERHEAD_BYTES each) never exceeds
the budget, not even between two steps of a put: room is made first. Which entries leave is the
policy's decision alone. Bytes once stored are never changed, so that a reader may still be
sending them when their entry is evicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from headrace.checksum import checksum
from headrace.frames import EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.index import Index, Record, Tier
from headrace_cache.policy.eviction import NO_SLOT, EvictionPolicy, Victim

ENTRY_OVERHEAD_BYTES = 1024
"""Charged beside an entry's bytes: about what its key, facts and places in the indexes take."""

TOKEN_MS_DEFAULT = 1.0
"""What a token is taken to cost where nobody measured."""


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
        self._index = Index()
        self._entries: dict[int, Stored] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: EntryKey) -> bool:
        return self._index.find(key) != NO_SLOT

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
            slot = self._index.find(key)
            if slot == NO_SLOT:
                self._kind(key).misses += len(keys) - len(found)
                break
            stored = self._entries[slot]
            if size_bytes + stored.facts.size_bytes > limit_bytes:
                more = True
                break
            self._policy.touch(slot, now_ms, band)
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
        slot = self._index.find(facts.key)
        if slot != NO_SLOT:
            self._use_again(slot, facts, now_ms)
            return Outcome.PRESENT
        tenant = self._index.tenant_name(self._index.tenant(facts.tenant))
        self.by_tenant.setdefault(tenant, Tally())
        if not self.can_hold(facts):
            return self._refuse(facts.key, tenant, Outcome.TOO_LARGE)
        if data is None:
            return self._refuse(facts.key, tenant, Outcome.SKIPPED)
        slot = self._index.enter(facts.key, self._record(facts), Tier.RAM)
        if not self._make_room(slot, facts, now_ms):
            return self._refuse(facts.key, tenant, Outcome.OUTRANKED)
        self._entries[slot] = Stored(facts, data, tenant)
        self.used_bytes += charged_bytes(facts)
        for tally in (self._kind(facts.key), self.by_tenant[tenant]):
            tally.entries += 1
            tally.bytes += facts.size_bytes
            tally.kept += 1
        return Outcome.KEPT

    def _use_again(self, slot: int, facts: EntryFacts, now_ms: int) -> None:
        self._policy.touch(slot, now_ms, facts.band)
        self._kind(facts.key).present += 1
        self.by_tenant[self._entries[slot].tenant].present += 1

    def verify(self, key: EntryKey) -> bool:
        """Whether the entry was corrupt, and is gone now. Takes 0.2 ms a MB."""
        slot = self._index.find(key)
        if slot == NO_SLOT:
            return False
        stored = self._entries[slot]
        if checksum(stored.data) == stored.facts.crc:
            return False
        self._policy.remove(slot)
        self._forget(slot, stored)
        self._kind(key).corrupt += 1
        self.by_tenant[stored.tenant].corrupt += 1
        return True

    def _make_room(self, slot: int, facts: EntryFacts, now_ms: int) -> bool:
        """Room for `slot`, which the policy knows of then; False if it is worth less than all."""
        self._policy.admit(slot, self._index.facts(slot, charged_bytes(facts)), now_ms)
        missing_bytes = self.used_bytes + charged_bytes(facts) - self.budget_bytes
        victims = self._policy.victims(missing_bytes, now_ms) if missing_bytes > 0 else []
        for victim in victims:
            if victim.slot != slot:
                self._evict(victim)
        if all(victim.slot != slot for victim in victims):
            return True
        self._index.leave(slot, Tier.RAM)
        return False

    def _evict(self, victim: Victim) -> None:
        stored = self._entries[victim.slot]
        self._forget(victim.slot, stored)
        self._kind(stored.facts.key).evictions += 1
        self.by_tenant[stored.tenant].evictions += 1

    def _forget(self, slot: int, stored: Stored) -> None:
        self._index.leave(slot, Tier.RAM)
        del self._entries[slot]
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

    def _record(self, facts: EntryFacts) -> Record:
        cost_ms = facts.cost_ms or facts.cost_tokens * TOKEN_MS_DEFAULT
        return Record(
            parent=facts.parent,
            depth=facts.depth,
            size_bytes=facts.size_bytes,
            crc=facts.crc,
            band=facts.band,
            tenant=self._index.tenant(facts.tenant),
            cost_us=math.ceil(1000 * cost_ms),
        )

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
        assert self._index.counts[Tier.RAM] == len(self._entries), "index and bytes agree"
        self._index.check_integrity()
        self._policy.check_integrity()
