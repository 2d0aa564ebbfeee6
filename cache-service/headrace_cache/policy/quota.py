"""Whose entries make room: quotas, guaranteed minimums and watermarks.

Invariants: a tenant's entries take at most its quota and everybody's at most the high watermark,
as room is made before an entry comes in; nobody is brought below its minimum by more than one
entry to make room for others. Minimums together stay within the low watermark, so that whoever is
below its own finds somebody who is above.
An entry counts for the tenant that put it first, also where others read it.
Rejected: a cache for each tenant, which leaves what one does not use empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace_cache.policy.eviction import Spare

TENANTS_MAX = 257


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant may take at most, and keeps in any case, in bytes; `max_bytes` None: all."""

    max_bytes: int | None = None
    min_bytes: int = 0


NO_SHARE = Share()


@dataclass(frozen=True, slots=True)
class Call:
    """Who has to give `size_bytes`, and why: an argument of the policy's `victims`.

    `spare` says how much each may lose; None: anybody anything.
    """

    size_bytes: int
    spare: Spare | None
    reason: str


class Quotas:
    """Counts bytes by tenant (small numbers) and says whose entries have to leave.

    `high` and `low` are shares of the budget: what exceeds the high one is brought down to the low
    one in one go.
    """

    def __init__(self, budget_bytes: int, high: float = 1.0, low: float = 1.0) -> None:
        assert budget_bytes > 0 and 0 < low <= high <= 1, "settings see to sane watermarks"
        self.budget_bytes = budget_bytes
        self.high_bytes = int(budget_bytes * high)
        self.low_bytes = int(budget_bytes * low)
        self.used_bytes = 0
        self._used: dict[int, int] = {}
        self._shares: dict[int, Share] = {}

    def used_by(self, tenant: int) -> int:
        return self._used.get(tenant, 0)

    def share_of(self, tenant: int) -> Share:
        return self._shares.get(tenant, NO_SHARE)

    def refusal(self, tenant: int, share: Share) -> str:
        """Why `share` cannot be granted to `tenant`; empty if it can."""
        others = sum(other.min_bytes for t, other in self._shares.items() if t != tenant)
        if share.min_bytes < 0 or (share.max_bytes is not None and share.max_bytes < 0):
            return "bytes are not negative"
        if share.max_bytes is not None and share.min_bytes > share.max_bytes:
            return f"minimum {share.min_bytes} exceeds the quota {share.max_bytes}"
        if others + share.min_bytes > self.low_bytes:
            return f"minimums of {others + share.min_bytes} bytes exceed {self.low_bytes}"
        if tenant not in self._shares and len(self._shares) >= TENANTS_MAX:
            return f"{TENANTS_MAX} tenants have shares"
        return ""

    def grant(self, tenant: int, share: Share) -> None:
        """From now on `share` holds. What exceeds it (`excess`) is the caller's to evict."""
        assert not self.refusal(tenant, share), "asked before"
        self._shares[tenant] = share
        if share == Share():
            del self._shares[tenant]

    def took(self, tenant: int, size_bytes: int) -> None:
        """An entry of `tenant` came in."""
        self.used_bytes += size_bytes
        self._used[tenant] = self._used.get(tenant, 0) + size_bytes

    def gave(self, tenant: int, size_bytes: int) -> None:
        """An entry of `tenant` left."""
        self.used_bytes -= size_bytes
        self._used[tenant] -= size_bytes
        if not self._used[tenant]:
            del self._used[tenant]

    def can_hold(self, tenant: int, size_bytes: int) -> bool:
        """Whether an entry of this size could be taken in, were nothing else here."""
        share = self.share_of(tenant)
        most = self.high_bytes if share.max_bytes is None else share.max_bytes
        return size_bytes <= min(most, self.high_bytes)

    def make_room(self, tenant: int, size_bytes: int, take: Callable[[Call], bool]) -> bool:
        """Have room for an entry of `tenant` made; whether there is room then.

        `take` has a policy choose victims as the call says and counts them by `gave`; False: the
        entry is not wanted any more. Four calls at most: the tenant's own quota; then, above the
        watermark, others above their quota, all above their minimum, and the tenant itself, as
        what the rest has left may be pinned or in use.
        """
        if self.fits(tenant, size_bytes):
            return True
        for stage in (self._own_quota, self._over_quota, self._above_minimum, self._own_entries):
            call = stage(tenant, size_bytes)
            if call is not None and not take(call):
                return False
        return self.fits(tenant, size_bytes)

    def fits(self, tenant: int, size_bytes: int) -> bool:
        """Whether there is room for that much more of `tenant`."""
        if not self._shares:
            return self.used_bytes + size_bytes <= self.high_bytes
        most = self.share_of(tenant).max_bytes
        fits_quota = most is None or self.used_by(tenant) + size_bytes <= most
        return fits_quota and self.used_bytes + size_bytes <= self.high_bytes

    def _missing(self, size_bytes: int) -> int:
        wanted = self.used_bytes + size_bytes
        return wanted - self.low_bytes if wanted > self.high_bytes else 0

    def _own_quota(self, tenant: int, size_bytes: int) -> Call | None:
        most = self.share_of(tenant).max_bytes
        over = 0 if most is None else self.used_by(tenant) + size_bytes - most
        if over <= 0:
            return None
        return Call(over, {tenant: over}, f"{over} bytes above its own quota")

    def _over_quota(self, tenant: int, size_bytes: int) -> Call | None:  # noqa: ARG002  # a stage
        missing = self._missing(size_bytes)
        over = {who: excess for who in self._shares if (excess := self.excess(who)) > 0}
        if not missing or not over:
            return None
        wanted = min(missing, sum(over.values()))
        return Call(wanted, over, f"{missing} bytes above the watermark, these above their quota")

    def _above_minimum(self, tenant: int, size_bytes: int) -> Call | None:
        missing = self._missing(size_bytes)
        if not missing:
            return None
        reason = f"{missing} bytes above the watermark"
        if not any(share.min_bytes for share in self._shares.values()):
            return Call(missing, None, reason)
        spare = self._spare_beside(tenant, size_bytes)
        return Call(missing, spare, f"{reason}, these above their minimum")

    def _own_entries(self, tenant: int, size_bytes: int) -> Call | None:
        missing = self.used_bytes + size_bytes - self.high_bytes
        if missing <= 0:
            return None
        return Call(missing, {tenant: missing}, "nobody else has anything that may leave")

    def in_pieces(self, tenant: int, size_bytes: int) -> Call:
        """Whose entries leave where there is room for an entry of `tenant`, but in pieces."""
        promised = any(share.min_bytes for share in self._shares.values())
        spare = self._spare_beside(tenant, size_bytes) if promised else None
        return Call(size_bytes, spare, "what is free is in pieces, some of them lent")

    def _spare_beside(self, tenant: int, size_bytes: int) -> dict[int, int]:
        """`spare` while room is made for an entry of `tenant`.

        That one does not count above a minimum: it may be turned away in the end, and what left
        for it would be missing. Where nothing is promised it does, or it could not be outranked.
        """
        spare = self.spare()
        if not self.share_of(tenant).min_bytes:
            spare[tenant] = self.used_by(tenant) + size_bytes
        return spare

    def spare(self) -> dict[int, int]:
        """What each tenant has above its minimum."""
        over = {who: used - self.share_of(who).min_bytes for who, used in self._used.items()}
        return {who: excess for who, excess in over.items() if excess > 0}

    def excess(self, tenant: int) -> int:
        """Bytes that `tenant` has above its quota, which was lowered."""
        most = self.share_of(tenant).max_bytes
        return 0 if most is None else max(0, self.used_by(tenant) - most)

    def usage(self) -> Mapping[int, int]:
        """Bytes by tenant, of those that have any."""
        return self._used

    def check_integrity(self) -> None:
        """Assert that bytes add up and that all promises can be kept."""
        assert self.used_bytes == sum(self._used.values()), "bytes add up"
        assert all(used > 0 for used in self._used.values()), "who has nothing is forgotten"
        promised = sum(share.min_bytes for share in self._shares.values())
        assert promised <= self.low_bytes, "minimums can be kept"
