"""The arena with the disk behind it: what leaves the one is on the other, and comes back.

Copies go to disk in the background, a bounded amount at a time, so that most of what the policy
evicts is there already; what is not yet is offered as it leaves. A run that ends in RAM and goes on
on disk is read from there, put as if it came from a client, and lent as one.

Invariants: the event loop never waits for the disk; without a disk, or with one in trouble, this is
the store alone. What is read has its writer's CRC, which the disk tier checks.
Rejected: writing on eviction only. A burst would then ask more of the disk's queue than it holds,
and a killed service would come back with nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from headrace.clock import Clock
from headrace.errors import WireError
from headrace.frames import DISK, RAM, EntryFacts, EntryKey
from headrace.types import Band
from headrace_cache.disk import DiskTier
from headrace_cache.disk_catalog import Place
from headrace_cache.disk_reads import Loaded
from headrace_cache.grants import Loan
from headrace_cache.index import Tier
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED
from headrace_cache.promises import decode_shares, encode_shares
from headrace_cache.store import OURSELVES, Store

PROMOTED_BYTES_MAX = 64 * 1024 * 1024
"""Read from disk for one request."""

COPY_EVERY_S = 0.1
COPIED_BYTES_MAX = 8 * 1024 * 1024
"""Offered to the disk at a time: some 80 MB/s, a millisecond of the event loop each."""

WAITING_MAX = 1 << 16
"""Entries that wait to be copied; the oldest are left to their eviction."""

CLOSE_S_MAX = 10.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks to be lent."""

    keys: Sequence[EntryKey]
    limit_bytes: int
    band: Band | None = None
    layout: bytes = b""


@dataclass(slots=True)
class Counts:
    """What went between the tiers, since the start."""

    promoted: int = 0
    promoted_bytes: int = 0
    gone: int = 0
    """Entries that were to be read from disk, and could not be."""
    copied: int = 0
    not_copied: int = 0
    """Evicted without a copy: the disk had no room for it in its queue."""


class Tiers:
    """A store and the disk behind it, if there is one. One event loop's."""

    def __init__(self, store: Store, disk: DiskTier | None, clock: Clock) -> None:
        self.store = store
        self.disk = disk
        self.counts = Counts()
        self._clock = clock
        self._waiting: deque[int] = deque(maxlen=WAITING_MAX)
        self._copier: asyncio.Task[None] | None = None
        if disk is not None:
            store.evicted = self._evicted
            store.settled = self._waiting.append

    async def start(self) -> None:
        """Take the disk's directory. Raises SettingsError if it cannot be had."""
        if self.disk is None:
            return
        found = self.disk.start()
        self._take_shares(self.disk)
        found.add_done_callback(lambda done: log.info("disk is read", entries=done.result()))
        self._copier = asyncio.get_running_loop().create_task(self._copy_for_ever())

    def _take_shares(self, disk: DiskTier) -> None:
        """What was promised to tenants before the last stop holds again, as far as it can."""
        try:
            shares = decode_shares(disk.read_note())
        except (OSError, WireError) as error:
            log.error("quotas of before are not known", reason=str(error))
            return
        for tenant, share in shares.items():
            refusal = self.store.set_quota(tenant, share, self._clock.now_ms())
            if refusal:
                log.error("a quota of before cannot hold", tenant=tenant, reason=refusal)

    async def keep_shares(self) -> str:
        """Have quotas survive a restart, where there is a disk; '' or why they do not."""
        if self.disk is None:
            return ""
        try:
            await asyncio.wrap_future(self.disk.write_note(encode_shares(self.store.shares())))
        except (OSError, RuntimeError) as error:
            return f"it holds until the next restart only: {error}"
        return ""

    async def close(self) -> None:
        """Write what is not on disk yet, for CLOSE_S_MAX at most."""
        if self.disk is None or self._copier is None:
            return
        self._copier.cancel()
        self._copier = None
        loop = asyncio.get_running_loop()
        end_s = loop.time() + CLOSE_S_MAX / 2
        while self._waiting and loop.time() < end_s:
            self.copy_some()
            await asyncio.sleep(COPY_EVERY_S / 10)
        await asyncio.to_thread(self.disk.close, CLOSE_S_MAX / 2)

    # reading

    def __contains__(self, key: EntryKey) -> bool:
        return key in self.store or (self.disk is not None and self.disk.find(key) is not None)

    def lend(self, holder: int, wanted: Wanted) -> Loan | Awaitable[Loan]:
        """As Store.lend; a Loan at once unless some of the run is on disk alone."""
        if self.disk is not None and self._beyond(wanted)[1]:
            return self._promote(holder, wanted)
        return self._lend(holder, wanted)

    def _lend(self, holder: int, wanted: Wanted) -> Loan:
        now_ms = self._clock.now_ms()
        return self.store.lend(
            holder, wanted.keys, now_ms, wanted.limit_bytes, wanted.band, wanted.layout
        )

    def _beyond(self, wanted: Wanted) -> tuple[Sequence[int], list[Place]]:
        """The run in RAM, and where it goes on on disk, as far as one request may read."""
        assert self.disk is not None, "asked only with a disk"
        run, cut = self.store.readable(wanted.keys, wanted.limit_bytes, wanted.layout)
        if cut or len(run) == len(wanted.keys):
            return run, []
        left_bytes = wanted.limit_bytes - sum(self.store.index.size_bytes[slot] for slot in run)
        left_bytes = min(left_bytes, PROMOTED_BYTES_MAX)
        places: list[Place] = []
        for place in self.disk.find_run(wanted.keys[len(run) :]):
            left_bytes -= place.size_bytes
            if left_bytes < 0:
                break
            places.append(place)
        return run, places

    async def _promote(self, holder: int, wanted: Wanted) -> Loan:
        """Read what is on disk, take it in, and lend the whole run."""
        assert self.disk is not None, "asked only with a disk"
        # looked up here and not when it was asked for: what was there may have left since
        run, places = self._beyond(wanted)
        # what is there must not leave meanwhile
        lease = self.store.hold(OURSELVES, run, self._clock.now_ms())
        try:
            loaded = await asyncio.wrap_future(self.disk.read(places))
            for each in loaded:
                if each is None or not self._take_in(each, wanted.band):
                    break
            loan = self._lend(holder, wanted)
        finally:
            self.store.end(OURSELVES, lease)
        from_disk = {place.key for place in places}
        return replace(
            loan,
            tiers=tuple(
                DISK if key in from_disk else RAM
                for key, _ in zip(wanted.keys, loan.places, strict=False)
            ),
        )

    def _take_in(self, loaded: Loaded, band: Band | None) -> bool:
        assert self.disk is not None, "asked only with a disk"
        facts = loaded.facts
        facts = facts._replace(
            band=facts.band if band is None else min(facts.band, band),
            pin_ms=max(0, self.disk.pinned_until_ms(facts.key) - self.wall_ms()),
        )
        self.store.put(facts, loaded.data, self._clock.now_ms())
        there = facts.key in self.store
        self.counts.promoted += there
        self.counts.promoted_bytes += facts.size_bytes if there else 0
        self.counts.gone += not there
        return there

    # writing

    def _evicted(self, facts: EntryFacts, data: memoryview) -> None:
        assert self.disk is not None, "set only with a disk"
        if not self.disk.offer(facts, data):
            self.counts.not_copied += 1

    async def _copy_for_ever(self) -> None:
        while True:
            await asyncio.sleep(COPY_EVERY_S)
            self.copy_some()

    def copy_some(self) -> None:
        """Offer some of what is not on disk yet, as far as the disk takes it now."""
        assert self.disk is not None, "only with a disk"
        index = self.store.index
        size_bytes = 0
        while self._waiting and size_bytes < COPIED_BYTES_MAX:
            slot = self._waiting[0]
            if index.tiers[slot] & Tier.RAM and self.disk.find(index.key(slot)) is None:
                if not self.disk.can_take(index.size_bytes[slot]):
                    return
                self._offer(slot)
                size_bytes += index.size_bytes[slot]
            self._waiting.popleft()

    def _offer(self, slot: int) -> None:
        assert self.disk is not None, "only with a disk"
        facts = self.store.facts(slot)
        self.counts.copied += self.disk.offer(facts, self.store.data(slot), self._wall_pin(slot))

    def _wall_pin(self, slot: int) -> int:
        """When the pin of `slot` ends, on the wall clock; 0: none."""
        until_ms = self.store.pinned_until_ms(slot)
        if until_ms == NOT_PINNED:
            return 0
        return self.to_wall_ms(until_ms)

    def wall_ms(self) -> int:
        """The disk's clock."""
        return self._clock.wall_ns() // 1_000_000

    def now_ms(self) -> int:
        """The store's clock."""
        return self._clock.now_ms()

    def to_wall_ms(self, until_ms: int) -> int:
        """A time of the store's clock, on the wall clock."""
        return self.wall_ms() + until_ms - self._clock.now_ms()

    def verify(self, key: EntryKey) -> bool:
        """As Store.verify. A copy on disk has a CRC of its own, checked whenever it is read."""
        return self.store.index.find(key, Tier.RAM) != NO_SLOT and self.store.verify(key)

    def stats(self) -> dict[str, Any]:
        """The store's, and the disk's under its own name."""
        stats = self.store.stats()
        if self.disk is not None:
            moved = {name: getattr(self.counts, name) for name in Counts.__slots__}
            stats |= {"disk": self.disk.stats() | moved}
        return stats
