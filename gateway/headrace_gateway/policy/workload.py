"""What is on each worker of a model: jobs, work still to do, and where there is room for more.

Invariant: a job is booked when it is dispatched or found on a worker, moves with the worker's
reports and goes when it is done; loads and their order are those of the bookings. Nothing here
decides whether a job exists: where it is wrong, the hand-off says so and the worker is read again.

Room is FREE where a job fits beside all that run. It is PREEMPTING where it fits beside those of
its own and better bands, since the engine takes lower bands' jobs out for it. That costs what they
have computed, so only interactive jobs take it at once, others when half of their time until the
first token is over. An idle worker takes any job.

Load is prefill-equivalent tokens: prefill that waits, and `decode_weight` of the KV tokens of every
job there, which each of its steps reads. Source: NVIDIA Dynamo's router, which sums the same two.
Besides it a worker has what it was given lately, finished or not (given.py). Rejected: counting
jobs, of which one may be a thousand times another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

from headrace.policy import priority
from headrace.types import Band, Job, JobDone, Progress
from headrace_gateway.policy.bookings import (
    ALL,
    CLOSED,
    FREE,
    FULL_LAST,
    LEVELS,
    NO_TOKENS,
    Bookings,
    Charge,
    Demand,
    Expect,
    Room,
    Verdict,
    WorkerFacts,
    booking_of,
)
from headrace_gateway.policy.given import HALF_LIFE_MS, Given
from headrace_gateway.policy.load_order import NUMBER, LoadOrder, place_of
from headrace_gateway.policy.refusals import Refusals

__all__ = ["Charge", "Demand", "Room", "Verdict", "WorkerFacts", "Workload", "WorkloadConfig"]

KV_SHARE = 0.95
DECODE_WEIGHT = 0.05
OUTPUT_WEIGHT = 2.0
"""An output token, as work given, in prefill tokens; as tenants are charged for it."""
FREE_MAX = 8
"""Workers that are asked at once; where more may have room, some of them are likely to have it."""


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """What can be tuned. `kv_share`: the part of a worker's KV that jobs may need at their peak."""

    kv_share: float = KV_SHARE
    decode_weight: float = DECODE_WEIGHT
    output_weight: float = OUTPUT_WEIGHT
    half_life_ms: int = HALF_LIFE_MS


_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time; for those that each decision makes several of."""
NOWHERE = 2 * FULL_LAST
"""The rank of who takes no jobs."""
_NOBODY = Bookings(WorkerFacts("", 0, 0))
"""In the place of a worker that is not known: it takes no jobs."""


class Workload:
    """The bookings of one model's workers."""

    def __init__(self, expect: Expect, config: WorkloadConfig | None = None) -> None:
        self._expect = expect
        self._config = config or WorkloadConfig()
        self._decode_weight = self._config.decode_weight
        self._workers: dict[str, Bookings] = {}
        self.bookings: Mapping[str, Bookings] = self._workers
        """What is known of each worker, for who looks at many; not to be changed by others."""
        self.kv_share = self._config.kv_share
        self._order = LoadOrder()
        """Who takes jobs."""
        self._roomy = LoadOrder()
        """All of these that may have room: who is known to be full goes when come across."""
        self.open_workers: tuple[str, ...] = ()
        """Those that take jobs, by name; the same tuple as long as they are the same."""
        self._ranks: dict[str, int] = {}
        """Where each of them stands, those that are known to be full behind all others."""
        self._refusals = Refusals(LEVELS)
        self.given = Given(self._config.half_life_ms)
        """What each worker was given lately."""
        self.prefill_per_s = 0.0
        """Uncached prompt tokens that one worker computes in a second; 0 while unknown."""
        self._speed = 0.0
        self._measured = 0

    # who is there

    def set_workers(self, facts: Sequence[WorkerFacts]) -> None:
        """These live and take jobs; others keep what is booked on them, or go if nothing is."""
        named = {each.worker: each for each in facts}
        for worker in [each for each in self._workers if each not in named]:
            if self._workers[worker].jobs:
                self._close(worker, self._workers[worker])
            else:
                self.forget(worker)
        for each in facts:
            known = self._at(each.worker)
            if known.facts != each or not known.is_open:
                known.facts, known.is_open = each, True
                self._changed(each.worker, known)
        names = tuple(sorted(named))
        if names != self.open_workers:
            self._set_open(names)

    def forget(self, worker: str) -> None:
        """`worker` is gone, with all that was booked on it."""
        known = self._workers.pop(worker, None)
        if known is not None:
            self._close(worker, known)
            self._note_speed(known.speeds.prefill_per_s, 0.0)
            if worker in self.open_workers:
                self._set_open(tuple(each for each in self.open_workers if each != worker))

    @property
    def workers(self) -> Collection[str]:
        """All of which something is known."""
        return self._workers.keys()

    def takes_jobs(self, worker: str) -> bool:
        return self._workers.get(worker, _NOBODY).is_open

    # what is on them

    def book(
        self, worker: str, job: Job, uncached_tokens: int, now_ms: int, *, found: bool = False
    ) -> None:
        """`job` is on `worker`, which will compute `uncached_tokens` of what it starts with.

        `found`: it was there already, so its first report only says what has been charged before.
        """
        known = self._workers.get(worker) or self._at(worker)
        if job.id in known.jobs:
            self.cancel(worker, job.id)
            known = self._at(worker)
        remaining = job.expected_output - len(job.logged)
        if remaining <= 0:
            remaining = self._longer(job)
        known.put(booking_of(job, remaining, uncached_tokens, found=found))
        self._reorder(known)
        self.given.add(worker, self._cost(uncached_tokens, remaining), now_ms)

    def cancel(self, worker: str, job_id: str) -> bool:
        """`job_id` is not on `worker` after all; whether it was booked there."""
        known = self._workers.get(worker)
        if known is None or known.take(job_id) is None:
            return False
        self._settle(worker, known)
        return True

    def booked(self, worker: str, job_id: str) -> bool:
        return job_id in self._workers.get(worker, _NOBODY).jobs

    def progress(self, report: Progress) -> list[Charge]:
        """Take in what `report.worker` says; what has to be charged for it."""
        known = self._workers.get(report.worker)
        if known is None:
            return []
        before = known.speeds.prefill_per_s
        known.speeds.note(report.busy_ms, report.prefill_tokens, report.output_tokens)
        self._note_speed(before, known.speeds.prefill_per_s)
        charges = known.follow(report.jobs, self._expect)
        self._changed(report.worker, known)
        self._reorder(known)
        return charges

    def done(self, done: JobDone) -> Charge | None:
        """A job ended: it leaves its worker. What is left to charge; None if it is not known."""
        known = self._workers.get(done.worker)
        booking = None if known is None else known.take(done.progress.job)
        if known is None or booking is None:
            return None
        self._settle(done.worker, known)
        return booking.charge(*booking.settle(done.progress, self._expect))

    # what fits

    def demand(self, job: Job, now_ms: int) -> Demand:
        """What `job` asks of any worker at wall-clock `now_ms`."""
        band, made = int(job.band), len(job.logged)
        level = band if band != ALL and priority.is_pressing(job, now_ms) else ALL
        remaining = job.expected_output - made
        if remaining <= 0:
            remaining = self._longer(job)
        return _tuple(Demand, (band, len(job.prompt) + made, remaining, level))

    def room(self, worker: str, job: Job, now_ms: int) -> Verdict:
        """Whether `job` may go to `worker` now."""
        return self.room_for(worker, self.demand(job, now_ms))

    def room_for(
        self, worker: str, demand: Demand, *, level: int | None = None, patient: bool = False
    ) -> Verdict:
        """As `room`, for who asks of many workers; who is `patient` waits for its turn there.

        At `level` ALL nobody gives way, whatever `demand` says; by default its own counts.
        """
        known = self._workers.get(worker)
        if known is None or not known.is_open:
            return CLOSED
        if (demand.level if level is None else level) == ALL:
            return known.fits(ALL, demand, self._config.kv_share, patient=patient)
        return known.room(demand, self._config.kv_share, patient=patient)

    def is_hopeless(self, demand: Demand) -> bool:
        """Whether it is known already that no worker has room for `demand`."""
        maybe = self._refusals.maybe(demand.level, demand.held, demand.remaining)
        return maybe is not None and maybe.workers == []

    def find(self, demand: Demand, level: int, allows: Callable[[str], bool]) -> str | None:
        """The least loaded worker that `allows` and that `demand` fits beside bands to `level`.

        Whoever refuses is not asked again for as much until something there changes, so that a
        fleet that is full is looked through in the time of what has changed.
        """
        maybe, count = (
            self._refusals.maybe(level, demand.held, demand.remaining),
            len(self.open_workers),
        )
        if maybe is None:
            found = self._ask(demand, level, (0, 0), self.by_load(count), count, allows)
        elif maybe.workers is None:
            found = self._ask(demand, level, maybe[:2], self._full_last(), count, allows)
        else:
            named = maybe.workers
            if len(named) > 1:
                named = self.lightest(named)
            found = self._ask(demand, level, maybe[:2], named, len(named), allows)
        return found[0] if found else None

    def free_ones(self, demand: Demand, allows: Callable[[str], bool]) -> list[str] | None:
        """All workers that `demand` fits on beside everything there, where these are few and that
        is known; None where any may have room."""
        maybe = self._refusals.maybe(ALL, demand.held, demand.remaining)
        if maybe is None and len(self.open_workers) == 1:
            [only] = self.open_workers  # whose price is no question
            fits = self._workers[only].fits(ALL, demand, self.kv_share).room is FREE
            return [only] if fits and allows(only) else None
        if maybe is None or maybe.workers is None or len(maybe.workers) > FREE_MAX:
            return None
        named = maybe.workers
        return self._ask(demand, ALL, maybe[:2], named, len(named), allows, FREE_MAX)

    def _full_last(self) -> Iterator[str]:
        """All that take jobs, least load first; those that are known to be full come last."""
        known, names, roomy = self._workers, self.open_workers, self._roomy
        places, at = roomy.places(), 0
        while at < len(places):
            number = places[at] & NUMBER
            each = known[names[number]]
            if each.full:
                roomy.drop(number)
                each.roomy = False
            else:
                at += 1
                yield names[number]
        # those that were found to be full on the way stood among the others
        all_ = self.by_load(len(names))
        yield from [worker for worker in all_ if not known[worker].roomy]

    def _ask(
        self,
        demand: Demand,
        level: int,
        refused: tuple[int, int],
        workers: Iterable[str],
        count: int,
        allows: Callable[[str], bool],
        wanted: int = 1,
    ) -> list[str]:
        """The first `wanted` that have room, of the `count` workers, where all others have refused
        a size. Those that refuse are remembered: as refusing what all refuse, unless it was the
        size that did not fit."""
        found, not_allowed, gone, sized = [], [], 0, False
        rest, known, kv_share = iter(workers), self._workers, self.kv_share
        for worker in rest:
            each = known[worker]
            if each.shut[level] is not None:  # as most are in a full fleet
                gone += 1
                continue
            verdict = each.fits(level, demand, kv_share)
            if verdict.room is not FREE:
                gone += 1
                sized = sized or verdict is NO_TOKENS
            elif allows(worker):
                found.append(worker)
                if len(found) == wanted:
                    break
            else:
                not_allowed.append(worker)
        # so that keeping the others' names costs no more than asking did
        if 2 * gone >= count - gone:
            held, remaining = demand[1:3] if sized else refused
            self._refusals.refused(level, held, remaining, [*found, *not_allowed, *rest])
        return found

    # figures

    def jobs_on(self, worker: str) -> Collection[str]:
        """Ids of the jobs on `worker`."""
        return self._workers.get(worker, _NOBODY).jobs.keys()

    def count_on(self, worker: str) -> int:
        return len(self._workers.get(worker, _NOBODY).jobs)

    def has_slot(self, worker: str) -> bool:
        """Whether `worker` could begin one more job, if its KV allows."""
        known = self._workers.get(worker, _NOBODY)
        return known.is_open and len(known.jobs) < known.facts.max_jobs

    def reserved_tokens(self, worker: str) -> int:
        """KV tokens that the jobs on `worker` hold and are expected to add."""
        return sum(self._workers.get(worker, _NOBODY).reserved)

    def waiting_tokens(self, worker: str) -> int:
        """Prompt tokens on `worker` that are still to be computed."""
        return sum(self._workers.get(worker, _NOBODY).waiting)

    def used(self, worker: str) -> float:
        """The larger part of its slots and its KV that the jobs on `worker` take."""
        known = self._workers.get(worker)
        if known is None or not known.facts.max_jobs or not known.facts.kv_tokens:
            return 0.0
        slots = len(known.jobs) / known.facts.max_jobs
        return max(slots, sum(known.reserved) / known.facts.kv_tokens)

    @property
    def capacity_tokens(self) -> int:
        """KV tokens of all workers that take jobs."""
        return sum(self._workers[worker].facts.kv_tokens for worker in self.open_workers)

    @property
    def free_jobs(self) -> int:
        """Slots that no job has, on the workers that take jobs."""
        opened = (self._workers[worker] for worker in self.open_workers)
        return sum(max(0, each.facts.max_jobs - len(each.jobs)) for each in opened)

    def load(self, worker: str) -> int:
        """Work that waits or runs on `worker`, in prefill-equivalent tokens."""
        return self._workers.get(worker, _NOBODY).load

    def least_loaded(self, limit: int) -> list[str]:
        """The first `limit` workers that take jobs, least load first, then by name."""
        if limit == 1 and self.open_workers:
            return [self.open_workers[self._order.least() & NUMBER]]
        return list(self.by_load(limit))

    def by_load(self, limit: int) -> Iterator[str]:
        """As `least_loaded`, for who may not want them all; valid until something changes."""
        names = self.open_workers
        return (names[place & NUMBER] for place in islice(self._order.places(), limit))

    def lightest(self, workers: Collection[str], limit: int | None = None) -> list[str]:
        """The first `limit` of `workers` that take jobs, least load first, then by name; those that
        are known to be full come last."""
        found = sorted(map(self._ranks.get, workers, repeat(NOWHERE)))
        names = self.open_workers
        return [names[rank & NUMBER] for rank in found[:limit] if rank < NOWHERE]

    def share(self, demand: Demand, now_ms: int) -> float:
        """What each worker would have been given lately if all work, with that of `demand`, had
        been dealt out evenly. In units that only `given` has too."""
        own = self.given.unit(now_ms) * self._cost(demand.held, demand.remaining)
        return (self.given.total + own) / len(self.open_workers)

    def sharers(self, worker: str, key: int) -> int:
        """Jobs on `worker` whose prompts begin alike, up to the block of `key` (shared_key)."""
        return self._workers.get(worker, _NOBODY).shares.get(key, 0)

    def check_integrity(self) -> None:
        """Order, loads and bookings say the same. Raises AssertionError."""
        opened = {name: each for name, each in self._workers.items() if each.is_open}
        assert self._order.places() == sorted(each.place for each in opened.values())
        roomy = sorted(each.place for each in opened.values() if each.roomy)
        assert self._roomy.places() == roomy, "it stands in both alike"
        for each in opened.values():
            assert each.roomy or each.full, "who may have room is listed"
        ranks = {name: each.place + each.full for name, each in opened.items()}
        assert self._ranks == ranks, "ranks are places, full ones last"
        self._order.check_integrity()
        self._roomy.check_integrity()
        assert tuple(sorted(opened)) == self.open_workers
        self._refusals.check_integrity()
        for level in Band:
            for held, remaining, maybe in self._refusals.known(level):
                assert set(maybe) <= opened.keys()
                demand = Demand(level, held, remaining, level)
                for name, each in opened.items():
                    fits = each.fits(level, demand, self._config.kv_share).room is Room.FREE
                    assert name in maybe or not fits, "it was refused everywhere else"
        for each in self._workers.values():
            load = sum(each.waiting) + round(self._decode_weight * each.held)
            assert each.load == load, "a load is that of the bookings"
            if each.is_open:
                assert each.place == place_of(each.load, each.number)
                assert self.open_workers[each.number] == each.facts.worker
            assert each.jobs or each.is_open, "who takes nothing and has nothing is forgotten"
            each.check_integrity()
        self.given.check_integrity()
        speeds = [each.speeds.prefill_per_s for each in self._workers.values()]
        assert self._measured == sum(speed > 0 for speed in speeds)
        assert abs(self._speed - sum(speeds)) <= 1e-6 * (1 + sum(speeds)), "speeds add up"

    # bookkeeping

    def _longer(self, job: Job) -> int:
        """Output tokens that `job` is expected to make yet, which has all that were predicted."""
        made, most = len(job.logged), job.sampling.max_tokens
        return max(1, self._expect(job.tenant, max_tokens=most, longer_than=made) - made)

    def _at(self, worker: str) -> Bookings:
        known = self._workers.get(worker)
        if known is None:
            known = self._workers[worker] = Bookings(WorkerFacts(worker, 0, 0), self._ranks)
        return known

    def _cost(self, uncached_tokens: int, remaining: int) -> float:
        """Of a job, as work given."""
        return uncached_tokens + self._config.output_weight * remaining

    def _set_open(self, names: tuple[str, ...]) -> None:
        """These take jobs, by name: who is open stands among the others by load, then by that."""
        self.open_workers = names
        self.given.set_workers(names)
        opened = [self._workers[name] for name in names]
        self._ranks.clear()
        for number, each in enumerate(opened):
            each.number, each.place = number, place_of(each.load, number)
            self._ranks[each.facts.worker] = each.place + each.full
        self._order.set_places(each.place for each in opened)
        self._roomy.set_places(each.place for each in opened if each.roomy)

    def _close(self, worker: str, known: Bookings) -> None:
        """`worker` takes no jobs any more; `_set_open` follows."""
        if known.is_open:
            known.is_open = known.roomy = False
            self._ranks.pop(worker, None)
            self._refusals.forget(worker)

    def _changed(self, worker: str, known: Bookings) -> None:
        """What did not fit on `worker` may fit now. Before it is reordered, if it is."""
        known.changed()
        if known.is_open:
            self._ranks[worker] = known.place
            self._refusals.changed(worker)
            if not known.roomy:
                known.roomy = True
                self._roomy.put(known.place)

    def _settle(self, worker: str, known: Bookings) -> None:
        """A job has left."""
        self._changed(worker, known)
        self._reorder(known)
        if not known.jobs and not known.is_open:
            self.forget(worker)

    def _reorder(self, known: Bookings) -> None:
        """Bring a worker's load and place in the order up to its sums."""
        interactive, standard, batch = known.waiting
        load = interactive + standard + batch + round(self._decode_weight * known.held)
        if load != known.load:
            known.load = load
            if known.is_open:
                known.place = place = place_of(load, known.number)
                self._ranks[known.facts.worker] = place + known.full
                self._order.put(place)
                if known.roomy:
                    self._roomy.put(place)

    def _note_speed(self, before: float, after: float) -> None:
        self._speed += after - before
        self._measured += (after > 0) - (before > 0)
        if not self._measured:
            self._speed = 0.0
        self.prefill_per_s = self._speed / self._measured if self._measured else 0.0
