"""Places for entries: whose leave to make one, how memory is put together, when it is free again.

Invariants: what entries are charged (their granules and ENTRY_OVERHEAD_BYTES each) never exceeds
the budget, nor a tenant its quota, not even between two steps of a put: room is made first. Which
entries leave is the policy's decision, whose they are the quotas'; a place is neither freed nor
moved while anybody has it lent, or writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headrace_cache.arena import GRANULE_BYTES, NOBODY, Arena
from headrace_cache.index import Index, Tier
from headrace_cache.leases import Leases
from headrace_cache.policy.eviction import NO_SLOT, EvictionPolicy
from headrace_cache.policy.quota import Call, Quotas, Share

ENTRY_OVERHEAD_BYTES = 512
"""Charged beside an entry's granules: more than its key and places in the indexes take."""

TRIM_ENTRIES_MAX = 16
"""That leave at a time, ahead of need: some 0.2 ms, which a request may have to wait for."""

_PENDING = int(Tier.PENDING)

TRIES_MAX = 8
"""Times that more entries leave because what is free is in pieces."""


def charged_bytes(size_bytes: int) -> int:
    """What an entry takes from the budget."""
    return -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES + ENTRY_OVERHEAD_BYTES


class Room:
    """The arena's places, and who has to leave them."""

    def __init__(
        self, index: Index, policy: EvictionPolicy, arena: Arena, leases: Leases, quotas: Quotas
    ) -> None:
        self.leaving: Callable[[Sequence[int]], None] = lambda _: None
        """Told of the slots of entries that are evicted, before they are gone."""
        self._index = index
        self._policy = policy
        self._arena = arena
        self._leases = leases
        self._quotas = quotas
        self._outranked = NO_SLOT
        self._shares: dict[int, Share] = {}
        self._orphans: dict[int, tuple[int, int]] = {}
        """Tenant and charge of places that are lent and no entry's any more."""

    def make(self, slot: int, size_bytes: int, now_ms: int) -> int | None:
        """A place for `slot`; None, and the policy has forgotten it, if it is not worth one."""
        tenant, charge = self._index.tenant_of[slot], charged_bytes(size_bytes)

        def take(call: Call) -> bool:
            self._evict(call, now_ms, slot)
            return self._outranked != slot

        place = None
        if self._quotas.make_room(tenant, charge, take):
            place = self._take_place(slot, size_bytes)
            for _ in range(TRIES_MAX):
                if place is not None:
                    break
                if not self._evict(self._quotas.in_pieces(tenant, charge), now_ms, slot):
                    break
                if self._outranked == slot:
                    break
                place = self._take_place(slot, size_bytes)
        if place is None and self._outranked != slot:
            self._policy.remove(slot)
        self._outranked = NO_SLOT
        if place is not None:
            self._quotas.took(tenant, charge)
        return place

    def make_at_once(
        self, tenant: int, sizes: Sequence[int], charge: int, now_ms: int
    ) -> list[int] | None:
        """Places for entries of `tenant`, to be owned next; None if that takes one by one.

        `charge` is what they take from the budget together.

        Where there is no room, those leave who would have left by now had `trim` been called more.
        """
        missing_bytes = self._quotas.used_bytes + charge - self._quotas.high_bytes
        if missing_bytes > 0:
            over_bytes = self._quotas.used_bytes - self._quotas.low_bytes
            self._trim(min(over_bytes, missing_bytes), now_ms)
        if not self._quotas.fits(tenant, charge):
            return None
        places = self._arena.take_all(sizes)
        if places is not None:
            self._quotas.took(tenant, charge)
        return places

    def _take_place(self, slot: int, size_bytes: int) -> int | None:
        place = self._arena.take(size_bytes, slot)
        if place is None and self._arena.compact(size_bytes, self._may_move, self._moved):
            place = self._arena.take(size_bytes, slot)
        return place

    def _evict(self, call: Call, now_ms: int, newcomer: int = NO_SLOT) -> int:
        """Do as `call` says, as far as it can be done; how many left.

        Where `newcomer` was among them it is noted as outranked: the policy has forgotten it.
        """

        def allowed(slot: int) -> bool:
            return slot == newcomer or self._may_leave(slot)

        asked = self._may_leave if newcomer == NO_SLOT else allowed
        victims = self._policy.victims(call.size_bytes, now_ms, asked, call.spare)
        slots = [victim.slot for victim in victims]
        if newcomer in slots:
            self._outranked = newcomer
            slots.remove(newcomer)
        self.leaving(slots)
        self.vacate_all(slots)
        return len(victims)

    def trim(self, now_ms: int) -> bool:
        """Have some leave if more than the low watermark is taken; whether there is more to do."""
        over_bytes = self._quotas.used_bytes - self._quotas.low_bytes
        if over_bytes <= 0:
            return False
        usual_bytes = max(1, self._quotas.used_bytes // max(1, self._index.counts[Tier.RAM]))
        some_bytes = min(over_bytes, TRIM_ENTRIES_MAX * usual_bytes)
        return self._trim(some_bytes, now_ms) > 0 and some_bytes < over_bytes

    def _trim(self, size_bytes: int, now_ms: int) -> int:
        """Have `size_bytes` leave, if that is more than none; how many entries left."""
        if size_bytes <= 0:
            return 0
        spare = self._quotas.spare() if self._shares else None
        return self._evict(Call(size_bytes, spare, "above the low watermark"), now_ms)

    def set_quota(self, tenant: str, share: Share, now_ms: int) -> str:
        """Why `share` cannot be granted; '' when it holds, and what exceeds it has left."""
        number = self._index.tenant(tenant)
        refusal = self._quotas.refusal(number, share)
        if refusal:
            return refusal
        self._quotas.grant(number, share)
        self._shares[number] = share
        over_bytes = self._quotas.excess(number)
        if over_bytes:
            self._evict(Call(over_bytes, {number: over_bytes}, "the quota was lowered"), now_ms)
        return ""

    def _may_leave(self, slot: int) -> bool:
        if self._index.tiers[slot] & _PENDING:
            return False
        return not self._leases.is_held(self._index.ram_place[slot])

    def _may_move(self, place: int) -> bool:
        owner = self._arena.owner(place)
        return owner >= 0 and self._may_leave(owner)

    def _moved(self, slot: int, place: int) -> None:
        self._index.place(slot, Tier.RAM, place)

    def vacate_all(self, slots: Sequence[int]) -> None:
        """Forget that `slots`, which the policy has forgotten, are in RAM."""
        index, is_held = self._index, self._leases.is_held
        free: list[int] = []
        given: dict[int, int] = {}  # bytes by tenant
        for slot in slots:
            place, tenant = index.ram_place[slot], index.tenant_of[slot]
            charge = charged_bytes(index.size_bytes[slot])
            if is_held(place):
                self._arena.disown(place)
                self._orphans[place] = (tenant, charge)
            else:
                free.append(place)
                given[tenant] = given.get(tenant, 0) + charge
        index.leave_all(slots, Tier.RAM)
        self._arena.free_all(free)
        for tenant, charge in given.items():
            self._quotas.gave(tenant, charge)

    def give_up(self, slot: int, place: int) -> None:
        """Forget that `slot` was to be written at `place`."""
        tenant, size_bytes = self._index.tenant_of[slot], self._index.size_bytes[slot]
        self._policy.remove(slot)
        self._index.leave(slot, Tier.PENDING)
        self._arena.free(place)
        self._quotas.gave(tenant, charged_bytes(size_bytes))

    def give_back(self, tenant: int, size_bytes: int, places: Sequence[int]) -> None:
        """Free `places` of that size which `tenant` was charged for and no entry had."""
        self._arena.free_all(places)
        self._quotas.gave(tenant, len(places) * charged_bytes(size_bytes))

    def can_hold(self, tenant: int, charge: int) -> bool:
        """Whether an entry of `tenant` could be taken in, were nothing else here."""
        return self._quotas.can_hold(tenant, charge)

    def is_over(self, tenant: int) -> bool:
        """Whether `tenant` takes more than its quota, which was lowered."""
        return self._quotas.excess(tenant) > 0

    def let_go(self, place: int) -> None:
        """Nobody has `place` lent any more."""
        if self._arena.owner(place) == NOBODY:
            self._quotas.gave(*self._orphans.pop(place))
            self._arena.free(place)

    def granted(self) -> dict[str, Share]:
        """Quotas that were granted, by tenant."""
        return {self._index.tenant_name(tenant): share for tenant, share in self._shares.items()}

    def shares(self) -> dict[str, Any]:
        """Quotas that were granted, and what is used of them."""
        return {
            self._index.tenant_name(tenant): {
                "max_bytes": share.max_bytes or 0,
                "min_bytes": share.min_bytes,
                "used_bytes": self._quotas.used_by(tenant),
            }
            for tenant, share in self._shares.items()
        }

    def check_integrity(self) -> None:
        """Assert that what is lent and no entry's is accounted for. Takes time in all extents."""
        nobodys = {
            place
            for place, _, live in self._arena.extents()
            if live and self._arena.owner(place) == NOBODY
        }
        assert nobodys == set(self._orphans), "what nobody has is charged to somebody"
        assert all(map(self._leases.is_held, nobodys)), "and lent, or it would be free"
        for part in (self._policy, self._arena, self._leases, self._quotas):
            part.check_integrity()
