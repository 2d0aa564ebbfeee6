"""The default: keep-score = class weight x chance of use x recompute cost / bytes.

The chance of use is learned (`reuse.py`): the hits per use waited that an entry of this class, as
often used and as long idle as this one, promises. Age lowers it, or raises it where the workload is
so; use raises it as far as use has foretold use. Cost per byte is relative to that of all
residents, in steps of a factor of two; where nobody measured it, an entry counts as average.

Invariants: leaves stand in cells of equal score, all but the last to come, as its child is likely
to be next; the lowest cell's longest-standing slot leaves;
a slot stands in the cell of its age, at most a sweep too young.
Rejected: a fixed floor for each class with GreedyDual's aging (.07, .22, .33 of all blocks hit
where this has .13, .23, .33: 3,000, 10,000 and 30,000 blocks of a public conversation trace), and
choosing from a sample of leaves, which takes ten times as long for the same hits.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Mapping, Sequence

from headrace.types import Band
from headrace_cache.policy.cells import NO_CELL, Cells
from headrace_cache.policy.chains import COST_US_MAX, REASON, USES_MAX, Chains
from headrace_cache.policy.eviction import NO_SLOT, Facts, Spare, Victim
from headrace_cache.policy.reuse import BUCKETS, STARTS, ReuseModel, bucket_of

WEIGHTS: Mapping[Band, float] = {Band.INTERACTIVE: 64.0, Band.STANDARD: 8.0, Band.BATCH: 1.0}
"""How much a hit of each class is worth."""

USE_STEPS = 4
"""Entries used once, twice, three times, and more often are told apart."""

WORTH_STEPS = 16
WORTH_MIDDLE = 8
"""Steps of two in cost per byte; the average entry is in the middle one."""

HALF_STEP = math.sqrt(2)

SWEEP_USES_MIN = 64
MOVES_MAX = 4096
"""Slots that one sweep moves on, at most."""

REMEMBERED_MIN = 1 << 14
REMEMBERED_MAX = 1 << 22
REMEMBERED_TIMES = 4
"""Uses of what left are remembered for this many times as many entries as are here."""

TAG_BITS = 24
REMEMBERED_USES_MAX = 255

LOWEST = "lowest keep-score {:.3g} a turnover: " + REASON

CLASSES = [(band, step) for band in Band for step in range(USE_STEPS)]


class KeepScore(Chains):
    """See the module. Sums are of whole numbers, so that no rounding error adds up."""

    def __init__(self, pinned_bytes_max: int | None = None) -> None:
        super().__init__(pinned_bytes_max)
        self._model = ReuseModel([step for _, step in CLASSES], list(range(1, USE_STEPS + 1)))
        self._weights = [WEIGHTS[band] for band, _ in CLASSES]
        self._cells = Cells()
        self._fresh = NO_SLOT
        self._orders: dict[int, list[tuple[float, int]]] = {}
        self._last = array("Q")
        self._name = array("Q")
        self._remembered = array("I", bytes(4 * REMEMBERED_MIN))
        self._costs_us = 0
        self._costed_bytes = 0
        self._sweep_at = SWEEP_USES_MIN
        self._look_at = 0
        """The clock at which there is something to learn or to sweep."""

    def _grow(self, slots: int) -> None:
        super()._grow(slots)
        self._cells.grow(slots)
        zeros = [0] * (slots - len(self._last))
        self._last.extend(zeros)
        self._name.extend(zeros)

    # coming, being used, going

    def admit_all(self, slots: Sequence[int], facts: Sequence[Facts], now_ms: int) -> None:
        """What `admit` does, without its calls: a chain's blocks but for the last go to no cell."""
        self._reach(max(max(slots), max(each.parent for each in facts)))
        children, guards, resident = self._children, self._guards, self._resident
        if any(children[slot] or guards[slot] for slot in slots):  # they were here before
            super().admit_all(slots, facts, now_ms)
            return
        table, mask = self._remembered, len(self._remembered) - 1
        clock = self._model.clock
        names: list[int] = []
        classes: list[int] = []
        for slot, each in zip(slots, facts, strict=True):
            size_bytes, band, parent, tenant, cost_us, _, name = each
            orphan = parent != NO_SLOT and not resident[parent]
            if orphan or children[slot]:  # its child came just before it
                self._model.used_all(names, classes)
                names, classes = [], []
                self.admit(slot, each, now_ms)
                clock = self._model.clock
                continue
            assert not resident[slot], "an entry is admitted once"
            assert parent != slot, "an entry is not its own parent"
            resident[slot] = 1
            self._parent[slot] = parent
            self._size[slot] = size_bytes
            self._band[slot] = band
            self._tenant[slot] = tenant
            self._used_ms[slot] = now_ms
            self.entries += 1
            self.used_bytes += size_bytes
            self._cost_us[slot] = cost_us = min(cost_us, COST_US_MAX)
            if cost_us:
                self._costs_us += cost_us
                self._costed_bytes += size_bytes
            if parent != NO_SLOT:
                if parent == self._fresh:
                    self._fresh = NO_SLOT
                elif not children[parent]:
                    self._bind(parent)
                children[parent] += 1
            self._name[slot] = name
            kept = table[name & mask]
            uses = 1 + (kept & REMEMBERED_USES_MAX if kept >> 8 == name >> 64 - TAG_BITS else 0)
            self._uses[slot] = uses
            names.append(name)
            classes.append(band * USE_STEPS + (uses if uses < USE_STEPS else USE_STEPS) - 1)
            self._last[slot] = clock = clock + 1
            if clock >= self._look_at:
                self._model.used_all(names, classes)
                names, classes = [], []
                self._look()
                table, mask = self._remembered, len(self._remembered) - 1
            if self._fresh != NO_SLOT:
                self._place_fresh()
            self._fresh = slot
        self._model.used_all(names, classes)

    def touch_all(self, slots: Sequence[int], now_ms: int, band: Band | None = None) -> None:
        """What `touch` does, without its calls: of a chain, only the last stands in a cell."""
        self._place_fresh()
        *inner, last = slots or [NO_SLOT]
        standing = set(map(self._cells.cell_of, inner)) - {NO_CELL}
        if standing:
            super().touch_all(slots, now_ms, band)
            return
        assert all(map(self._resident.__getitem__, inner)), "only residents are used"
        uses, bands, clock = self._uses, self._band, self._model.clock
        names: list[int] = []
        classes: list[int] = []
        for slot in inner:
            clock += 1
            count = uses[slot]
            if count < USES_MAX:
                count += 1
                uses[slot] = count
            if band is not None and band < bands[slot]:
                bands[slot] = band
            self._last[slot] = clock
            self._used_ms[slot] = now_ms
            names.append(self._name[slot])
            step = count if count < USE_STEPS else USE_STEPS
            classes.append(bands[slot] * USE_STEPS + step - 1)
            if clock >= self._look_at:
                self._model.used_all(names, classes)
                names, classes = [], []
                self._look()
        self._model.used_all(names, classes)
        if last != NO_SLOT:
            self.touch(last, now_ms, band)

    def _entered(self, slot: int, name: int) -> None:
        self._account(slot, 1)
        self._name[slot] = name
        if self._is_orphan(slot):
            # nobody asked for it: who asks for a chain gets, and writes, its head first
            self._uses[slot] = max(1, self._recall(name))
            self._last[slot] = self._model.clock
            return
        self._uses[slot] = self._recall(name) + 1
        self._note_use(slot)

    def _used(self, slot: int) -> None:
        self._place_fresh()
        if self._cells.cell_of(slot) != NO_CELL:
            self._cells.remove(slot)
            self._note_use(slot)
            self._freed(slot)
        else:
            self._note_use(slot)

    def _raised(self, slot: int) -> None:
        self._place_fresh()
        if self._cells.cell_of(slot) != NO_CELL:
            self._cells.remove(slot)
            self._freed(slot)

    def _left(self, slot: int) -> None:
        self._place_fresh()
        self._account(slot, -1)
        self._remember(slot)
        if self._cells.cell_of(slot) != NO_CELL:
            self._cells.remove(slot)

    def _free_at_first(self, slot: int) -> None:
        self._place_fresh()
        self._fresh = slot

    def _place_fresh(self) -> None:
        """Give who came last a cell: it has no child yet."""
        slot, self._fresh = self._fresh, NO_SLOT
        if slot != NO_SLOT:
            self._freed(slot)

    def _freed(self, slot: int) -> None:
        cell = self._cell_now(slot)
        if cell not in self._cells:
            heapq.heappush(self._order_of(cell), (self._score(cell), cell))
        self._cells.add(slot, cell)

    def _bound(self, slot: int) -> None:
        if slot == self._fresh:
            self._fresh = NO_SLOT
        else:
            self._cells.remove(slot)

    def _note_use(self, slot: int) -> None:
        model = self._model
        model.used(self._name[slot], self._class(slot))
        self._last[slot] = model.clock
        if model.clock >= self._look_at:
            self._look()

    def _look(self) -> None:
        """Learn and sweep, whichever is due."""
        if self._model.due:
            self._model.refresh(self.entries)
            self._rescore()
            self._widen_memory()
        if self._model.clock >= self._sweep_at:
            self._sweep()
            self._sweep_at = self._model.clock + max(SWEEP_USES_MIN, len(self._cells))
        self._look_at = min(self._model.due_at, self._sweep_at)

    def _account(self, slot: int, sign: int) -> None:
        if self._cost_us[slot]:
            self._costs_us += sign * self._cost_us[slot]
            self._costed_bytes += sign * self._size[slot]

    # what left before: a table by name, each place with a tag and a count; the latest stays

    def _recall(self, name: int) -> int:
        """How often `name` was used when it left; 0 if that is forgotten."""
        kept = self._remembered[name & (len(self._remembered) - 1)]
        return kept & REMEMBERED_USES_MAX if kept >> 8 == name >> 64 - TAG_BITS else 0

    def _remember(self, slot: int) -> None:
        name = self._name[slot]
        uses = min(self._uses[slot], REMEMBERED_USES_MAX)
        self._remembered[name & (len(self._remembered) - 1)] = name >> 64 - TAG_BITS << 8 | uses

    def _widen_memory(self) -> None:
        size = len(self._remembered)
        while size < min(REMEMBERED_TIMES * self.entries, REMEMBERED_MAX):
            # a name's place in the larger table is its old one or the same in the other half
            self._remembered.extend(self._remembered)
            size *= 2

    # scores

    def _class(self, slot: int) -> int:
        uses = self._uses[slot]
        return self._band[slot] * USE_STEPS + (uses if uses < USE_STEPS else USE_STEPS) - 1

    def _worth_step(self, slot: int) -> int:
        usual = self._costs_us / self._costed_bytes
        # frexp's exponent is the logarithm, rounded up
        _, step = math.frexp(HALF_STEP * self._cost_us[slot] / self._size[slot] / usual)
        step += WORTH_MIDDLE - 1
        return 0 if step < 0 else step if step < WORTH_STEPS else WORTH_STEPS - 1

    def _cell_now(self, slot: int) -> int:
        """tenant, worth, class and age as one number."""
        worth = self._worth_step(slot) if self._cost_us[slot] else WORTH_MIDDLE
        uses = self._uses[slot]
        group = (self._tenant[slot] * WORTH_STEPS + worth) * len(CLASSES)
        class_ = self._band[slot] * USE_STEPS + (uses if uses < USE_STEPS else USE_STEPS) - 1
        return (group + class_) * BUCKETS + bucket_of(self._model.clock - self._last[slot])

    def _score(self, cell: int) -> float:
        rest, bucket = divmod(cell, BUCKETS)
        group, class_ = divmod(rest, len(CLASSES))
        worth = 2.0 ** (group % WORTH_STEPS - WORTH_MIDDLE)
        return self._weights[class_] * self._model.index[class_][bucket] * worth

    def _order_of(self, cell: int) -> list[tuple[float, int]]:
        tenant = cell // (BUCKETS * len(CLASSES) * WORTH_STEPS)
        order = self._orders.setdefault(tenant, [])
        if len(order) > 2 * len(self._cells) + 64:
            order[:] = sorted({item for item in order if item[1] in self._cells})
        return order

    def _rescore(self) -> None:
        self._orders = {}
        for cell in self._cells:
            self._order_of(cell).append((self._score(cell), cell))
        for order in self._orders.values():
            heapq.heapify(order)

    def _sweep(self) -> None:
        """Move on who has outgrown the age of his cell."""
        left = MOVES_MAX
        for cell in list(self._cells):
            outgrown = self._model.clock - STARTS[cell % BUCKETS + 1]
            while (
                left
                and cell in self._cells
                and self._last[slot := self._cells.first(cell)] <= outgrown
            ):
                self._cells.remove(slot)
                self._freed(slot)
                left -= 1

    # choosing

    def _choose(
        self, size_bytes: int, now_ms: int, allowed: Callable[[int], bool], spare: Spare | None
    ) -> list[Victim]:
        self._place_fresh()
        chosen: list[Victim] = []
        held: list[int] = []
        freed_bytes = 0
        while freed_bytes < size_bytes and (best := self._lowest(spare)) is not None:
            slot = self._cells.first(best[1])
            self._cells.remove(slot)
            if allowed(slot):
                asked = (size_bytes - freed_bytes, now_ms, allowed, spare)
                freed_bytes += self._take_chain(chosen, slot, best, *asked)
            else:
                held.append(slot)
        for slot in held:
            self._freed(slot)
        return chosen

    def _take_chain(
        self,
        chosen: list[Victim],
        slot: int,
        best: tuple[float, int],
        size_bytes: int,
        now_ms: int,
        allowed: Callable[[int], bool],
        spare: Spare | None,
    ) -> int:
        """Take out `slot`, which stood in the cell of `best`, and its parents as far as they are as
        old and worth no more, until `size_bytes` are out; how many are.

        What is missing at a time comes from few chains, then. Rejected: going on with the same
        chain next time (.124 of all blocks hit in place of .127, in a cache for 3,000).
        """
        score, cell = best
        bucket, clock = cell % BUCKETS, self._model.clock
        oldest, youngest = clock - STARTS[bucket + 1], clock - STARTS[bucket]
        sizes, costs, bands, uses = self._size, self._cost_us, self._band, self._uses
        freed_bytes = 0
        while True:
            values = (score * self.entries, *self._reason(slot, now_ms))
            chosen.append(Victim(slot, sizes[slot], score, LOWEST, values))
            freed_bytes += sizes[slot]
            if spare is not None:
                spare[self._tenant[slot]] -= sizes[slot]
            parent = self._take_out(slot)
            if parent == NO_SLOT:
                return freed_bytes
            alike = (
                uses[parent] == uses[slot]
                and sizes[parent] == sizes[slot]
                and costs[parent] == costs[slot]
                and bands[parent] == bands[slot]
                and self._tenant[parent] == self._tenant[slot]
                and oldest < self._last[parent] <= youngest
            ) or self._cell_now(parent) == cell
            spent = spare is not None and spare.get(self._tenant[parent], 0) <= 0
            if not alike or spent or freed_bytes >= size_bytes or not allowed(parent):
                self._freed(parent)
                return freed_bytes
            slot = parent

    def _take_out(self, slot: int) -> int:
        """What `remove` does for one without children and pins that stands in no cell any more.

        Returns its parent if that may leave now, which stands in no cell either; else NO_SLOT.
        """
        size_bytes, parent = self._size[slot], self._parent[slot]
        if self._cost_us[slot]:
            self._costs_us -= self._cost_us[slot]
            self._costed_bytes -= size_bytes
        self._remember(slot)
        self._resident[slot] = 0
        self._parent[slot] = NO_SLOT
        self.entries -= 1
        self.used_bytes -= size_bytes
        if parent == NO_SLOT:
            return NO_SLOT
        self._children[parent] -= 1
        return parent if self._is_free(parent) else NO_SLOT

    def _lowest(self, spare: Spare | None) -> tuple[float, int] | None:
        """The least worthy cell among the tenants that have something to spare."""
        best = None
        for tenant, order in self._orders.items():
            if spare is not None and spare.get(tenant, 0) <= 0:
                continue
            while order and order[0][1] not in self._cells:
                heapq.heappop(order)
            if order and (best is None or order[0] < best):
                best = order[0]
        return best

    def check_integrity(self) -> None:
        super().check_integrity()
        self._place_fresh()
        self._cells.check_integrity()
        self._model.check_integrity()
        standing = {slot for cell in self._cells for slot in self._cells.standing(cell)}
        free = {slot for slot in range(len(self._resident)) if self._is_free(slot)}
        assert standing == free, "those that may leave stand in cells, and no others"
        ordered = {cell for order in self._orders.values() for _, cell in order}
        assert ordered >= set(self._cells), "every cell has its rank"
        costed = [slot for slot, here in enumerate(self._resident) if here and self._cost_us[slot]]
        assert self._costs_us == sum(self._cost_us[slot] for slot in costed), "costs add up"
        assert self._costed_bytes == sum(self._size[slot] for slot in costed), "sizes add up"
