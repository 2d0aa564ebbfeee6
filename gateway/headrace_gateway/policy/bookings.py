"""One worker's bookings: the jobs on it, their sums, and whether one more fits besides.

Invariant: every sum is that of the jobs, and `profiles` and `refusals` are what these jobs imply:
whatever may free room drops both. A refusal is remembered as a size that did not fit, since what is
as large in both respects does not fit either (peak.py grows with both).

Room is asked by level: level b counts the jobs of bands 0 to b. "Fits" is the Past-Future peak
within the cap, where a prefix that several running jobs share counts once. Rejected: finding out
what a candidate shares with those that run, which makes its size another one at each worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Band, Job, JobProgress, WorkerRole
from headrace_gateway.policy.peak import PeakProfile
from headrace_gateway.policy.speeds import Speeds

JOBS_FACTOR = 2
"""Times its max_jobs are on a worker at most, those that wait for preemption included."""
TURN_MS = 2_000
"""Of prompts may wait on a worker: it never runs dry between two reports, and what waits longer
waits in the queue, where it can be reordered, told its place, and refused in time."""
SHARED_BLOCKS = 32
"""Shared prefixes are looked for in steps of so many blocks."""
SHARED_STEPS_MAX = 64
LEVELS = len(Band)
FULL_LAST = 1 << 60
"""Puts a worker behind all others, wherever it stands by load."""
ALL = int(Band.BATCH)
"""The level at which jobs of all bands count."""
_UNKNOWN = (None,) * LEVELS
_NONE_REFUSED = ((1 << 60, 1 << 60),) * LEVELS
"""What is forgotten at each change is these again, so that nothing is allocated for it."""
_T = TypeVar("_T")


_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


class Expect(Protocol):
    """Output tokens of a generation of `tenant` that is `longer_than` (Lengths.expect)."""

    def __call__(self, tenant: str, *, max_tokens: int, longer_than: int) -> int: ...


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker that takes jobs; one whose role is to decode takes those that move to it."""

    worker: str
    kv_tokens: int
    max_jobs: int
    role: WorkerRole = WorkerRole.BOTH


class Room(Enum):
    FREE = "free"
    PREEMPTING = "preempting"
    NONE = "none"


# asking an enum for a member or its length costs as much as ten look-ups of a name
FREE, NONE = Room.FREE, Room.NONE


class Verdict(NamedTuple):
    """Whether a worker has room for a job, and why (not)."""

    room: Room
    reason: str


FITS = Verdict(Room.FREE, "fits")
IDLE = Verdict(Room.FREE, "idle")
PREEMPTING = Verdict(Room.PREEMPTING, "lower bands give way")
CLOSED = Verdict(Room.NONE, "takes no jobs")
NO_SLOT = Verdict(Room.NONE, "has as many jobs as it takes")
NO_TOKENS = Verdict(Room.NONE, "its KV would overflow")
NO_TURN = Verdict(Room.NONE, "has prompts enough to compute")


class Demand(NamedTuple):
    """What a job asks of a worker: KV tokens from the start, output to come. Jobs of bands lower
    than `level` give way to it; at ALL it waits for free room."""

    band: int
    held: int
    remaining: int
    level: int


Standing = tuple[int, int, float]
"""How a worker stands for a job of one band: the work that goes on before and beside the job, which
is the load without the prefill of lower bands; its jobs; the prompt tokens that it computes in a
second, 0 while unknown. A plain tuple: each decision takes several apart, which takes a NamedTuple
ten times as long.
"""


class Charge(NamedTuple):
    """What a job's tenant has to be charged, in tokens; `input_tokens` may correct downwards."""

    job: str
    tenant: str
    weight: float
    band: Band
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Booking:
    """A job on a worker.

    `output` counts from the job's first attempt on, `expected` is where it may end. `waiting` is
    prefill to be done, `charged` the input tokens that its tenant has paid for; `corrects`: that is
    set right when the worker knows what was cached. `baseline`: the first report only says what
    another leader has charged. `steady`: the cached tokens that were told when nothing was left of
    its prompt to compute or to charge; as long as they are the same, it only makes output.
    """

    job: str
    tenant: str
    weight: float
    band: Band
    prompt: int
    logged: int
    max_tokens: int
    expected: int
    waiting: int
    charged: int
    corrects: bool
    baseline: bool
    output: int
    shares: tuple[int, ...]
    steady: int = -1

    @property
    def held(self) -> int:
        return self.prompt + self.output

    @property
    def remaining(self) -> int:
        remaining = self.expected - self.output
        return remaining if remaining > 1 else 1

    def advance(self, told: JobProgress, expect: Expect) -> tuple[int, int]:
        """Take in a report; input and output tokens to charge."""
        _, computed, cached, output = told
        made = 0
        if output > self.output:
            if not self.baseline:
                made = output - self.output
            self.output = output
        self.baseline = False
        if self.output >= self.expected:
            longer = expect(self.tenant, max_tokens=self.max_tokens, longer_than=self.output)
            self.expected = max(longer, self.output)
        correction = 0
        if computed or made:
            uncached = self.uncached(told)
            begun = self.output > self.logged
            self.waiting = 0 if begun else max(0, uncached - computed)
            if self.corrects:
                correction = uncached - self.charged
                self.charged = uncached
            self.steady = cached if begun else -1
        return correction, made

    def settle(self, told: JobProgress, expect: Expect) -> tuple[int, int]:
        """As `advance`, at its end: what was never computed, as its caller left, is not charged."""
        correction, made = self.advance(told, expect)
        if self.corrects:
            correction += min(told.computed, self.uncached(told)) - self.charged
        return correction, made

    def uncached(self, told: JobProgress) -> int:
        """Tokens that it had to compute before its first new one."""
        return max(0, self.prompt + self.logged - told.cached)

    def charge(self, input_tokens: int, output_tokens: int) -> Charge:
        facts = (self.job, self.tenant, self.weight, self.band, input_tokens, output_tokens)
        return _tuple(Charge, facts)


def booking_of(job: Job, remaining: int, uncached_tokens: int, *, found: bool) -> Booking:
    """What is booked when `job`, with `remaining` output to come, goes to a worker, or is `found`
    there."""
    logged = len(job.logged)
    return Booking(
        job.id,
        job.tenant,
        job.weight,
        job.band,
        len(job.prompt),
        logged,
        job.sampling.max_tokens,
        logged + remaining,  # expected
        uncached_tokens,  # waiting
        uncached_tokens,  # charged
        job.attempt == 1 and not found,  # corrects
        found,  # baseline
        logged,  # output
        _shares(job.blocks),
    )


class Bookings:
    """The jobs on one worker. Lists have a value per Band, or per level."""

    __slots__ = (
        "counts",
        "facts",
        "full",
        "held",
        "is_open",
        "jobs",
        "load",
        "number",
        "place",
        "profiles",
        "ranks",
        "refusals",
        "reserved",
        "roomy",
        "shared",
        "shares",
        "shut",
        "speeds",
        "standings",
        "waiting",
    )

    def __init__(self, facts: WorkerFacts, ranks: dict[str, int] | None = None) -> None:
        """`ranks`: where open workers stand, those that are known to be full behind all others."""
        self.facts = facts
        self.ranks = {} if ranks is None else ranks
        self.is_open = False
        self.jobs: dict[str, Booking] = {}
        self.counts = [0] * LEVELS
        self.waiting = [0] * LEVELS
        self.reserved = [0] * LEVELS
        self.held = 0
        self.load = 0
        self.number = 0
        """An open worker's own, in the order of names."""
        self.place = 0
        """Where an open worker stands among the others (load_order.py)."""
        self.full = 0
        """FULL_LAST when it is known to be full beside those of all bands, else 0."""
        self.roomy = False
        """Whether it is listed as one that may have room."""
        self.shares: dict[int, int] = {}
        self.shared = 0
        """Steps of prefixes that more than one job has."""
        self.profiles: Sequence[PeakProfile | None] = _UNKNOWN
        self.refusals: Sequence[tuple[int, int]] = _NONE_REFUSED
        """Per level the (held, remaining) that did not fit."""
        self.shut: Sequence[Verdict | None] = _UNKNOWN
        """Per level why nothing fits, whatever its size."""
        self.standings: Sequence[Standing | None] = _UNKNOWN
        """Per band, kept until something changes: most workers are looked at more often."""
        self.speeds = Speeds()

    def put(self, booking: Booking) -> None:
        """One more job: what did not fit still does not."""
        band, held = booking.band, booking.prompt + booking.output
        self.jobs[booking.job] = booking
        self.counts[band] += 1
        shares = self.shares
        for key in booking.shares:
            count = shares.get(key, 0)
            shares[key] = count + 1
            if count == 1:
                self.shared += 1
        self.waiting[band] += booking.waiting
        self.reserved[band] += held + booking.remaining
        self.held += held
        self.profiles = self.standings = _UNKNOWN

    def take(self, job_id: str) -> Booking | None:
        """The job leaves."""
        booking = self.jobs.pop(job_id, None)
        if booking is None:
            return None
        band, held = booking.band, booking.prompt + booking.output
        self.counts[band] -= 1
        shares = self.shares
        for key in booking.shares:
            count = shares[key] - 1
            if count:
                shares[key] = count
                if count == 1:
                    self.shared -= 1
            else:
                del shares[key]
        self.waiting[band] -= booking.waiting
        self.reserved[band] -= held + booking.remaining
        self.held -= held
        return booking

    def follow(self, report: Sequence[JobProgress], expect: Expect) -> list[Charge]:
        """Take in what is told of the jobs here; what has to be charged for it.

        Most of them have been told of before and only have more output: these are looked at in one
        go, since 500 workers tell of 64 jobs each four times a second.
        """
        charges, grown, jobs = [], 0, self.jobs
        for told in report:
            job, _, cached, output = told
            booking = jobs.get(job)
            if booking is None:
                continue
            if cached == booking.steady and output < booking.expected:
                made = output - booking.output
                if made > 0:
                    # as long as it is to come, output that was made is as much held as reserved
                    booking.output = output
                    grown += made
                    facts = (job, booking.tenant, booking.weight, booking.band, 0, made)
                    charges.append(_tuple(Charge, facts))
                continue
            correction, made = self.advance(booking, told, expect)
            if correction or made:
                charges.append(booking.charge(correction, made))
        self.held += grown
        return charges

    def advance(self, booking: Booking, told: JobProgress, expect: Expect) -> tuple[int, int]:
        """Booking.advance, with the sums kept."""
        band, waiting, held = booking.band, booking.waiting, booking.held
        reserved = held + booking.remaining
        charges = booking.advance(told, expect)
        self.waiting[band] += booking.waiting - waiting
        self.held += booking.held - held
        self.reserved[band] += booking.held + booking.remaining - reserved
        return charges

    def changed(self) -> None:
        """What did not fit may fit now."""
        self.profiles = self.shut = self.standings = _UNKNOWN
        self.refusals = _NONE_REFUSED
        self.full = 0

    def standing(self, band: int) -> Standing:
        """How it stands for a job of `band`, as long as the load is that of its sums; kept."""
        work = self.load
        if band != ALL:
            work -= sum(self.waiting[band + 1 :])
        found = (work, len(self.jobs), self.speeds.prefill_per_s)
        self.standings = _with(self.standings, band, found)
        return found

    def room(self, demand: Demand, kv_share: float, *, patient: bool = False) -> Verdict:
        """Whether `demand` may come; who is `patient` waits for its turn."""
        verdict = self.fits(ALL, demand, kv_share, patient=patient)
        if verdict.room is FREE or demand.level == ALL:
            return verdict
        own = self.fits(demand.level, demand, kv_share, patient=patient)
        return PREEMPTING if own.room is FREE else own

    def fits(
        self, level: int, demand: Demand, kv_share: float, *, patient: bool = False
    ) -> Verdict:
        """Whether `demand` fits beside the jobs of `level`: FREE or NONE."""
        shut = self.shut[level]
        if shut is not None and not (patient and shut is NO_TURN):
            return shut
        _, held, remaining, _ = demand
        refusal = self.refusals[level]
        if held >= refusal[0] and remaining >= refusal[1]:
            return NO_TOKENS
        count = jobs = len(self.jobs)
        waiting, reserved = self.waiting, self.reserved
        if level != ALL:
            count = sum(self.counts[: level + 1])
            waiting, reserved = waiting[: level + 1], reserved[: level + 1]
        jobs_max = self.facts.max_jobs
        if (count and count >= jobs_max) or (jobs and jobs >= JOBS_FACTOR * jobs_max):
            self.shut = _with(self.shut, level, NO_SLOT)
            if level == ALL:
                self.full = FULL_LAST
                if self.is_open:
                    self.ranks[self.facts.worker] = self.place + FULL_LAST
            return NO_SLOT
        if not count:
            return IDLE
        speed = self.speeds.prefill_per_s  # 0 while unknown
        if speed and not patient and sum(waiting) > speed * TURN_MS / 1000:
            self.shut = _with(self.shut, level, NO_TURN)
            return NO_TURN
        cap = int(kv_share * self.facts.kv_tokens)
        if sum(reserved) + held + remaining <= cap:
            return FITS
        if self._profile(level).peak_with(held, remaining) <= cap:
            return FITS
        self.refusals = _with(self.refusals, level, (held, remaining))
        return NO_TOKENS

    def _profile(self, level: int) -> PeakProfile:
        found = self.profiles[level]
        if found is None:
            bookings = [b for b in self.jobs.values() if b.band <= level]
            bookings.sort(key=_by_remaining)
            found = PeakProfile(
                _counted_once(bookings)
                if self.shared
                else [(b.held, b.remaining) for b in bookings]
            )
            self.profiles = _with(self.profiles, level, found)
        return found

    def check_integrity(self) -> None:
        bookings = list(self.jobs.values())
        for band in Band:
            mine = [b for b in bookings if b.band == band]
            assert self.counts[band] == len(mine), "jobs add up"
            assert self.waiting[band] == sum(b.waiting for b in mine), "prefill adds up"
            reserved = sum(b.held + b.remaining for b in mine)
            assert self.reserved[band] == reserved, "reserved tokens add up"
        assert self.held == sum(b.held for b in bookings), "held tokens add up"
        assert sum(self.shares.values()) == sum(len(b.shares) for b in bookings)
        assert self.shared == sum(count > 1 for count in self.shares.values())
        assert self.full == FULL_LAST * (self.shut[ALL] is NO_SLOT), "both say that it is full"
        for band in Band:
            known, kept = self.standings[band], self.standings
            assert known in (None, self.standing(band)), "nothing outdated is kept"
            self.standings = kept


def _with(values: Sequence[_T], level: int, value: _T) -> Sequence[_T]:
    """`values` with another one at a level."""
    changed = list(values)
    changed[level] = value
    return changed


def _by_remaining(booking: Booking) -> int:
    return booking.output - booking.expected


def _shares(blocks: bytes) -> tuple[int, ...]:
    """The keys of a prompt's blocks in steps: prompts share as many steps as are equal."""
    if len(blocks) < SHARED_BLOCKS * BLOCK_KEY_BYTES:
        return ()
    steps = memoryview(blocks).cast("Q")[SHARED_BLOCKS - 1 :: SHARED_BLOCKS]
    return tuple(steps[:SHARED_STEPS_MAX])


def shared_key(blocks: bytes, count: int) -> int:
    """The key by which bookings know the longest part of a prompt's first `count` blocks that they
    compare; there are at least SHARED_BLOCKS."""
    step = min(count // SHARED_BLOCKS, SHARED_STEPS_MAX) * SHARED_BLOCKS
    return memoryview(blocks).cast("Q")[step - 1]


def _counted_once(by_remaining: Sequence[Booking]) -> list[tuple[int, int]]:
    """(held, remaining), where whoever ends last pays for what is shared."""
    seen: set[int] = set()
    sizes = []
    for booking in by_remaining:
        own = sum(key not in seen for key in booking.shares)
        shared = (len(booking.shares) - own) * SHARED_BLOCKS * BLOCK_TOKENS
        seen.update(booking.shares)
        sizes.append((booking.held - shared, booking.remaining))
    return sizes
