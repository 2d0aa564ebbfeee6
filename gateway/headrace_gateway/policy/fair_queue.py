"""The dispatcher's queue: bands, then tenants by what they have had, then due time and arrival.

Invariant: the next job is the first of the highest band that waits, unless a lower band has earned
its next one (policy/band_shares.py). Within a band it is of the tenant with the least virtual
counter (policy/virtual_counters.py); among equals, and among a tenant's own jobs, the one that is
due first, then the one that arrived first, then the one pushed first. Whatever has room goes:
`heads` is empty only when nothing waits.

Bounds, corrections aside. A tenant that comes back from idle, with nothing owed, to a band where n
others wait: its first job goes after at most one job of each of them. A tenant that is ahead of the
least counter by g: while it waits, no other tenant of its band starts a job once it was charged
more than g. A band with share s: its next jobs, of work w_1..w_k, are handed out before the queue
has handed out (w_1 + .. + w_k) / s tokens of work and one job of each band more. A tenant's own job
is overtaken only by those that are due earlier; due times count from the arrival, so that ends.

Cost: each operation is O(log n) amortized (`order`: O(n), and the log for each place that it
gives). Counters of waiting tenants nearly always grow, so a heap entry may be out of date as long
as it is too low: it is renewed when it surfaces. Rejected: a sorted list over all jobs, which every
charge of a tenant would reorder.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.policy.priority import due_ms
from headrace.types import Band, Job
from headrace_gateway.policy.band_shares import BandShares
from headrace_gateway.policy.bookings import Charge
from headrace_gateway.policy.timeline import Timeline
from headrace_gateway.policy.virtual_counters import (
    INPUT_WEIGHT,
    OUTPUT_WEIGHT,
    Counter,
    VirtualCounters,
    virtual_tokens,
)

BAND_SHARES = (0.0, 0.10, 0.05)
"""Least share of the service (work tokens) of a band that waits: interactive goes first anyway."""
DEAD_MIN = 16
"""Dead heap entries that may lie about however few live ones there are."""
RUNNING_MAX = 65_536
"""Jobs handed off whose end is awaited to put their band's share right; the oldest are let go."""


@dataclass(slots=True)
class Queued:
    """A job that waits. `stream` and `entry` say where it is stored until it is handed off."""

    job: Job
    stream: str
    entry: str
    queued_ns: int
    rescued_from: str = ""


def input_tokens_of(job: Job) -> int:
    """Prompt tokens that somebody is expected to compute; the last one always is."""
    return max(1, len(job.prompt) - job.cached_tokens)


def work_of(job: Job) -> int:
    """Tokens of work expected: uncached prompt and output."""
    return max(0, len(job.prompt) - job.cached_tokens) + job.expected_output


@dataclass(slots=True, eq=False)
class _Slot:
    """One waiting job and its order among its tenant's; `number` is its sequence. `work`, of which
    `output`, is what is expected. `timed`: it has a deadline."""

    item: Queued
    due_ms: int
    number: int
    work: int
    output: int
    line: _Line | None = None
    live: bool = True
    timed: bool = False

    @property
    def virtual(self) -> float:
        """What it is expected to add to its tenant's counter."""
        job = self.item.job
        return virtual_tokens(job.weight, input_tokens_of(job), self.output)


_NO_KEY = (float("inf"), 0, 0, 0)
"""Of a line that has no entry in the band's heap yet."""
Entry = tuple[int, int, int, _Slot]
"""Due time, arrival, sequence: the sequence is unique, so slots are never compared."""


@dataclass(slots=True, eq=False)
class _Line:
    """One tenant's jobs in one band. `number`: its valid entry in the band's heap."""

    tenant: str
    counter: Counter
    jobs: list[Entry] = field(default_factory=list)
    count: int = 0
    key: tuple[float, int, int, int] = _NO_KEY
    number: int = 0

    def clean(self) -> None:
        self.jobs = [entry for entry in self.jobs if entry[3].live]
        heapq.heapify(self.jobs)

    def first(self) -> Entry:
        """The job to serve first; there is one."""
        jobs = self.jobs
        while not jobs[0][3].live:
            heapq.heappop(jobs)
        return jobs[0]


class _Queue:
    """One band's tenants that wait, least counter first."""

    def __init__(self, band: int, counters: VirtualCounters) -> None:
        self._band = band
        self._counters = counters
        self.lines: dict[str, _Line] = {}
        self._heap: list[tuple[float, int, int, int, int, _Line]] = []
        self._entries = 0
        self._head: _Slot | None = None
        """Whose turn it is, as long as its counter is at `_head_value` and nobody came or went."""
        self._head_counter = Counter(0.0, 0.0)
        self._head_value = 0.0

    def push(self, slot: _Slot, lift: bool) -> None:
        tenant = slot.item.job.tenant
        line = self.lines.get(tenant)
        if line is None:
            if lift:
                counter = self._counters.lift(tenant, self._band, self.least())
            else:
                counter = self._counters.keep(tenant, self._band)
            line = self.lines[tenant] = _Line(tenant, counter)
        slot.line = line
        heapq.heappush(line.jobs, (slot.due_ms, slot.item.job.arrived_ms, slot.number, slot))
        line.count += 1
        self._lowered(line)

    def drop(self, slot: _Slot) -> None:
        line = slot.line
        assert line is not None, "it was pushed"
        slot.live = False
        slot.line = None  # the line's heap may still name it: no circle is left to be collected
        line.count = count = line.count - 1
        if len(line.jobs) > 2 * count + DEAD_MIN:
            line.clean()
        self._head = None
        if not count:
            del self.lines[line.tenant]
            line.number = 0
            self._counters.leave(line.tenant, self._band)
            self._clean()

    def lowered(self, tenant: str) -> None:
        """`tenant` may come earlier than its heap entry says."""
        line = self.lines.get(tenant)
        if line is not None:
            self._lowered(line)

    def _lowered(self, line: _Line) -> None:
        key = self._key(line)
        if key < line.key:
            heapq.heappush(self._heap, self._entry(line, key))
            self._head = None
            self._clean()

    def head(self) -> _Slot:
        """Whose turn it is; there is one."""
        slot, counter = self._head, self._head_counter
        if slot is None or counter.value != self._head_value:
            line = self.first()
            assert line is not None, "somebody waits"
            counter, slot = line.counter, line.jobs[0][3]
            self._head, self._head_counter, self._head_value = slot, counter, counter.value
        return slot

    def first(self) -> _Line | None:
        """Whose tenant's turn it is; the first of its jobs waits."""
        heap = self._heap
        while heap:
            virtual, _, _, sequence, number, line = heap[0]
            if number != line.number:
                heapq.heappop(heap)
                continue
            _, _, first, slot = line.jobs[0]
            if first == sequence and slot.live and line.counter.value == virtual:
                self._counters.advance(self._band, virtual)
                return line
            # written out, as it is done for each job that goes: its tenant has had more by now
            due, arrived, first, _ = line.first()
            virtual, number = line.counter.value, self._entries + 1
            line.key = (virtual, due, arrived, first)
            self._entries = line.number = number
            heapq.heapreplace(heap, (virtual, due, arrived, first, number, line))
        return None

    def least(self) -> float | None:
        """The least counter of those that wait."""
        line = self.first()
        return None if line is None else line.counter.value

    def order(self, limit: int) -> list[_Slot]:
        """The first `limit` jobs in the order in which they go if all do the expected work."""
        found: list[_Slot] = []
        if limit <= 0:
            return found
        start = [(line.counter.value, *line.first(), line) for line in self.lines.values()]
        heapq.heapify(start)
        copies: dict[str, list[Entry]] = {}
        while start and len(found) < limit:
            virtual, _, _, _, slot, line = start[0]
            found.append(slot)
            if line.count == 1:
                heapq.heappop(start)
                continue
            jobs = copies.get(line.tenant)
            if jobs is None:
                jobs = copies[line.tenant] = line.jobs.copy()
            heapq.heappop(jobs)
            while jobs and not jobs[0][3].live:
                heapq.heappop(jobs)
            if jobs:
                heapq.heapreplace(start, (virtual + slot.virtual, *jobs[0], line))
            else:
                heapq.heappop(start)
        return found

    def check_integrity(self) -> None:
        valid = {id(e[5]): e for e in self._heap if e[4] == e[5].number}
        assert len(valid) == len(self.lines), "each tenant that waits has one valid entry"
        for tenant, line in self.lines.items():
            live = [entry for entry in line.jobs if entry[3].live]
            assert line.count == len(live) > 0, "a line counts its jobs and is never empty"
            assert all(slot.item.job.tenant == tenant for *_, slot in live), "each in its own line"
            assert valid[id(line)][:4] == line.key, "the entry stands under the line's key"
            assert line.key <= self._key(line), "keys are never too high"
            value = self._counters.value(tenant, self._band)
            assert value == line.counter.value, "a line's counter is its tenant's"
        if self.lines:
            head, self._head = self.head(), None
            assert head is self.head(), "whose turn it is was looked at again when it had to be"

    def _key(self, line: _Line) -> tuple[float, int, int, int]:
        due, arrived, number, _ = line.first()
        return (line.counter.value, due, arrived, number)

    def _entry(
        self, line: _Line, key: tuple[float, int, int, int]
    ) -> tuple[float, int, int, int, int, _Line]:
        self._entries += 1
        line.key, line.number = key, self._entries
        return (*key, self._entries, line)

    def _clean(self) -> None:
        if len(self._heap) > 2 * len(self.lines) + DEAD_MIN:
            self._heap = [entry for entry in self._heap if entry[4] == entry[5].number]
            heapq.heapify(self._heap)


class _Running(NamedTuple):
    """What `take` assumed of a job. `ahead`: it went before a higher band."""

    band: int
    expected_output: int
    ahead: bool


_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


class FairQueue:
    """Jobs that wait for a worker. `shares`: each band's guaranteed minimum of the service."""

    def __init__(self, shares: tuple[float, float, float] = BAND_SHARES) -> None:
        self.counters = VirtualCounters()
        self._shares = BandShares(shares)
        self._queues = tuple(_Queue(int(band), self.counters) for band in Band)
        self._numbered = tuple(enumerate(self._queues))
        self._slots: dict[str, _Slot] = {}
        self._deadlines: Timeline[Queued] = Timeline()
        self._waits: Timeline[Queued] = Timeline()
        self._running: dict[str, _Running] = {}
        self._sequence = 0
        self._counts = [0 for _ in Band]
        self._work = [0 for _ in Band]

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._slots

    @property
    def counts(self) -> tuple[int, int, int]:
        """Waiting jobs per Band."""
        return (self._counts[0], self._counts[1], self._counts[2])

    @property
    def work(self) -> tuple[int, int, int]:
        """Tokens of expected work that wait, per Band."""
        return (self._work[0], self._work[1], self._work[2])

    def push(self, item: Queued) -> bool:
        """Queue `item`; False if its job waits already. A tenant back from idle is lifted."""
        return self._add(item, lift=True)

    def put_back(self, item: Queued, input_tokens: int) -> bool:
        """Undo `take`: nobody took the job after all. False if it waits already."""
        job = item.job
        running = self._running.pop(job.id, None)
        self.charge(job.tenant, job.weight, job.band, input_tokens=-max(1, input_tokens))
        added = self._add(item, lift=False)
        if running is not None:
            work = -_taken_work(input_tokens, running.expected_output)
            self._shares.corrected(running.band, work, self._counts, running.ahead)
        return added

    def remove(self, job_id: str) -> Queued | None:
        """Take `job_id` out, unserved; None if it does not wait."""
        slot = self._slots.get(job_id)
        return None if slot is None else self._drop(slot)

    def heads(self) -> list[Queued]:
        """The next job of each band that waits, in the order in which to try them.

        If the first finds no room the next may go. A lower band's stands before a higher one's
        where it has earned its turn.
        """
        ahead: list[Queued] = []
        ranked: list[Queued] = []
        shares, counts = self._shares, self._counts
        for band, queue in self._numbered:
            if counts[band]:
                slot = queue.head()
                if ranked and shares.is_due(band, slot.work):
                    ahead.append(slot.item)
                else:
                    ranked.append(slot.item)
        return ahead + ranked if ahead else ranked

    def take(self, job_id: str, input_tokens: int) -> Queued | None:
        """`job_id` was handed off; its tenant is charged `input_tokens`, at least one, of prompt.

        Output is charged as it appears (`charge`); say `finished` at the end. None if the job does
        not wait.
        """
        slot = self._slots.get(job_id)
        if slot is None:
            return None
        job = slot.item.job
        band, work = job.band, input_tokens + slot.output
        if work < 1:
            work = 1
        ahead = self._shares.taken(band, work, self._counts)
        self._running[job_id] = _tuple(_Running, (band, slot.output, ahead))
        if len(self._running) > RUNNING_MAX:
            del self._running[next(iter(self._running))]
        item = self._drop(slot)
        self.counters.charge(job.tenant, job.weight, band, max(1, input_tokens))
        return item

    def charge(
        self, tenant: str, weight: float, band: int, input_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        """`tenant` was served so many tokens more in `band`; negative ones correct a charge."""
        self.counters.charge(tenant, weight, band, input_tokens, output_tokens)
        if input_tokens < 0 or output_tokens < 0:
            self._queues[band].lowered(tenant)

    def charge_all(self, charges: Iterable[Charge]) -> None:
        """`charge` each."""
        known = self.counters.by_band
        for _, tenant, weight, band, input_tokens, output_tokens in charges:
            counter = known[band].get(tenant)
            if counter is None or input_tokens < 0 or output_tokens < 0:
                self.charge(tenant, weight, band, input_tokens, output_tokens)
            else:
                # written out, as reports charge for each job four times a second; what only grows
                # is not below its floor
                tokens = INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens
                counter.value += tokens / weight

    def finished(self, job_id: str, output_tokens: int) -> None:
        """A job that was taken has ended with `output_tokens`: its band's share is put right."""
        running = self._running.pop(job_id, None)
        if running is not None:
            more = output_tokens - running.expected_output
            self._shares.corrected(running.band, more, self._counts, running.ahead)

    def late(self, now_ms: int) -> list[Queued]:
        """Jobs whose deadline has passed, the earliest first; they wait until they are removed."""
        return self._deadlines.passed(now_ms)

    def queued_before(self, instant_ns: int) -> list[Queued]:
        """The jobs that have waited since before `instant_ns`, those that wait longest first."""
        return self._waits.passed(instant_ns - 1)

    def order(self, limit: int) -> list[tuple[Queued, int]]:
        """The predicted order of service with the tokens of work ahead of each, bands strictly.

        Each job is assumed to do the work expected of it, and nobody else to come.
        """
        places: list[tuple[Queued, int]] = []
        ahead = 0
        for queue in self._queues:
            for slot in queue.order(limit - len(places)):
                places.append((slot.item, ahead))
                ahead += slot.work
        return places

    def check_integrity(self) -> None:
        """Assert that all views of the waiting jobs agree."""
        for band, queue in enumerate(self._queues):
            queue.check_integrity()
            slots = [slot for slot in self._slots.values() if slot.item.job.band == band]
            assert sum(line.count for line in queue.lines.values()) == len(slots), "lines add up"
            assert self._counts[band] == len(slots), "counts add up"
            assert self._work[band] == sum(slot.work for slot in slots), "work adds up"
        assert all(slot.live for slot in self._slots.values()), "the index holds live jobs"
        assert len(self._waits) == len(self._slots), "each job's wait is watched"
        assert len(self._running) <= RUNNING_MAX, "few enough running jobs are remembered"
        for part in (self._deadlines, self._waits, self.counters):
            part.check_integrity()
        self._shares.check_integrity(self._counts)

    def _add(self, item: Queued, lift: bool) -> bool:
        job = item.job
        job_id, band = job.id, job.band
        if job_id in self._slots:
            return False
        self._sequence = number = self._sequence + 1
        output, tokens = job.expected_output, len(job.prompt) - job.cached_tokens
        work = output + tokens if tokens > 0 else output
        slot = self._slots[job_id] = _Slot(item, due_ms(job), number, work, output)
        self._queues[band].push(slot, lift)
        self._counts[band] += 1
        self._work[band] += work
        self._waits.add(item.queued_ns, number, item)
        if deadline := _deadline_ms(job):
            slot.timed = True
            self._deadlines.add(deadline, number, item)
        if job_id in self._running:
            # not before it waits: an idle band could not be given back what it had paid for it
            self.finished(job_id, len(job.logged))
        return True

    def _drop(self, slot: _Slot) -> Queued:
        item, number = slot.item, slot.number
        job = item.job
        band = job.band
        del self._slots[job.id]
        self._queues[band].drop(slot)
        self._counts[band] -= 1
        self._work[band] -= slot.work
        self._waits.drop(number)
        if slot.timed:
            self._deadlines.drop(number)
        if not self._counts[band]:
            self._shares.idle(band)
        return item


def _taken_work(input_tokens: int, expected_output: int) -> int:
    return max(1, input_tokens + expected_output)


def _deadline_ms(job: Job) -> int:
    """When `job` is late (as priority.is_late has it); 0: never."""
    first, last = 0 if job.logged else job.ttft_by_ms, job.done_by_ms
    return min(first, last) if first and last else first or last
