"""What the cache service counts, by kind and by tenant.

Invariant: each event counts once by kind and once by tenant; misses have no owner, so no tenant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.frames import KINDS
from headrace_cache.index import Index


@dataclass(slots=True)
class Tally:
    """Counters of one kind or one tenant; `entries` and `bytes` are what is resident now."""

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    hit_bytes: int = 0
    saved_us: int = 0
    misses: int = 0
    kept: int = 0
    present: int = 0
    refused: int = 0
    evictions: int = 0
    corrupt: int = 0


class Tallies:
    """Counters by name; a name is known from its first event on."""

    def __init__(self) -> None:
        self.by_kind: dict[str, Tally] = {}
        self.by_tenant: dict[str, Tally] = {}

    def kind(self, kind: str) -> Tally:
        return self.by_kind.setdefault(kind, Tally())

    def both(self, kind: str, tenant: str) -> tuple[Tally, Tally]:
        """The two tallies of an event."""
        by_kind, by_tenant = self.by_kind.get(kind), self.by_tenant.get(tenant)
        if by_kind is None:
            by_kind = self.by_kind[kind] = Tally()
        if by_tenant is None:
            by_tenant = self.by_tenant[tenant] = Tally()
        return by_kind, by_tenant

    # events of many entries at a time: a batch mostly has one owner

    def note_hits(self, index: Index, slots: Sequence[int]) -> int:
        """`slots` are given to a reader; the microseconds that computing them would take."""
        all_us = 0
        for tallies, some, size_bytes in self._by_owner(index, slots):
            saved_us = sum(map(index.cost_us.__getitem__, some))
            all_us += saved_us
            for tally in tallies:
                tally.hits += len(some)
                tally.hit_bytes += size_bytes
                tally.saved_us += saved_us
        return all_us

    def note_kept(self, index: Index, slots: Sequence[int]) -> None:
        """`slots` are resident from now on."""
        for tallies, some, size_bytes in self._by_owner(index, slots):
            for tally in tallies:
                tally.entries += len(some)
                tally.bytes += size_bytes
                tally.kept += len(some)

    def note_present(self, index: Index, slot: int) -> None:
        """`slot` was written again."""
        tenant = index.tenant_name(index.tenant_of[slot])
        for tally in self.both(KINDS[index.kind[slot]], tenant):
            tally.present += 1

    def note_refused(self, kind: str, tenant: str) -> None:
        """An entry was not taken in."""
        for tally in self.both(kind, tenant):
            tally.refused += 1

    def note_evicted(self, index: Index, slots: Sequence[int]) -> None:
        """`slots` leave to make room."""
        for tallies, some, size_bytes in self._by_owner(index, slots):
            for tally in tallies:
                tally.evictions += len(some)
                tally.entries -= len(some)
                tally.bytes -= size_bytes

    def _by_owner(
        self, index: Index, slots: Sequence[int]
    ) -> Iterator[tuple[tuple[Tally, Tally], Sequence[int], int]]:
        """`slots` by whose they are: the tallies of each, its slots, and their bytes together."""
        if not slots:
            return
        tenant_of, kind_of = index.tenant_of, index.kind
        tenants = set(map(tenant_of.__getitem__, slots))
        kinds = set(map(kind_of.__getitem__, slots))
        groups: dict[tuple[int, int], Sequence[int]]
        if len(tenants) == len(kinds) == 1:
            groups = {(tenants.pop(), kinds.pop()): slots}
        else:
            several: dict[tuple[int, int], list[int]] = {}
            for slot in slots:
                several.setdefault((tenant_of[slot], kind_of[slot]), []).append(slot)
            groups = dict(several)
        for (tenant, kind), some in groups.items():
            size_bytes = sum(map(index.size_bytes.__getitem__, some))
            yield self.both(KINDS[kind], index.tenant_name(tenant)), some, size_bytes

    def stats(self) -> dict[str, Any]:
        return {
            "by_kind": {kind: asdict(tally) for kind, tally in self.by_kind.items()},
            "by_tenant": {tenant: asdict(tally) for tenant, tally in self.by_tenant.items()},
        }

    def check_integrity(self, entries: int, size_bytes: int) -> None:
        """Assert that what is counted as resident is `entries` of `size_bytes` together."""
        for tallies in (self.by_kind, self.by_tenant):
            assert sum(tally.entries for tally in tallies.values()) == entries
            assert sum(tally.bytes for tally in tallies.values()) == size_bytes
