"""What an administrator asks, done to the store.

Invariant: a request that names a tenant reads and changes that tenant's entries only, and what it
is answered does not tell whether another tenant's exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from headrace.cache_admin import (
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
    Unpin,
)
from headrace.frames import EntryKey


class ManagedStore(Protocol):
    """What the store offers for this; a `tenant` of None means everybody's entries."""

    def entries(
        self,
        tenant: str | None,
        kind: str | None,
        prefix: bytes,
        limit: int,
        cursor: int,
        now_ms: int,
    ) -> tuple[list[EntryInfo], int]:
        """Up to `limit` entries from `cursor` on, and the cursor behind them, 0 at the end.

        `prefix` is an entry's hash: it and its descendants; empty: all.
        """
        ...

    def pin(self, keys: Sequence[EntryKey], until_ms: int, tenant: str | None = None) -> int:
        """Pin those of `keys` that are held, as far as pins may go; how many are pinned now."""
        ...

    def unpin(self, keys: Sequence[EntryKey], tenant: str | None = None) -> int:
        """End the pins of `keys`; how many of them are held."""
        ...

    def purge(
        self, tenant: str | None = None, prefix: bytes = b"", model: bytes = b""
    ) -> tuple[int, int]:
        """Drop, in every tier, what meets all conditions that are given: entries and bytes."""
        ...

    def set_quota(self, tenant: str, max_bytes: int, min_bytes: int) -> str:
        """'' when the quota holds from now on, else why it cannot."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters as nested maps of numbers; `by_tenant` has a map for each tenant."""
        ...


def manage(store: ManagedStore, request: Request, now_ms: int) -> Answer:
    """Do what `request` says. `now_ms` is on the store's clock."""
    match request:
        case ListEntries(tenant, kind, prefix, limit, cursor):
            found, next_cursor = store.entries(tenant, kind, prefix, limit, cursor, now_ms)
            return Listed(tuple(found), next_cursor)
        case Pin(keys, ttl_ms, tenant):
            return Changed(store.pin(keys, now_ms + ttl_ms, tenant))
        case Unpin(keys, tenant):
            return Changed(store.unpin(keys, tenant))
        case Purge(tenant, prefix, model):
            return Changed(*store.purge(tenant, prefix, model))
        case SetQuota(tenant, max_bytes, min_bytes):
            refusal = store.set_quota(tenant, max_bytes, min_bytes)
            return Refused(refusal) if refusal else Changed(0)
        case ReadStats(tenant):
            return Told(_stats_for(store.stats(), tenant))


def _stats_for(values: dict[str, Any], tenant: str | None) -> dict[str, Any]:
    """All of `values`, or what concerns `tenant` alone."""
    if tenant is None:
        return values
    own = {
        name: {tenant: values[name][tenant]} if tenant in values.get(name, {}) else {}
        for name in ("by_tenant", "quotas")
    }
    return {name: rows for name, rows in own.items() if name in values}
