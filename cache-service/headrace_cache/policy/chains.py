"""What all policies share: which entries are resident, their chains, and pins.

Invariants: `children` of a slot counts resident entries that name it as parent, whether or not it
is resident itself; `guards` counts its own pin and its guarded children, so that a guarded entry
always has a pinned one at or below it; guarded bytes stay within `pinned_bytes_max`.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence

from headrace.types import Band
from headrace_cache.policy.eviction import NO_SLOT, NOT_PINNED, Facts, Spare, Victim

GROWTH_SLOTS_MIN = 32
COST_US_MAX = (1 << 32) - 1
USES_MAX = (1 << 16) - 1

REASON = "{}, used {}x, idle {} ms, {:g} ms to recompute {} bytes"
LABELS = tuple(band.label for band in Band)


class Chains(ABC):
    """Facts by slot in arrays; subclasses decide the order in which leaves leave.

    `pinned_bytes_max` limits what pins may hold, ancestors included; None: no limit.
    """

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        self.pinned_bytes = 0
        self.used_bytes = 0
        self.entries = 0
        self._pinned_bytes_max = pinned_bytes_max
        self._resident = bytearray()
        self._parent = array("i")
        self._size = array("Q")
        self._band = array("B")
        self._tenant = array("I")
        self._cost_us = array("I")
        self._uses = array("H")
        self._used_ms = array("q")
        self._children = array("I")
        self._guards = array("I")
        self._pins: dict[int, int] = {}
        self._pin_ends: list[tuple[int, int]] = []

    # what a subclass is told

    @abstractmethod
    def _entered(self, slot: int, name: int) -> None:
        """`slot` became resident; its facts are in the arrays, all but `name`."""

    @abstractmethod
    def _used(self, slot: int) -> None:
        """`slot` was used; uses, time and band are updated."""

    def _raised(self, slot: int) -> None:  # noqa: B027  # most do not rank by it
        """`slot` is of a better band now. Subclasses that rank by it place it anew."""

    def _is_orphan(self, slot: int) -> bool:
        """Whether the entry before `slot` in its chain is not resident: it cannot be read."""
        parent = self._parent[slot]
        return parent != NO_SLOT and not self._resident[parent]

    @abstractmethod
    def _left(self, slot: int) -> None:
        """`slot` is about to leave; its facts are still in the arrays."""

    @abstractmethod
    def _freed(self, slot: int) -> None:
        """`slot`, resident, may leave from now on: its last child left or its pin ended."""

    def _free_at_first(self, slot: int) -> None:
        """`slot`, just admitted, may leave until its first child comes: mostly the next to come."""
        self._freed(slot)

    @abstractmethod
    def _bound(self, slot: int) -> None:
        """`slot`, resident, may no longer leave: it got a child or a pin."""

    @abstractmethod
    def _choose(
        self, size_bytes: int, now_ms: int, allowed: Callable[[int], bool], spare: Spare | None
    ) -> list[Victim]:
        """`victims`, once pins that ended are taken off."""

    def _grow(self, slots: int) -> None:
        """Make room for slots up to `slots` - 1. Subclasses with arrays extend it."""
        more = slots - len(self._resident)
        self._resident.extend(bytes(more))
        zeros = [0] * more
        for column in (self._size, self._band, self._tenant, self._cost_us, self._uses,
                       self._used_ms, self._children, self._guards):  # fmt: skip
            column.extend(zeros)
        self._parent.extend([NO_SLOT] * more)

    # the protocol

    def admit(self, slot: int, facts: Facts, now_ms: int) -> None:
        self._reach(max(slot, facts.parent))
        assert not self._resident[slot], "an entry is admitted once"
        assert facts.parent != slot, "an entry is not its own parent"
        self._resident[slot] = 1
        self._parent[slot] = facts.parent
        self._size[slot] = facts.size_bytes
        self._band[slot] = facts.band
        self._tenant[slot] = facts.tenant
        self._cost_us[slot] = min(facts.cost_us, COST_US_MAX)
        self._uses[slot] = 1
        self._used_ms[slot] = now_ms
        self.entries += 1
        self.used_bytes += facts.size_bytes
        if facts.parent != NO_SLOT:
            self._bind(facts.parent)
            self._children[facts.parent] += 1
        self._entered(slot, facts.name)
        if self._is_free(slot):
            self._free_at_first(slot)
        if self._guards[slot]:  # its children came before it, one of them is pinned
            self.pinned_bytes += facts.size_bytes
            self._guard_above(slot)
            self._shed_pins()

    def admit_all(self, slots: Sequence[int], facts: Sequence[Facts], now_ms: int) -> None:
        for slot, each in zip(slots, facts, strict=True):
            self.admit(slot, each, now_ms)

    def touch_all(self, slots: Sequence[int], now_ms: int, band: Band | None = None) -> None:
        for slot in slots:
            self.touch(slot, now_ms, band)

    def touch(self, slot: int, now_ms: int, band: Band | None = None) -> None:
        assert self._resident[slot], "only residents are used"
        if self._uses[slot] < USES_MAX:
            self._uses[slot] += 1
        if band is not None and band < self._band[slot]:
            self._band[slot] = band
        self._used(slot)
        self._used_ms[slot] = now_ms

    def renew(self, slot: int, band: Band) -> None:
        assert self._resident[slot], "only residents are written again"
        if band < self._band[slot]:
            self._band[slot] = band
            self._raised(slot)

    def remove(self, slot: int) -> None:
        assert self._resident[slot], "only residents leave"
        self.unpin(slot)
        self._left(slot)
        if self._guards[slot]:
            self.pinned_bytes -= self._size[slot]
            self._unguard_above(slot)
        self._resident[slot] = 0
        self.entries -= 1
        self.used_bytes -= self._size[slot]
        parent = self._parent[slot]
        self._parent[slot] = NO_SLOT
        if parent != NO_SLOT:
            self._children[parent] -= 1
            if self._is_free(parent):
                self._freed(parent)

    def victims(
        self,
        size_bytes: int,
        now_ms: int,
        allowed: Callable[[int], bool] | None = None,
        spare: Spare | None = None,
    ) -> list[Victim]:
        while self._pin_ends and self._pin_ends[0][0] <= now_ms:
            until_ms, slot = heapq.heappop(self._pin_ends)
            if self._pins.get(slot) == until_ms:
                self.unpin(slot)
        return self._choose(size_bytes, now_ms, allowed or _anybody, spare)

    def pin(self, slot: int, until_ms: int) -> bool:
        assert self._resident[slot], "only residents are pinned"
        if slot not in self._pins:
            if not self._may_guard(slot):
                return False
            self._bind(slot)
            self._guard(slot)
        self._pins[slot] = until_ms
        heapq.heappush(self._pin_ends, (until_ms, slot))
        if len(self._pin_ends) > 2 * len(self._pins) + GROWTH_SLOTS_MIN:
            self._pin_ends = sorted((until, pinned) for pinned, until in self._pins.items())
        return True

    def unpin(self, slot: int) -> None:
        if self._pins.pop(slot, None) is not None:
            self._unguard(slot)
            if self._is_free(slot):
                self._freed(slot)

    def pinned_until_ms(self, slot: int) -> int:
        return self._pins.get(slot, NOT_PINNED)

    # chains

    def _is_free(self, slot: int) -> bool:
        """Resident, without a resident child, not pinned."""
        return bool(self._resident[slot] and not self._children[slot] and slot not in self._pins)

    def _bind(self, slot: int) -> None:
        if self._is_free(slot):
            self._bound(slot)

    def _reach(self, slot: int) -> None:
        have = len(self._resident)
        if slot >= have:
            self._grow(max(slot + 1, have + have // 4, GROWTH_SLOTS_MIN))

    # pins

    def _may_guard(self, slot: int) -> bool:
        if self._pinned_bytes_max is None:
            return True
        size_bytes = 0
        while slot != NO_SLOT and self._resident[slot] and not self._guards[slot]:
            size_bytes += self._size[slot]
            slot = self._parent[slot]
        return self.pinned_bytes + size_bytes <= self._pinned_bytes_max

    def _guard(self, slot: int) -> None:
        self._guards[slot] += 1
        if self._guards[slot] == 1 and self._resident[slot]:
            self.pinned_bytes += self._size[slot]
            self._guard_above(slot)

    def _guard_above(self, slot: int) -> None:
        """Count `slot`, which is guarded now, with its parent, and so on up the chain."""
        while (slot := self._parent[slot]) != NO_SLOT:
            self._guards[slot] += 1
            if self._guards[slot] > 1 or not self._resident[slot]:
                return
            self.pinned_bytes += self._size[slot]

    def _unguard(self, slot: int) -> None:
        self._guards[slot] -= 1
        if not self._guards[slot]:
            self.pinned_bytes -= self._size[slot]
            self._unguard_above(slot)

    def _unguard_above(self, slot: int) -> None:
        while (slot := self._parent[slot]) != NO_SLOT:
            self._guards[slot] -= 1
            if self._guards[slot] or not self._resident[slot]:
                return
            self.pinned_bytes -= self._size[slot]

    def _shed_pins(self) -> None:
        """End the pins that end soonest until the rest fits: an ancestor came late."""
        while self._pinned_bytes_max is not None and self.pinned_bytes > self._pinned_bytes_max:
            self.unpin(min(self._pins, key=lambda slot: (self._pins[slot], slot)))

    def _reason(self, slot: int, now_ms: int) -> tuple[float | str, ...]:
        """Values for REASON."""
        return (
            LABELS[self._band[slot]],
            self._uses[slot],
            now_ms - self._used_ms[slot],
            self._cost_us[slot] / 1000,
            self._size[slot],
        )

    def check_integrity(self) -> None:
        """Assert that counts, chains and pins agree."""
        residents = [slot for slot, here in enumerate(self._resident) if here]
        assert self.entries == len(residents), "residents are counted"
        assert self.used_bytes == sum(self._size[slot] for slot in residents), "sizes add up"
        children = [0] * len(self._resident)
        guards = [0] * len(self._resident)
        for slot in self._pins:
            guards[slot] += 1
        for slot in residents:
            if (parent := self._parent[slot]) != NO_SLOT:
                children[parent] += 1
                guards[parent] += self._guards[slot] > 0
        assert children == list(self._children), "children are counted as they are"
        assert guards == list(self._guards), "guards are pins and guarded children"
        guarded = sum(self._size[slot] for slot in residents if self._guards[slot])
        assert guarded == self.pinned_bytes, "guarded bytes add up"
        limit = self._pinned_bytes_max
        assert limit is None or guarded <= limit, "pins hold no more than their share"
        assert all(self._resident[slot] for slot in self._pins), "only residents are pinned"
        assert len(self._pin_ends) <= 2 * len(self._pins) + GROWTH_SLOTS_MIN + 1


def _anybody(slot: int) -> bool:  # noqa: ARG001  # the signature of a question
    return True
