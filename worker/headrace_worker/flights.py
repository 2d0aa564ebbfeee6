"""Plans that are being computed: begun, and not taken in yet.

Invariant: while a sequence is in one, it keeps its blocks: stages of a pipeline write to them until
the plan lands, later than rank 0 does anything else. So who is to end meanwhile ends when the last
of its plans lands. Parts of one prompt may be in several, one behind the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from headrace.types import Finish
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
        self._ending: dict[str, Finish] = {}
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

    def end_later(self, job: str, finish: Finish) -> None:
        """`job`, which is under way, ends so when its last flight lands; the first one counts."""
        self._ending.setdefault(job, finish)

    @property
    def leaving(self) -> Collection[str]:
        """Who ends when its last flight lands."""
        return self._ending.keys()

    def take_ending(self, plan: Plan) -> dict[str, Finish]:
        """Who of a landed plan shall end now: nothing more of it is under way."""
        still = self.under_way()
        ids = [item.sequence.id for item in plan.items if item.sequence.id not in still]
        return {job: self._ending.pop(job) for job in ids if job in self._ending}

    def forget_endings(self) -> None:
        self._ending.clear()

    def check_integrity(self, jobs: set[str]) -> None:
        """`jobs` are all that are known."""
        under_way = self.under_way()
        drawn = [i.sequence.id for f in self._flights for i in f.plan.items if i.samples]
        assert len(drawn) == len(set(drawn)), "two tokens of one sequence are under way"
        assert self._ending.keys() <= under_way <= jobs, "a flight without its job"
