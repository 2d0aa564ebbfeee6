"""What the cache service counts, by kind and by tenant.

Invariant: each event counts once by kind and once by tenant; misses have no owner, so no tenant.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
