"""Ways to dispatch that others use, to compare with ours side by side.

Invariant: each has the interface through which the fleet drives DispatchPolicy, so that nothing
else differs. `fcfs` keeps one queue and binds late, as we do; the routers bind a job to a worker on
arrival, whatever waits there, as load balancers in front of engines do. All learn of ends and
reports with the same delays.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from headrace.errors import SettingsError
from headrace.types import Job, JobDone, JobMoved, Progress
from headrace_gateway.policy.dispatch import Decision, DispatchPolicy
from headrace_gateway.policy.fair_queue import Queued
from headrace_gateway.policy.outlook import Outlook
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.rendezvous import Rendezvous
from headrace_gateway.policy.route import Route
from headrace_gateway.policy.workload import WorkerFacts
from headrace_sim.scheduler import Rules

KV_SHARE = 0.95


class Dispatch(Protocol):
    """What the fleet asks of a dispatcher; DispatchPolicy says what each means."""

    def set_workers(self, facts: Sequence[WorkerFacts], now_ms: int, /) -> None: ...

    def push(self, item: Queued, /) -> bool: ...

    def cancel(self, job_id: str, /) -> Queued | None: ...

    def next(self, now_ms: int, /) -> Decision | None: ...

    def handed_off(self, decision: Decision, now_ms: int, /) -> None: ...

    def progress(self, report: Progress, now_ms: int, /) -> None: ...

    def done(self, done: JobDone, now_ms: int, /) -> None: ...

    def moved(self, moved: JobMoved, now_ms: int, /) -> None: ...

    def late(self, now_ms: int, /) -> list[Queued]: ...

    def outlook(self, now_ms: int, /) -> Outlook: ...

    def check_integrity(self) -> None: ...


class Loads:
    """Tokens and jobs on each worker, as a router counts them."""

    def __init__(self) -> None:
        self.facts: dict[str, WorkerFacts] = {}
        self.tokens: dict[str, int] = {}
        self.jobs: dict[str, int] = {}
        self.names: list[str] = []
        self._order: list[tuple[int, str]] = []

    def see(self, facts: WorkerFacts) -> None:
        """A worker is there."""
        worker = facts.worker
        self.facts[worker] = facts
        if worker not in self.tokens:
            self.tokens[worker] = self.jobs[worker] = 0
            self.names.append(worker)
            insort(self._order, (0, worker))

    def add(self, worker: str, tokens: int, jobs: int) -> None:
        """So many more on `worker`."""
        before = self.tokens[worker]
        self.tokens[worker] = before + tokens
        self.jobs[worker] += jobs
        del self._order[bisect_left(self._order, (before, worker))]
        insort(self._order, (before + tokens, worker))

    def room(self, worker: str, tokens: int) -> bool:
        facts = self.facts[worker]
        if not self.jobs[worker]:
            return True
        fits = self.tokens[worker] + tokens <= KV_SHARE * facts.kv_tokens
        return fits and self.jobs[worker] < facts.max_jobs

    def least(self) -> str:
        return self._order[0][1]

    def check_integrity(self) -> None:
        order = sorted((tokens, worker) for worker, tokens in self.tokens.items())
        assert order == self._order, "the order is that of the tokens"


Place = Callable[[Job, Loads], str]
"""Chooses a worker, '' for none."""


class Arrivals:
    """First come, first served; `place` chooses the worker. `index`: block reports go there."""

    def __init__(self, place: Place, index: PrefixIndex | None = None) -> None:
        self._place = place
        self._index = index
        self._loads = Loads()
        self._queue: deque[Queued] = deque()
        self._waiting: set[str] = set()
        self._counts, self._work = [0, 0, 0], [0, 0, 0]
        """Of who waits, per Band."""
        self._booked: dict[str, tuple[str, int]] = {}

    def set_workers(self, facts: Sequence[WorkerFacts], _now_ms: int) -> None:
        for each in facts:
            self._loads.see(each)

    def push(self, item: Queued) -> bool:
        self._queue.append(item)
        self._waiting.add(item.job.id)
        self._count(item.job, 1)
        return True

    def _count(self, job: Job, jobs: int) -> None:
        self._counts[job.band] += jobs
        self._work[job.band] += jobs * job.cost_tokens

    def cancel(self, job_id: str) -> Queued | None:
        if job_id not in self._waiting:
            return None
        item = next(item for item in self._queue if item.job.id == job_id)
        self._queue.remove(item)
        self._waiting.remove(job_id)
        self._count(item.job, -1)
        return item

    def next(self, _now_ms: int) -> Decision | None:
        if not self._queue:
            return None
        worker = self._place(self._queue[0].job, self._loads)
        return Decision(self._queue[0], Route(worker, "chosen"), 0.0) if worker else None

    def handed_off(self, decision: Decision, now_ms: int) -> None:
        job, worker = self._queue.popleft().job, decision.route.worker
        self._waiting.remove(job.id)
        self._count(job, -1)
        self._booked[job.id] = (worker, job.cost_tokens)
        self._loads.add(worker, job.cost_tokens, 1)
        if self._index is not None:
            self._index.expect(worker, job.blocks, now_ms)

    def progress(self, report: Progress, _now_ms: int) -> None:
        if self._index is not None:
            self._index.removed(report.worker, report.removed)
            self._index.stored(report.worker, report.stored)

    def done(self, done: JobDone, _now_ms: int) -> None:
        worker, tokens = self._booked.pop(done.progress.job)
        self._loads.add(worker, -tokens, -1)

    def moved(self, moved: JobMoved, _now_ms: int) -> None:
        """It makes no pairs, so nothing moves."""
        raise AssertionError(f"{moved.progress.job} moved, and nobody had said so")

    def late(self, _now_ms: int) -> list[Queued]:
        """It knows no deadlines."""
        return []

    def outlook(self, _now_ms: int) -> Outlook:
        """Its queue, and nothing about its speed."""
        counts, work = self._counts, self._work
        return Outlook(
            (counts[0], counts[1], counts[2]),
            (work[0], work[1], work[2]),
            (0, 0, 0),
            0.0,
            (0.0, 0.0, 0.0),
            0.0,
        )

    def check_integrity(self) -> None:
        assert {item.job.id for item in self._queue} == self._waiting, "queue and index agree"
        assert sum(self._loads.jobs.values()) == len(self._booked), "jobs add up"
        assert sum(self._loads.tokens.values()) == sum(t for _, t in self._booked.values())
        assert sum(self._counts) == len(self._queue), "who waits is counted"
        assert sum(self._work) == sum(item.job.cost_tokens for item in self._queue)
        self._loads.check_integrity()


def _least_with_room(job: Job, loads: Loads) -> str:
    worker = loads.least()
    return worker if loads.room(worker, job.cost_tokens) else ""


def _least(_job: Job, loads: Loads) -> str:
    return loads.least()


class _RoundRobin:
    def __init__(self) -> None:
        self._turn = -1

    def __call__(self, _job: Job, loads: Loads) -> str:
        self._turn = (self._turn + 1) % len(loads.names)
        return loads.names[self._turn]


class _AtRandom:
    def __init__(self, seed: int) -> None:
        self._rng = Random(f"random routing {seed}")

    def __call__(self, _job: Job, loads: Loads) -> str:
        return self._rng.choice(loads.names)


class _SessionHash:
    """Plain consistent hashing, whatever the load."""

    def __init__(self) -> None:
        self._rendezvous = Rendezvous()

    def __call__(self, job: Job, loads: Loads) -> str:
        self._rendezvous.set_names(tuple(loads.names))
        return self._rendezvous.preferred(job.affinity)[0]


class _LongestPrefix:
    """Where most of the prompt is cached, whatever the load; among equals the least loaded."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index

    def __call__(self, job: Job, loads: Loads) -> str:
        held = self._index.match(job.blocks)
        if not held:
            return loads.least()
        return min(held, key=lambda worker: (-held[worker], loads.tokens[worker], worker))


@dataclass(frozen=True, slots=True)
class Alternative:
    """A way to dispatch, and the order in which its workers serve.

    `refuses`: it has admission. `deadlines`: it knows of them. `sessions`: it needs to be told
    which conversation a request continues.
    """

    name: str
    about: str
    make: Callable[[int], Dispatch]
    rules: Rules = field(default_factory=lambda: Rules(fcfs=True))
    refuses: bool = False
    deadlines: bool = False
    sessions: bool = False


def _cache_aware(_seed: int) -> Dispatch:
    index = PrefixIndex()
    return Arrivals(_LongestPrefix(index), index)


OURS = Alternative(
    "headrace",
    "bands, fair shares and deadlines; late binding; cache-aware with bounded load",
    lambda _seed: DispatchPolicy(),
    Rules(),
    refuses=True,
    deadlines=True,
)
ALTERNATIVES = {
    each.name: each
    for each in (
        OURS,
        Alternative(
            "fcfs",
            "one queue in order of arrival, late binding to the least loaded",
            lambda _seed: Arrivals(_least_with_room),
        ),
        Alternative("round-robin", "each worker in turn", lambda _seed: Arrivals(_RoundRobin())),
        Alternative("random", "any worker", lambda seed: Arrivals(_AtRandom(seed))),
        Alternative(
            "least-loaded", "the fewest tokens outstanding", lambda _seed: Arrivals(_least)
        ),
        Alternative(
            "session-hash",
            "consistent hashing of the conversation",
            lambda _seed: Arrivals(_SessionHash()),
            sessions=True,
        ),
        Alternative("cache-aware", "the longest cached prefix, unbounded", _cache_aware),
    )
}


def chosen(names: str) -> list[Alternative]:
    """`all`, or names with commas. Raises SettingsError."""
    if names == "all":
        return list(ALTERNATIVES.values())
    found = []
    for name in filter(None, names.split(",")):
        if name not in ALTERNATIVES:
            raise SettingsError(f"{name!r} is no way to dispatch: {', '.join(ALTERNATIVES)}")
        found.append(ALTERNATIVES[name])
    return found
