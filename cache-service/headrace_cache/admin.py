"""What an administrator asks, done to the store.

Invariant: a request that names a tenant reads and changes that tenant's entries only, and what it
is answered does not tell whether another tenant's exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.cache_admin import (
    CROSSINGS_MAX,
    Answer,
    Changed,
    EntryInfo,
    Listed,
    ListEntries,
    Pin,
    Purge,
    ReadStats,
    Refused,
    Request,
    SetQuota,
    Told,
    Trace,
    Traced,
    Unpin,
)
from headrace.frames import EntryFacts, EntryKey
from headrace_cache.policy.lineage import Below, Crossings


@dataclass(frozen=True, slots=True)
class Chosen:
    """Whose entries are meant, of which kind and model; what is empty or None leaves all."""

    tenant: str | None = None
    kind: str | None = None
    model: bytes = b""

    def __call__(self, facts: EntryFacts) -> bool:
        return (
            self.tenant in (None, facts.tenant)
            and self.kind in (None, facts.key.kind)
            and facts.layout.startswith(self.model)
        )


class ManagedStore(Protocol):
    """What the tiers offer for this, as `management.py` defines it."""

    async def entries(
        self, chosen: Chosen, below: Below | None, limit: int, cursor: int, now_ms: int
    ) -> tuple[list[EntryInfo], int]:
        """Up to `limit` entries from `cursor` on, and the cursor behind them, 0 at the end."""
        ...

    async def pin(self, keys: Sequence[EntryKey], until_ms: int, tenant: str | None = None) -> int:
        """Pin those of `keys` that are held, as far as pins may go; how many are pinned now."""
        ...

    async def unpin(self, keys: Sequence[EntryKey], tenant: str | None = None) -> int:
        """End the pins of `keys`; how many of them are held."""
        ...

    async def purge(self, chosen: Chosen, below: Below | None) -> tuple[int, int]:
        """Drop, in every tier, what meets all conditions that are given: entries and bytes."""
        ...

    async def crossings(self, first: bytes) -> Crossings:
        """Where chains go from group to group, and those that lead away from `first`."""
        ...

    async def set_quota(self, tenant: str, max_bytes: int, min_bytes: int) -> str:
        """'' when the quota holds from now on, else why it cannot."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters as nested maps of numbers; `by_tenant` has a map for each tenant."""
        ...


async def manage(store: ManagedStore, request: Request, now_ms: int) -> Answer:
    """Do what `request` says. `now_ms` is on the store's clock."""
    match request:
        case ListEntries(tenant, kind, prefix, limit, cursor, groups):
            chosen, below = Chosen(tenant, kind), _below(prefix, groups)
            found, next_cursor = await store.entries(chosen, below, limit, cursor, now_ms)
            return Listed(tuple(found), next_cursor)
        case Pin(keys, ttl_ms, tenant):
            return Changed(await store.pin(keys, now_ms + ttl_ms, tenant))
        case Unpin(keys, tenant):
            return Changed(await store.unpin(keys, tenant))
        case Purge(tenant, prefix, model, groups):
            chosen = Chosen(tenant, model=model)
            return Changed(*await store.purge(chosen, _below(prefix, groups)))
        case Trace(prefix):
            return _traced(await store.crossings(prefix))
        case SetQuota(tenant, max_bytes, min_bytes):
            refusal = await store.set_quota(tenant, max_bytes, min_bytes)
            return Refused(refusal) if refusal else Changed(0)
        case ReadStats(tenant):
            return Told(_stats_for(store.stats(), tenant))


def _below(prefix: bytes, groups: Sequence[bytes]) -> Below | None:
    return Below(prefix, frozenset(groups)) if prefix or groups else None


def _traced(found: Crossings) -> Answer:
    if max(len(found.heads), len(found.ends)) > CROSSINGS_MAX:
        return Refused(
            f"more than {CROSSINGS_MAX} chains are long: ask by tenant or model, not by prefix"
        )
    return Traced(tuple(found.heads), tuple(found.ends))


def _stats_for(values: dict[str, Any], tenant: str | None) -> dict[str, Any]:
    """All of `values`, or what concerns `tenant` alone."""
    if tenant is None:
        return values
    own = {
        name: {tenant: values[name][tenant]} if tenant in values.get(name, {}) else {}
        for name in ("by_tenant", "quotas")
    }
    return {name: rows for name, rows in own.items() if name in values}
