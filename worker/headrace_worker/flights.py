"""Plans that are being computed: begun, and not taken in yet.

Invariant: a sequence is in one of them at most, and while it is, it keeps its blocks: stages of a
pipeline write to them until its plan lands, later than rank 0 does anything else. So who is to end
meanwhile ends when the plan lands.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from headrace.types import FinishReason
from headrace_worker.policy.plan import Plan


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that is being computed. `start_ns`: when it began, wall-clock."""

    plan: Plan
    start_ns: int


class Flights:
    """Of one engine, in the order in which they began and will land."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()
        self._ending: dict[str, FinishReason] = {}
        self._landed_ns = 0

    def __len__(self) -> int:
        return len(self._flights)

    def begin(self, plan: Plan, start_ns: int) -> None:
        self._flights.append(Flight(plan, start_ns))

    def land(self) -> Flight:
        """The oldest; its `start_ns` is no earlier than the end of the one before."""
        flight = self._flights.popleft()
        return Flight(flight.plan, max(flight.start_ns, self._landed_ns))

    def note_landed(self, now_ns: int) -> None:
        self._landed_ns = now_ns

    def under_way(self) -> set[str]:
        """Ids of the sequences in them."""
        return {item.sequence.id for flight in self._flights for item in flight.plan.items}

    def end_later(self, job: str, reason: FinishReason) -> None:
        """`job`, which is under way, ends when its flight lands; the first reason counts."""
        self._ending.setdefault(job, reason)

    def take_ending(self, plan: Plan) -> dict[str, FinishReason]:
        """Who of a landed plan shall end."""
        ids = [item.sequence.id for item in plan.items if item.sequence.id in self._ending]
        return {job: self._ending.pop(job) for job in ids}

    def forget_endings(self) -> None:
        self._ending.clear()

    def check_integrity(self, jobs: set[str]) -> None:
        """`jobs` are all that are known."""
        sizes = [len(flight.plan.items) for flight in self._flights]
        under_way = self.under_way()
        assert len(under_way) == sum(sizes), "a sequence is in two flights"
        assert self._ending.keys() <= under_way <= jobs, "a flight without its job"
