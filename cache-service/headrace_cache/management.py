"""What administrators may do with the entries: list, pin, purge, by tenant and by prefix.

Invariants: a call that names a tenant sees and changes that tenant's entries only; what it asks of
the disk is done when `settled` returns, which its caller awaits before it answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import structlog

from headrace.cache_admin import IN_RAM, ON_DISK, EntryInfo
from headrace.frames import EntryFacts, EntryKey
from headrace_cache.index import Tier
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED
from headrace_cache.policy.quota import Share
from headrace_cache.tiers import Tiers

SCAN_MAX = 100_000
"""Slots looked at for one page of a list: some 50 ms."""


PASSES_MAX = 16
"""Over the disk, to drop a chain whose children may stand before their parents."""

log = structlog.get_logger(__name__)


class Management:
    """The tiers, as `admin.py` wants them."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._store = tiers.store
        self._disk = tiers.disk
        self._unsettled: list[Future[int]] = []

    async def settled(self) -> None:
        """Wait until the disk has done what was asked of it; what it could not is logged."""
        unsettled, self._unsettled = self._unsettled, []
        for future in unsettled:
            try:
                await asyncio.wrap_future(future)
            except (OSError, RuntimeError) as error:
                log.error("the disk did not do what an administrator asked", reason=str(error))

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
        on_disk = self._disk is not None and self._disk.find(facts.key) is not None
        return EntryInfo(
            facts.key, facts.parent, facts.depth, facts.size_bytes, facts.tenant, facts.band,
            IN_RAM | ON_DISK if on_disk else IN_RAM, pin_ms, facts.layout,
        )  # fmt: skip

    def _held(self, keys: Sequence[EntryKey], tenant: str | None) -> Iterator[int]:
        for key in keys:
            slot = self._store.index.find(key, Tier.RAM)
            if slot != NO_SLOT and self._owned(slot, tenant):
                yield slot

    def pin(self, keys: Sequence[EntryKey], until_ms: int, tenant: str | None = None) -> int:
        """Pin those of `keys` that are held, as far as pins may go; how many are pinned now."""
        pinned = [slot for slot in self._held(keys, tenant) if self._store.pin(slot, until_ms)]
        self._pin_on_disk(pinned, self._tiers.to_wall_ms(until_ms))
        return len(pinned)

    def _pin_on_disk(self, slots: Sequence[int], until_ms: int) -> None:
        if self._disk is not None and slots:
            keys = [self._store.index.key(slot) for slot in slots]
            self._unsettled.append(self._disk.pin(keys, until_ms))

    def unpin(self, keys: Sequence[EntryKey], tenant: str | None = None) -> int:
        """End the pins of `keys`; how many of them are held."""
        slots = list(self._held(keys, tenant))
        for slot in slots:
            self._store.unpin(slot)
        self._pin_on_disk(slots, 0)
        return len(slots)

    def purge(
        self, tenant: str | None = None, prefix: bytes = b"", model: bytes = b""
    ) -> tuple[int, int]:
        """Drop, in every tier, what meets all conditions that are given.

        Returns entries and bytes of those in RAM. Takes time in all entries.
        """
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
        if self._disk is not None:
            match = _matcher(tenant, prefix, model)
            # a child may stand before its parent, so that a chain is found in several passes
            for _ in range(PASSES_MAX if prefix else 1):
                self._unsettled.append(self._disk.forget_where(match))
        return len(doomed), size_bytes

    def set_quota(self, tenant: str, max_bytes: int, min_bytes: int) -> str:
        """'' when the quota holds from now on, else why it cannot."""
        share = Share(max_bytes or None, min_bytes)
        return self._store.set_quota(tenant, share, self._tiers.now_ms())

    def stats(self) -> dict[str, Any]:
        """Counters as nested maps of numbers; `by_tenant` has a map for each tenant."""
        return self._tiers.stats()


def _matcher(tenant: str | None, prefix: bytes, model: bytes) -> Callable[[EntryFacts], bool]:
    """Whether an entry on disk is to go; it learns the hashes of a chain as it meets them."""
    chain = {prefix}

    def match(facts: EntryFacts) -> bool:
        if prefix:
            if facts.key.hash not in chain and facts.parent not in chain:
                return False
            chain.add(facts.key.hash)
        owned = tenant is None or facts.tenant == tenant
        return owned and facts.layout.startswith(model)

    return match
