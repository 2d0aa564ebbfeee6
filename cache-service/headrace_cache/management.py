"""What administrators may do with the entries: list, pin, purge, by tenant and by prefix.

Invariant: a call that names a tenant sees and changes that tenant's entries only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headrace.cache_admin import IN_RAM, EntryInfo
from headrace.frames import EntryKey
from headrace_cache.index import Tier
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED
from headrace_cache.store import Store

SCAN_MAX = 100_000
"""Slots looked at for one page of a list: some 50 ms."""


class Management:
    """The store, as `admin.py` wants it."""

    def __init__(self, store: Store) -> None:
        self._store = store

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
        index = self._store.index
        found: list[EntryInfo] = []
        inside: dict[int, bool] = {}
        for looked, slot in enumerate(index.entries(cursor, Tier.RAM)):
            if len(found) == limit or looked == SCAN_MAX:
                return found, slot
            wanted = self._owned(slot, tenant) and kind in (None, index.key(slot).kind)
            if wanted and (not prefix or self._follows(slot, prefix, inside)):
                found.append(self._info(slot, now_ms))
        return found, 0

    def _owned(self, slot: int, tenant: str | None) -> bool:
        index = self._store.index
        return tenant is None or index.tenant_name(index.tenant_of[slot]) == tenant

    def _follows(self, slot: int, prefix: bytes, inside: dict[int, bool]) -> bool:
        """Whether `slot` is the entry of hash `prefix`, or comes after it in a chain.

        `inside` remembers what was found, so that a chain is walked once.
        """
        index = self._store.index
        walked: list[int] = []
        answer = False
        while slot != NO_SLOT:
            if slot in inside:
                answer = inside[slot]
                break
            walked.append(slot)
            if index.key(slot).hash == prefix:
                answer = True
                break
            slot = index.parent[slot]
        inside.update(dict.fromkeys(walked, answer))
        return answer

    def _info(self, slot: int, now_ms: int) -> EntryInfo:
        facts = self._store.facts(slot)
        until_ms = self._store.pinned_until_ms(slot)
        pin_ms = 0 if until_ms == NOT_PINNED else max(0, until_ms - now_ms)
        return EntryInfo(
            facts.key, facts.parent, facts.depth, facts.size_bytes, facts.tenant, facts.band,
            IN_RAM, pin_ms, facts.layout,
        )  # fmt: skip

    def _held(self, keys: Sequence[EntryKey], tenant: str | None) -> Iterator[int]:
        for key in keys:
            slot = self._store.index.find(key, Tier.RAM)
            if slot != NO_SLOT and self._owned(slot, tenant):
                yield slot

    def pin(self, keys: Sequence[EntryKey], until_ms: int, tenant: str | None = None) -> int:
        """Pin those of `keys` that are held, as far as pins may go; how many are pinned now."""
        return sum(self._store.pin(slot, until_ms) for slot in self._held(keys, tenant))

    def unpin(self, keys: Sequence[EntryKey], tenant: str | None = None) -> int:
        """End the pins of `keys`; how many of them are held."""
        slots = list(self._held(keys, tenant))
        for slot in slots:
            self._store.unpin(slot)
        return len(slots)

    def purge(
        self, tenant: str | None = None, prefix: bytes = b"", model: bytes = b""
    ) -> tuple[int, int]:
        """Drop, in every tier, what meets all conditions that are given: entries and bytes."""
        index = self._store.index
        inside: dict[int, bool] = {}
        doomed = [
            slot
            for slot in index.entries(0, Tier.RAM)
            if self._owned(slot, tenant)
            and self._store.facts(slot).layout.startswith(model)
            and (not prefix or self._follows(slot, prefix, inside))
        ]
        size_bytes = sum(index.size_bytes[slot] for slot in doomed)
        for slot in doomed:
            self._store.drop(slot)
        return len(doomed), size_bytes

    def set_quota(self, tenant: str, max_bytes: int, min_bytes: int) -> str:
        """'' when the quota holds from now on, else why it cannot."""
        del tenant, max_bytes, min_bytes
        return "this service has no quotas"

    def stats(self) -> dict[str, Any]:
        """Counters as nested maps of numbers; `by_tenant` has a map for each tenant."""
        return self._store.stats()
