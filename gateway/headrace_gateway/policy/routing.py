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
best holders, the one that was given least, those with least to do. In a full fleet it is known who
may have room, and nobody else but the holders is looked at.

Blocks that no worker holds and the cache services do count as what fetching them takes, in tokens
that would be computed meanwhile, for every worker alike (fetching.py).

Sources: NVIDIA Dynamo (cost); Thaler and Ravishankar 1996 (rendezvous); Mirrokni, Thorup and
Zadimoghaddam 2016 (bounded loads). Rejected: the longest prefix alone, which herds; the cost of
this job alone (weight 1), which on Mooncake's trace gives away a third of the hits when workers are
busy; a bound on what is there at the moment, which in a half idle fleet most busy workers exceed;
moving whatever is on a worker over its share, which scatters conversations after a busy minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Job
from headrace_gateway.policy.bookings import (
    ALL,
    FREE,
    NO_TURN,
    NONE,
    SHARED_BLOCKS,
    Demand,
    Room,
    shared_key,
)
from headrace_gateway.policy.fetching import NOTHING as NOTHING_SPARED
from headrace_gateway.policy.fetching import Fetching
from headrace_gateway.policy.holds import Hold, holds_of
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.rendezvous import Rendezvous
from headrace_gateway.policy.route import (
    FULL,
    NO_ANSWERS,
    NO_SCORES,
    Answer,
    Facts,
    Route,
)
from headrace_gateway.policy.speeds import slowness
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
HOLDERS_MAX = 2
PREFERRED_MAX = 2
LEAST_MAX = 1
SEARCHED_MAX = 64
"""Workers, least loaded first, among which the holders of a hot prefix are looked for."""
NAMED_MAX = 16
"""So few holders are all compared."""


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


class Allows(Protocol):
    """Breakers, or who lets only some workers through besides."""

    def allows(self, worker: str, now_ms: int) -> bool: ...


_WORKER: Final = 2
_BLOCKS: Final = 3
_SHARE: Final = 7
"""Where these stand in Facts."""
_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time."""


class Router:
    """Chooses a worker for each job; remembers nothing but the rendezvous orders."""

    def __init__(self, config: RoutingConfig | None = None, *, explains: bool = True) -> None:
        """`explains`: scores are read, so that those who cannot win are to be scored as well."""
        self._config = config or RoutingConfig()
        self._explains = explains
        self._rendezvous = Rendezvous()
        self._named: tuple[str, ...] = ()

    def choose(
        self,
        job: Job,
        workload: Workload,
        index: PrefixIndex,
        breakers: Allows,
        now_ms: int,
        shared: Fetching | None = None,
        *,
        priced: bool = True,
    ) -> Route:
        """Where `job` goes at wall-clock `now_ms`; no worker when none has room.

        `shared`: what the cache services hold and how fast it is fetched. `priced`: the route's
        scores are read; there may be none otherwise.
        """
        names = workload.open_workers
        if not names:
            return Route("", "no worker is ready")
        if names is not self._named:
            self._rendezvous.set_names(names)
            self._named = names
        demand = workload.demand(job, now_ms)
        level = demand.level
        if level != ALL and workload.is_hopeless(demand):
            return Route("", "no worker has room")

        def may(worker: str) -> bool:
            return breakers.allows(worker, now_ms)

        free = workload.free_ones(demand, may)
        none_free = free is not None and not free
        if none_free and (level == ALL or workload.find(demand, level, may) is None):
            return Route("", "no worker has room")
        index.expire(now_ms)
        choice = _Choice(self._config, workload, index, may, job, demand)
        if shared is not None and shared.index:
            choice.spare(shared)
        if not priced and free and len(free) == 1:
            route = choice.alone_with_room(free[0])
            if route is not None:
                return route
        choice.weigh(now_ms)
        preferred = self._preferred(job, choice.known_blocks)
        if free:
            choice.consider([*free, *choice.holders()], skip_full=not self._explains)
            choice.alone = free[0] if len(free) == 1 else ""
        else:
            choice.consider(self._worth_a_look(choice, preferred))
        return choice.best(preferred) or choice.anywhere()

    def _preferred(self, job: Job, known_blocks: int) -> tuple[str, ...]:
        first, blocks = known_blocks * BLOCK_KEY_BYTES, job.blocks
        unknown = blocks[first : first + BLOCK_KEY_BYTES] or blocks[-BLOCK_KEY_BYTES:]
        return self._rendezvous.preferred(job.affinity + unknown)[: self._config.preferred_max]

    def _worth_a_look(self, choice: _Choice, preferred: tuple[str, ...]) -> list[str]:
        """In the order in which those that cost the same are taken."""
        workload, holders = choice.workload, choice.holders()
        # with their order sorted for the holders, the first of all costs nothing
        least = workload.least_loaded(self._config.least_max)
        return [*preferred, *holders, workload.given.least(), *least]


class _Choice:
    """One decision in the making."""

    __slots__ = (
        "_answers",
        "_blocks",
        "_config",
        "_demand",
        "_found",
        "_holding",
        "_holds",
        "_index",
        "_may",
        "_saves",
        "_scores",
        "_share",
        "_spared",
        "alone",
        "known_blocks",
        "workload",
    )

    def __init__(
        self,
        config: RoutingConfig,
        workload: Workload,
        index: PrefixIndex,
        may: Callable[[str], bool],
        job: Job,
        demand: Demand,
    ) -> None:
        """`may`: whether a worker's breaker lets a job through."""
        self._config = config
        self.workload = workload
        self._index = index
        self._may = may
        self._blocks = blocks = job.blocks
        self._demand = demand
        self._found = found = index.leaders(blocks)
        self.known_blocks = found[0][0] if found else 0
        """Leading blocks of the prompt that some worker holds."""
        self._scores: dict[str, Facts] = {}
        self._answers: dict[str, Answer] = {}
        """Of those that were asked for room: whoever costs more than who has it needs not be."""
        self._spared = NOTHING_SPARED
        self.alone = ""
        """The only worker with free room, where that is known."""

    def weigh(self, now_ms: int) -> None:
        """What it takes to score workers."""
        self._share = self.workload.share(self._demand, now_ms)
        found = self._found
        self._holds: list[Hold] = []
        self._holding, self._saves = 0, 0.0
        """Who holds leading blocks, as a bit set, and what the first of them save."""
        if found:
            self._holds = holds_of(found, self._config.recompute_weight - 1)
            self._saves = self._holds[0][2]
            for each in found:
                self._holding |= each[1]

    def alone_with_room(self, worker: str) -> Route | None:
        """Where it goes if nobody but `worker` has free room; None if a holder may be worth waiting
        for. No price could change it."""
        known = self.workload.bookings
        for holder in self.holders():
            if holder != worker:
                each = known.get(holder)
                if each is not None and each.is_open and not each.full:
                    return None
        bit, blocks = self._index.bits.get(worker, 0), 0
        for held, slots in self._found:
            if slots & bit:
                blocks = held
                break
        reason = "the only free room"
        return _tuple(Route, (worker, reason, blocks, FREE, NO_SCORES, NO_ANSWERS, self._spared))

    def spare(self, shared: Fetching) -> None:
        """What no worker holds and the cache services do is fetched, by whoever gets the job."""
        speed = self.workload.prefill_per_s
        self._spared = shared.spares(self._blocks, self.known_blocks, speed)

    def holders(self) -> list[str]:
        """Who holds most of the prompt; of those that hold the same, who has a place and least to
        do."""
        wanted = self._config.holders_max
        chosen: list[str] = []
        for _, slots in self._found:
            if wanted <= 0:
                break
            names = self._index.names(slots, NAMED_MAX)
            if names is None:
                least = self.workload.by_load(SEARCHED_MAX)
                names = self._index.among(least, slots, wanted)
            elif len(names) > wanted:
                names = self.workload.lightest(names, wanted)
            wanted -= len(names)
            chosen += names
        return chosen

    def consider(self, workers: Iterable[str], *, skip_full: bool = False) -> None:
        """Score `workers`, each once; those that drain are left out, and with `skip_full` those
        that are known to have no room either."""
        scores, holds, holding = self._scores, self._holds, self._holding
        band, held, _, _ = self._demand
        saved, mean, comfort = self._saves, self._share, self._config.comfort
        workload, get_bit = self.workload, self._index.bits.get
        get, given, mean_per_s = workload.bookings.get, workload.given.sums, workload.prefill_per_s
        # tokens that nobody holds, as they count where more than the mean was given
        new = self._config.balance_weight * max(1, held - self.known_blocks * BLOCK_TOKENS)
        tokens = held - self._spared.tokens
        bare = tokens if tokens > 1 else 1
        for worker in workers:
            known = get(worker)
            if known is None or worker in scores or not known.is_open:
                continue
            work, jobs, per_s = known.standings[band] or known.standing(band)
            if known.full:
                if skip_full:
                    continue
                self._answers[worker] = FULL
            bit = holding and holding & get_bit(worker, 0)
            if bit:
                for slots, blocks, saves in holds:  # noqa: B007 -- those of the first that has it
                    if slots & bit:
                        break
                uncached = tokens - blocks * BLOCK_TOKENS
                if uncached < 1:
                    uncached = 1
                cost = work + uncached + saved - saves
            else:
                blocks, uncached, cost = 0, bare, work + bare + saved
            share, slow = given[worker], 1.0
            if per_s:
                slow = slowness(per_s, mean_per_s)
                cost *= slow
                share *= slow
            share /= mean
            # what is new there pushes older blocks out: that is to happen everywhere alike
            price = cost + new * ((share if share < SHARE_MAX else SHARE_MAX) - 1)
            if blocks and share > comfort:
                price += slow * self._excess(worker, share, work, blocks, saves)
            scores[worker] = (
                price, len(scores), worker, blocks, uncached, work, cost, share, jobs,
            )  # fmt: skip

    def _excess(self, worker: str, share: float, work: float, blocks: int, saves: float) -> float:
        """What being given more than others adds to the price: at most what holding `blocks`
        saves."""
        config = self._config
        if blocks >= SHARED_BLOCKS:
            key = shared_key(self._blocks, blocks)
            busy = min(1.0, self.workload.sharers(worker, key) / config.sharers)
        else:
            busy = min(1.0, work / (config.busy_part * max(1, self._demand.held)))
        part = min(1.0, (share - config.comfort) / (config.load_bound - config.comfort))
        return busy * part * (blocks * BLOCK_TOKENS + saves)

    def best(self, preferred: tuple[str, ...]) -> Route | None:
        """The best candidate with free room; None if none has any.

        A holder that has prompts enough is worth waiting for, if the others are not worth it.
        """
        unknown = self.known_blocks * BLOCK_TOKENS < self._config.known_part * self._demand.held
        ranked = sorted(self._scores.values())
        if unknown:
            bound = self._config.load_bound
            within = [score for score in ranked if score[_SHARE] <= bound]
            if len(within) < len(ranked):
                ranked = within + [score for score in ranked if score[_SHARE] > bound]
        best: Facts | None = None
        answers = self._answers
        for score in ranked:
            answer = answers.get(score[_WORKER]) or self._ask(score)
            if answer.room is FREE:
                best = best or score
                if not answer.patient:
                    break
        else:
            return None
        assert best is not None, "at least the last one asked has room"
        if len(ranked) > 1:
            best = self._neighbour(best, preferred, unknown)
        return self._route(best, self._why(best, preferred, unknown))

    def _neighbour(self, best: Facts, preferred: tuple[str, ...], unknown: bool) -> Facts:
        """The first of `preferred` that costs about the same as `best`."""
        price, _, chosen, blocks, _, _, _, share, _ = best
        uncached = self._demand.held - blocks * BLOCK_TOKENS - self._spared.tokens
        most, bound = price + self._config.neighbour_part * uncached, self._config.load_bound
        for worker in preferred:
            if worker == chosen:
                break
            near = self._scores.get(worker)
            if near is None or near[0] > most:
                continue
            if unknown and near[_SHARE] > bound >= share:
                continue
            if self._ask(near).room is FREE:
                return near
        return best

    def _ask(self, score: Facts) -> Answer:
        """Whether the worker has free room for the job, and its breaker lets it through."""
        worker = score[_WORKER]
        answer = self._answers.get(worker)
        if answer is None:
            # nobody's room is asked for before it is known that there is no free one
            workload, demand = self.workload, self._demand
            verdict = workload.bookings[worker].fits(ALL, demand, workload.kv_share)
            (room, words), patient = verdict, False
            if verdict is NO_TURN:
                room, words = verdict = workload.room_for(worker, demand)
                patient = verdict is NO_TURN and score[_BLOCKS] > 0
                if patient:
                    room = workload.room_for(worker, demand, patient=True).room
            if room is not NONE:
                if not self._may(worker):
                    room, words = NONE, "its breaker is open"
                elif score[_SHARE] > self._config.load_bound:
                    words = "over its share"
            answer = self._answers[worker] = _tuple(Answer, (room, patient, words))
        return answer

    def _why(self, best: Facts, preferred: tuple[str, ...], unknown: bool) -> str:
        _, _, worker, blocks, _, _, _, share, _ = best
        if worker == self.alone:
            return "the only free room"
        if not unknown and blocks == self.known_blocks:
            return "holds most of the prompt"
        if not unknown:
            return "its holders have more to do than it saves"
        if worker not in preferred:
            over = share > self._config.load_bound
            return "all are over their share" if over else "least to do"
        return "affinity" if worker == preferred[0] else "spill-over"

    def anywhere(self) -> Route:
        """Whoever has room, free room first, when no candidate has free room."""
        workload, level = self.workload, self._demand.level
        found = workload.find(self._demand, ALL, self._may)
        if found is not None:
            self.consider((found,))
            return self._route(self._scores[found], "the only free room")
        if level != ALL:
            for score in sorted(self._scores.values()):
                worker = score[_WORKER]
                room, words = workload.room_for(worker, self._demand)
                if room is Room.PREEMPTING and self._may(worker):
                    self._answers[worker] = Answer(room, False, words)
                    return self._route(score, words)
            found = workload.find(self._demand, level, self._may)
        if found is None:
            return Route("", "no worker has room", 0, Room.NONE, self._scores, self._answers)
        self.consider((found,))
        room, words = workload.room_for(found, self._demand)
        self._answers[found] = Answer(room, False, words)
        return self._route(self._scores[found], words)

    def _route(self, chosen: Facts, reason: str) -> Route:
        worker = chosen[_WORKER]
        answer = self._answers.get(worker) or self._ask(chosen)
        asked, held = (self._scores, self._answers), chosen[_BLOCKS]
        return _tuple(Route, (worker, reason, held, answer.room, *asked, self._spared))
