"""What administrators may do with the entries: list, pin, purge, by tenant and by prefix.

Invariants: a call that names a tenant sees and changes that tenant's entries only; all tiers are
one for it: what is listed, pinned or purged is so wherever it lies, and counted once; what it asks
of the disk is done when it returns. A chain is followed through both tiers at once, since neither
may have all of it, in one pass over each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from headrace.cache_admin import IN_RAM, ON_DISK, EntryInfo
from headrace.frames import EntryFacts, EntryKey
from headrace_cache.admin import Chosen
from headrace_cache.disk import DiskTier
from headrace_cache.disk_log import SPOT_BITS, Forgotten, Match
from headrace_cache.index import Tier
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED
from headrace_cache.policy.lineage import Below, Crossings, Link, crossings
from headrace_cache.policy.quota import Share
from headrace_cache.tiers import Tiers

SCAN_MAX = 100_000
"""Slots looked at for one page of a list: some 50 ms."""
ON_DISK_CURSOR = 1 << (SPOT_BITS + 1)
"""Cursors from here on go through what is on disk alone."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Among:
    """What is chosen, of some entries."""

    chosen: Chosen
    hashes: frozenset[bytes]

    def __call__(self, facts: EntryFacts) -> bool:
        return facts.key.hash in self.hashes and self.chosen(facts)


class Management:
    """The tiers, as `admin.py` wants them."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._store = tiers.store
        self._disk = tiers.disk

    # listing

    async def entries(
        self, chosen: Chosen, below: Below | None, limit: int, cursor: int, now_ms: int
    ) -> tuple[list[EntryInfo], int]:
        """Up to `limit` entries from `cursor` on, and the cursor behind them, 0 at the end.

        What is in RAM comes first, what is on disk alone then.
        """
        if cursor >= ON_DISK_CURSOR:
            return await self._on_disk(chosen, below, limit, cursor - ON_DISK_CURSOR)
        inside = None if below is None else await self._inside(below)
        index = self._store.index
        found: list[EntryInfo] = []
        for looked, slot in enumerate(index.entries(cursor, Tier.RAM)):
            if len(found) == limit or looked == SCAN_MAX:
                return found, slot
            facts = self._store.facts(slot)
            if chosen(facts) and (inside is None or facts.key.hash in inside):
                found.append(self._info(slot, facts, now_ms))
        return found, ON_DISK_CURSOR if self._disk is not None else 0

    async def _inside(self, below: Below) -> set[bytes]:
        """Hashes of the chains that are meant, by what both tiers know."""
        links = self._links()
        if self._disk is None:
            return below.of(links)
        return below.of([*links, *await asyncio.wrap_future(self._disk.links())])

    async def _on_disk(
        self, chosen: Chosen, below: Below | None, limit: int, start: int
    ) -> tuple[list[EntryInfo], int]:
        if self._disk is None:
            return [], 0
        links = self._links() if below is not None else []
        page = await asyncio.wrap_future(self._disk.page(chosen, limit, start, below, links))
        rows = [self._told(facts) for facts in page.entries if facts.key not in self._store]
        return rows, 0 if page.start is None else ON_DISK_CURSOR + page.start

    def _told(self, facts: EntryFacts) -> EntryInfo:
        assert self._disk is not None, "it is on disk"
        until_ms = self._disk.pinned_until_ms(facts.key)
        pin_ms = max(0, until_ms - self._tiers.wall_ms()) if until_ms else 0
        return EntryInfo(
            facts.key, facts.parent, facts.depth, facts.size_bytes, facts.tenant, facts.band,
            ON_DISK, pin_ms, facts.layout,
        )  # fmt: skip

    def _info(self, slot: int, facts: EntryFacts, now_ms: int) -> EntryInfo:
        until_ms = self._store.pinned_until_ms(slot)
        pin_ms = 0 if until_ms == NOT_PINNED else max(0, until_ms - now_ms)
        on_disk = self._disk is not None and self._disk.find(facts.key) is not None
        return EntryInfo(
            facts.key, facts.parent, facts.depth, facts.size_bytes, facts.tenant, facts.band,
            IN_RAM | ON_DISK if on_disk else IN_RAM, pin_ms, facts.layout,
        )  # fmt: skip

    def _links(self) -> list[Link]:
        """Hashes in RAM with those of their parents."""
        index = self._store.index
        return [
            (index.key(slot).hash, b"" if parent == NO_SLOT else index.key(parent).hash)
            for slot in index.entries(0, Tier.RAM)
            for parent in (index.parent[slot],)
        ]

    async def crossings(self, first: bytes) -> Crossings:
        """Where chains go from group to group, and those that lead away from `first`."""
        links = self._links()
        if self._disk is None:
            return crossings(first, links)
        return await asyncio.wrap_future(self._disk.crossings(first, links))

    # pins

    def _owned(self, slot: int, tenant: str | None) -> bool:
        index = self._store.index
        return tenant is None or index.tenant_name(index.tenant_of[slot]) == tenant

    def _held(self, keys: Sequence[EntryKey], tenant: str | None) -> Iterator[int]:
        for key in keys:
            slot = self._store.index.find(key, Tier.RAM)
            if slot != NO_SLOT and self._owned(slot, tenant):
                yield slot

    def _only_on_disk(self, keys: Sequence[EntryKey], tenant: str | None) -> list[EntryKey]:
        """Those of `keys` that are on disk and not in RAM."""
        if self._disk is None:
            return []
        catalog = self._disk.catalog
        return [
            key
            for key in keys
            if self._store.index.find(key, Tier.RAM) == NO_SLOT
            and self._disk.find(key) is not None
            and (tenant is None or catalog.is_of(key, tenant))
        ]

    async def pin(self, keys: Sequence[EntryKey], until_ms: int, tenant: str | None = None) -> int:
        """Pin those of `keys` that are held, as far as pins may go; how many are pinned now.

        Each tier keeps its own copy: a pin that one has no room for may hold in the other.
        """
        slots = [slot for slot in self._held(keys, tenant) if self._store.pin(slot, until_ms)]
        pinned = [self._store.index.key(slot) for slot in slots]
        elsewhere = self._only_on_disk(keys, tenant)
        until_ms = self._tiers.to_wall_ms(until_ms)
        await self._pin_on_disk(pinned, until_ms)
        return len(pinned) + await self._pin_on_disk(elsewhere, until_ms)

    async def unpin(self, keys: Sequence[EntryKey], tenant: str | None = None) -> int:
        """End the pins of `keys`; how many of them are held."""
        slots = list(self._held(keys, tenant))
        held = [self._store.index.key(slot) for slot in slots]
        for slot in slots:
            self._store.unpin(slot)
        elsewhere = self._only_on_disk(keys, tenant)
        await self._pin_on_disk(held, 0)
        return len(held) + await self._pin_on_disk(elsewhere, 0)

    async def _pin_on_disk(self, keys: Sequence[EntryKey], until_ms: int) -> int:
        if self._disk is None or not keys:
            return 0
        try:
            return await asyncio.wrap_future(self._disk.pin(keys, until_ms))
        except (OSError, RuntimeError) as error:
            log.error("the disk did not pin what an administrator asked", reason=str(error))
            return 0

    # purges

    async def purge(self, chosen: Chosen, below: Below | None) -> tuple[int, int]:
        """Drop what is meant, in every tier: entries and bytes. Takes time in all entries.

        What is being written while this begins is not covered.
        """
        links = self._links() if below is not None else []
        inside = None if below is None else below.of(links)
        gone = self._drop(chosen, inside)
        if self._disk is None:
            return len(gone), sum(gone.values())
        sizes, reached = await self._forget(self._disk, chosen, below, links)
        gone = sizes | gone
        if inside is not None:
            linked = {hash_ for hash_, _ in links} & reached - inside
            if linked:
                # what hangs together by the disk alone; what left RAM meanwhile came behind us
                gone |= self._drop(chosen, linked)
                match = _Among(chosen, frozenset(linked))
                gone = (await self._forget(self._disk, match, None, ())).sizes | gone
        return len(gone), sum(gone.values())

    def _drop(self, chosen: Chosen, inside: set[bytes] | None) -> dict[EntryKey, int]:
        """Drop what is in RAM, of the hashes `inside` if there are any given; their bytes."""
        found: dict[EntryKey, int] = {}
        doomed = []
        for slot in self._store.index.entries(0, Tier.RAM):
            facts = self._store.facts(slot)
            if chosen(facts) and (inside is None or facts.key.hash in inside):
                doomed.append(slot)
                found[facts.key] = facts.size_bytes
        for slot in doomed:
            self._store.drop(slot)
        return found

    async def _forget(
        self, disk: DiskTier, match: Match, below: Below | None, links: Sequence[Link]
    ) -> Forgotten:
        try:
            return await asyncio.wrap_future(disk.forget_where(match, below, links))
        except (OSError, RuntimeError) as error:
            log.error("the disk did not forget what an administrator asked", reason=str(error))
            return Forgotten({}, set())

    # the rest

    async def set_quota(self, tenant: str, max_bytes: int, min_bytes: int) -> str:
        """'' when the quota holds from now on, else why it cannot, or not for good."""
        share = Share(max_bytes or None, min_bytes)
        refusal = self._store.set_quota(tenant, share, self._tiers.now_ms())
        return refusal or await self._tiers.keep_shares()

    def stats(self) -> dict[str, Any]:
        """Counters as nested maps of numbers; `by_tenant` has a map for each tenant."""
        return self._tiers.stats()
