"""Policies that rank leaves by one score: a heap for each tenant, and aging.

Invariant: the heaps hold the slots that may leave, all of them and no other. Ties leave in order of
arrival. Aging (L) is the score that was enough to stay so far; a tenant that had to give up entries
of its own (its quota) is ahead of it by its lead, which is taken off where tenants are compared, so
that a tenant's churn ages its own entries and nobody else's.
Rejected: one heap for all, in which a tenant's cheapest entry may lie behind all others'.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from headrace_cache.policy.chains import REASON, Chains
from headrace_cache.policy.eviction import Spare, Victim
from headrace_cache.policy.heap import NOWHERE, Ranks, SlotHeap

LOWEST = "lowest score {:.3f} among leaves: " + REASON


class Ranked(Chains):
    """Subclasses say what an entry is worth; the least worthy leaf leaves first.

    `AGES` is False where scores do not start at `_base`: then nobody has a lead either.
    """

    AGES = True

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._ranks = Ranks()
        self._heaps: dict[int, SlotHeap] = {}
        self._leads: dict[int, float] = {}
        self._aging = 0.0
        self._arrivals = 0

    @abstractmethod
    def _score(self, slot: int) -> float:
        """What `slot` is worth keeping, as of this use of it."""

    def _base(self, slot: int) -> float:
        """Where scores of the slot's tenant start now."""
        return self._aging + self._leads.get(self._tenant[slot], 0.0)

    def _grow(self, slots: int) -> None:
        super()._grow(slots)
        self._ranks.grow(slots)

    def _entered(self, slot: int, name: int) -> None:  # noqa: ARG002  # a hook
        self._arrivals += 1
        self._ranks.sequence[slot] = self._arrivals
        self._ranks.score[slot] = self._score(slot)

    def _used(self, slot: int) -> None:
        self._rank(slot)

    def _rank(self, slot: int) -> None:
        self._ranks.score[slot] = self._score(slot)
        if self._ranks.place[slot] != NOWHERE:
            self._heaps[self._tenant[slot]].moved(slot)

    def _left(self, slot: int) -> None:
        if self._ranks.place[slot] != NOWHERE:
            self._bound(slot)

    def _freed(self, slot: int) -> None:
        tenant = self._tenant[slot]
        if tenant not in self._heaps:
            self._heaps[tenant] = SlotHeap(self._ranks)
        self._heaps[tenant].push(slot)

    def _bound(self, slot: int) -> None:
        tenant = self._tenant[slot]
        heap = self._heaps[tenant]
        heap.remove(slot)
        if not heap:
            del self._heaps[tenant]

    def _choose(
        self, size_bytes: int, now_ms: int, allowed: Callable[[int], bool], spare: Spare | None
    ) -> list[Victim]:
        chosen: list[Victim] = []
        held: list[int] = []
        freed_bytes = 0
        while freed_bytes < size_bytes and (slot := self._lowest(spare)) is not None:
            if not allowed(slot):
                self._bound(slot)
                held.append(slot)
                continue
            victim = self._victim(slot, now_ms)
            if self.AGES:
                self._age(slot, shared=spare is None)
            if spare is not None:
                spare[self._tenant[slot]] -= victim.size_bytes
            self.remove(slot)
            freed_bytes += victim.size_bytes
            chosen.append(victim)
        for slot in held:
            self._freed(slot)
        return chosen

    def _victim(self, slot: int, now_ms: int) -> Victim:
        score = self._ranks.score[slot]
        values = (score, *self._reason(slot, now_ms))
        return Victim(slot, self._size[slot], score, LOWEST, values)

    def _lowest(self, spare: Spare | None) -> int | None:
        """The least worthy slot among the tenants that have something to spare."""
        score, sequence = self._ranks.score, self._ranks.sequence
        best, best_rank = None, (0.0, 0)
        for tenant, heap in self._heaps.items():
            if spare is not None and spare.get(tenant, 0) <= 0:
                continue
            slot = heap.first()
            rank = (score[slot] - self._leads.get(tenant, 0.0), sequence[slot])
            if best is None or rank < best_rank:
                best, best_rank = slot, rank
        return best

    def _age(self, slot: int, shared: bool) -> None:
        tenant, score = self._tenant[slot], self._ranks.score[slot]
        lead = self._leads.get(tenant, 0.0)
        if shared:
            self._aging = max(self._aging, score - lead)
        elif score - self._aging > lead:
            self._leads[tenant] = score - self._aging

    def check_integrity(self) -> None:
        super().check_integrity()
        free = {slot for slot in range(len(self._resident)) if self._is_free(slot)}
        standing = [slot for heap in self._heaps.values() for slot in heap]
        assert len(standing) == len(free) == len(free & set(standing)), "heaps hold the leaves"
        for tenant, heap in self._heaps.items():
            assert all(self._tenant[slot] == tenant for slot in heap), "each in its tenant's heap"
            heap.check_integrity()
