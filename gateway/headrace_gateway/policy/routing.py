"""Which worker gets a job: where it costs least, with a bound on what any one is given.

Invariant: a job goes only where there is room and the breaker lets it. While any such worker has
room one gets it, and free room goes before room that lower bands have to give up.

The cost of a worker is what waits and decodes there, and the prompt tokens that it does not hold.
Those that others hold count RECOMPUTE_WEIGHT times, divided among the holders: besides the prefill,
one more copy pushes out somebody else's blocks, which pays only for what many want. New tokens
count more where more than the mean was given lately (a worker's share), less where it was less:
caches that lose blocks at one speed hit like one large cache.

Over LOAD_BOUND times the mean a worker gets no prompt that nobody holds. A hot prefix, of which it
runs SHARERS at a time, costs more and more there from COMFORT on, until at LOAD_BOUND holding it
saves nothing; so it is copied when load asks for it, and a conversation stays where it is.

Among those that cost the same within NEIGHBOUR_PART of the prompt, the rendezvous order of its
first unknown block decides: prompts that only begin alike spread, and equal ones meet again, from
whichever gateway. Not all of 500 workers are looked at, but those that can win: the preferred, the
best holders, the one that was given least, those with least to do.

Sources: NVIDIA Dynamo (cost); Thaler and Ravishankar 1996 (rendezvous); Mirrokni, Thorup and
Zadimoghaddam 2016 (bounded loads). Rejected: the longest prefix alone, which herds; the cost of
this job alone (weight 1), which on Mooncake's trace gives away a third of the hits when workers are
busy; a bound on what is there at the moment, which in a half idle fleet most busy workers exceed;
moving whatever is on a worker over its share, which scatters conversations after a busy minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Job
from headrace_gateway.policy.bookings import ALL, NO_TURN, SHARED_BLOCKS, Demand, Room, shared_key
from headrace_gateway.policy.breaker import Breakers
from headrace_gateway.policy.expectations import Holders
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.rendezvous import Rendezvous
from headrace_gateway.policy.workload import Workload

LOAD_BOUND = 1.25
COMFORT = 1.125
RECOMPUTE_WEIGHT = 12.0
BALANCE_WEIGHT = 3.0
SHARE_MAX = 2.0
"""Times the mean: more does not count more."""
SHARERS = 4
BUSY_PART = 0.25
"""Of a prompt too short to count sharers: a worker with so much other work is as good as hot."""
KNOWN_PART = 0.25
"""A prompt of which nobody holds so much counts as unknown."""
NEIGHBOUR_PART = 0.25
HOLDERS_MAX = 3
PREFERRED_MAX = 2
LEAST_MAX = 1
SEARCHED_MAX = 64
"""Workers, least loaded first, among which the holders of a hot prefix are looked for."""


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """What can be tuned; the numbers of candidates bound what a decision costs."""

    load_bound: float = LOAD_BOUND
    comfort: float = COMFORT
    recompute_weight: float = RECOMPUTE_WEIGHT
    balance_weight: float = BALANCE_WEIGHT
    sharers: int = SHARERS
    busy_part: float = BUSY_PART
    known_part: float = KNOWN_PART
    neighbour_part: float = NEIGHBOUR_PART
    holders_max: int = HOLDERS_MAX
    preferred_max: int = PREFERRED_MAX
    least_max: int = LEAST_MAX

    def __post_init__(self) -> None:
        assert 1 <= self.comfort < self.load_bound, "comfort ends before the bound"
        assert self.busy_part > 0 and self.sharers > 0, "nobody is busy with nothing"


class Score(NamedTuple):
    """A candidate: prompt tokens it would compute, what waits and decodes there, the cost of both
    in tokens, what it was given lately in parts of the mean, its jobs, and the verdict."""

    worker: str
    uncached_tokens: int
    work: float
    cost: float
    share: float
    jobs: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Route:
    """The decision: a worker, or '' when the job has to wait; the reason; who was considered.

    The worker holds `cached_blocks` leading blocks of the prompt.
    """

    worker: str
    reason: str
    scores: tuple[Score, ...] = ()
    cached_blocks: int = 0
    room: Room = Room.NONE


class _Candidate(NamedTuple):
    """A worker that may get the job; the smallest is the best."""

    gives_way: bool
    price: float
    order: int
    worker: str
    blocks: int
    over: bool
    room: Room


class _Hold(NamedTuple):
    """Leading blocks of the prompt that some workers (a bit set) hold, and what it would cost the
    fleet, besides the prefill itself, to have them computed elsewhere."""

    slots: int
    blocks: int
    saves: float


_NOTHING = _Hold(0, 0, 0.0)


def _holds(found: list[Holders], scatter: float) -> list[_Hold]:
    """`found` with what it saves: `scatter` times the tokens, divided among their holders."""
    parts, holders = [], 0
    for at, each in enumerate(found):
        holders += each.slots.bit_count()
        behind = found[at + 1].blocks if at + 1 < len(found) else 0
        parts.append(scatter * (each.blocks - behind) * BLOCK_TOKENS / holders)
    holds, saves = [], 0.0
    for each, part in zip(reversed(found), reversed(parts), strict=True):
        saves += part
        holds.append(_Hold(each.slots, each.blocks, saves))
    holds.reverse()
    return holds


class Router:
    """Chooses a worker for each job; remembers nothing but the rendezvous orders."""

    def __init__(self, config: RoutingConfig | None = None) -> None:
        self._config = config or RoutingConfig()
        self._rendezvous = Rendezvous()
        self._named: tuple[str, ...] = ()

    def choose(
        self, job: Job, workload: Workload, index: PrefixIndex, breakers: Breakers, now_ms: int
    ) -> Route:
        """Where `job` goes at wall-clock `now_ms`; no worker when none has room."""
        names = workload.open_workers
        if not names:
            return Route("", "no worker is ready")
        if names is not self._named:
            self._rendezvous.set_names(names)
            self._named = names
        demand = workload.demand(job, now_ms)
        if workload.is_hopeless(demand):
            return Route("", "no worker has room")
        index.expire(now_ms)
        choice = _Choice(self._config, workload, index, breakers, job, demand, now_ms)
        preferred = self._preferred(job, choice.known_blocks)
        for worker in self._worth_a_look(choice, preferred):
            choice.consider(worker)
        return choice.best(preferred) or choice.anywhere()

    def _preferred(self, job: Job, known_blocks: int) -> tuple[str, ...]:
        first = known_blocks * BLOCK_KEY_BYTES
        unknown = job.blocks[first : first + BLOCK_KEY_BYTES] or job.blocks[-BLOCK_KEY_BYTES:]
        found = self._rendezvous.preferred(job.affinity + unknown)
        return found[: self._config.preferred_max]

    def _worth_a_look(self, choice: _Choice, preferred: tuple[str, ...]) -> Iterator[str]:
        """In the order in which those that cost the same are taken."""
        yield from preferred
        yield from choice.holders()
        yield choice.workload.least_given
        yield from choice.workload.least_loaded(self._config.least_max)


class _Choice:
    """One decision in the making."""

    __slots__ = (
        "_allows",
        "_blocks",
        "_candidates",
        "_config",
        "_demand",
        "_holds",
        "_index",
        "_most",
        "_new",
        "_now_ms",
        "_patient",
        "_scores",
        "_seen",
        "_share",
        "workload",
    )

    def __init__(
        self,
        config: RoutingConfig,
        workload: Workload,
        index: PrefixIndex,
        breakers: Breakers,
        job: Job,
        demand: Demand,
        now_ms: int,
    ) -> None:
        self._config = config
        self.workload = workload
        self._index = index
        self._allows = breakers.allows
        self._blocks = job.blocks
        self._now_ms = now_ms
        self._demand = demand
        self._holds = _holds(index.leaders(job.blocks), config.recompute_weight - 1)
        self._most = self._holds[0] if self._holds else _NOTHING
        self._new = max(1, demand.held - self._most.blocks * BLOCK_TOKENS)
        """Tokens that nobody holds."""
        self._seen: dict[str, None] = {}
        self._scores: list[Score] = []
        self._candidates: list[_Candidate] = []
        self._patient: list[_Candidate] = []
        """Holders that have prompts enough: worth waiting for, if the others are not worth it."""
        self._share = workload.share(self._demand, now_ms)

    @property
    def known_blocks(self) -> int:
        """Leading blocks of the prompt that some worker holds."""
        return self._most.blocks

    def holders(self) -> Iterator[str]:
        """Who holds most of the prompt; of those that hold the same, who has least to do."""
        wanted = self._config.holders_max
        for found in self._holds:
            if wanted <= 0:
                return
            names = self._index.names(found.slots, wanted)
            if names is None:
                least = self.workload.least_loaded(SEARCHED_MAX)
                names = self._index.among(least, found.slots, wanted)
            wanted -= len(names)
            yield from names

    def consider(self, worker: str) -> None:
        """Score `worker`, once."""
        if worker in self._seen:
            return
        config, workload, demand = self._config, self.workload, self._demand
        standing = workload.standing(worker, demand)
        if standing is None:
            return  # it drains
        order = len(self._seen)
        self._seen[worker] = None
        bit, hold = self._index.bits.get(worker, 0), _NOTHING
        for each in self._holds:
            if each.slots & bit:
                hold = each
                break
        uncached = max(1, demand.held - hold.blocks * BLOCK_TOKENS)
        slowness = standing.slowness
        cost = (standing.work + uncached + self._most.saves - hold.saves) * slowness
        share = standing.given * slowness / self._share
        words = standing.verdict.reason
        room, candidates = standing.verdict.room, self._candidates
        if standing.verdict is NO_TURN and hold.blocks:
            room, candidates = workload.room_for(worker, demand, patient=True).room, self._patient
        if room is not Room.NONE:
            if self._allows(worker, self._now_ms):
                over = share > config.load_bound
                # what is new there pushes older blocks out: that is to happen everywhere alike
                price = cost + config.balance_weight * self._new * (min(share, SHARE_MAX) - 1)
                if share > config.comfort and hold.blocks:
                    price += slowness * self._excess(worker, share, standing.work, hold)
                if over:
                    words = "over its share"
                candidates.append(
                    _Candidate(room is not Room.FREE, price, order, worker, hold.blocks, over, room)
                )
            else:
                words = "its breaker is open"
        self._scores.append(
            Score(worker, uncached, standing.work, cost, share, standing.jobs, words)
        )

    def _excess(self, worker: str, share: float, work: float, hold: _Hold) -> float:
        """What being given more than others adds to the price: at most what holding saves."""
        config = self._config
        if hold.blocks >= SHARED_BLOCKS:
            key = shared_key(self._blocks, hold.blocks)
            busy = min(1.0, self.workload.sharers(worker, key) / config.sharers)
        else:
            busy = min(1.0, work / (config.busy_part * max(1, self._demand.held)))
        part = min(1.0, (share - config.comfort) / (config.load_bound - config.comfort))
        return busy * part * (hold.blocks * BLOCK_TOKENS + hold.saves)

    def best(self, preferred: tuple[str, ...]) -> Route | None:
        """The best candidate with free room; None if none has any."""
        free = [candidate for candidate in self._candidates if not candidate.gives_way]
        if not free:
            return None
        free.extend(each for each in self._patient if not each.gives_way)
        unknown = self.known_blocks * BLOCK_TOKENS < self._config.known_part * self._demand.held
        if unknown:
            free = [candidate for candidate in free if not candidate.over] or free
        best = min(free)
        uncached = self._demand.held - best.blocks * BLOCK_TOKENS
        most = best.price + self._config.neighbour_part * uncached
        by_worker = {candidate.worker: candidate for candidate in free}
        for worker in preferred:
            neighbour = by_worker.get(worker)
            if neighbour is not None and neighbour.price <= most:
                best = neighbour
                break
        return self._route(best, self._why(best, preferred, unknown))

    def _why(self, best: _Candidate, preferred: tuple[str, ...], unknown: bool) -> str:
        if not unknown and best.blocks == self.known_blocks:
            return "holds most of the prompt"
        if not unknown:
            return "its holders have more to do than it saves"
        if best.worker not in preferred:
            return "all are over their share" if best.over else "least to do"
        return "affinity" if best.worker == preferred[0] else "spill-over"

    def anywhere(self) -> Route:
        """Whoever has room, free room first, when no candidate has free room."""
        found = self.workload.find(self._demand, ALL, self._may)
        if found is not None:
            self.consider(found)
            return self._route(min(self._candidates), "the only free room")
        if not self._candidates:
            found = self.workload.find(self._demand, self._demand.level, self._may)
            if found is None:
                return Route("", "no worker has room", tuple(self._scores))
            self.consider(found)
        return self._route(min(self._candidates), "lower bands give way")

    def _may(self, worker: str) -> bool:
        return self._allows(worker, self._now_ms)

    def _route(self, chosen: _Candidate, reason: str) -> Route:
        return Route(chosen.worker, reason, tuple(self._scores), chosen.blocks, chosen.room)
