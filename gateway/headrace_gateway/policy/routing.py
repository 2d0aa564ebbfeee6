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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Job
from headrace_gateway.policy.bookings import (
    ALL,
    FREE,
    NO_SLOT,
    NO_TURN,
    NONE,
    SHARED_BLOCKS,
    Demand,
    Room,
    shared_key,
)
from headrace_gateway.policy.expectations import Holders
from headrace_gateway.policy.fetching import NOTHING as NOTHING_SPARED
from headrace_gateway.policy.fetching import Fetching, Spared
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.rendezvous import Rendezvous
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


COSTS_MORE = "costs more"
"""The verdict where nobody had to ask for one."""


class Allows(Protocol):
    """Breakers, or who lets only some workers through besides."""

    def allows(self, worker: str, now_ms: int) -> bool: ...


class Score(NamedTuple):
    """A candidate; the smaller is the better one.

    `price` is what decides, in prompt tokens: `cost`, which is of `uncached_tokens` that it would
    compute and of `work` that waits and decodes there, and what new blocks cost where more than
    the mean was given lately (`share`, in parts of it). It holds `blocks` leading blocks of the
    prompt and has `jobs`. `verdict` says why it did (not) win.
    """

    price: float
    order: int
    worker: str
    blocks: int
    uncached_tokens: int
    work: float
    cost: float
    share: float
    jobs: int
    verdict: str = COSTS_MORE


class Answer(NamedTuple):
    """What room a worker has, whether its turn has to be waited for, and why."""

    room: Room
    patient: bool
    words: str


_FULL = Answer(NO_SLOT.room, False, NO_SLOT.reason)


class Route(NamedTuple):
    """The decision: a worker, or '' when the job has to wait; the reason; who was considered.

    The worker holds `cached_blocks` leading blocks of the prompt. What no worker holds and the
    cache services do was `spared` everywhere. `candidates` and what those `answers` that were asked
    are read together, as `scores`, where somebody wants to know.
    """

    worker: str
    reason: str
    cached_blocks: int = 0
    room: Room = Room.NONE
    candidates: Mapping[str, Score] = MappingProxyType({})
    answers: Mapping[str, Answer] = MappingProxyType({})
    spared: Spared = NOTHING_SPARED

    @property
    def scores(self) -> tuple[Score, ...]:
        """The candidates in the order in which they were looked at, with their verdicts."""
        asked = self.answers
        return tuple(
            score._replace(verdict=asked[worker].words) if worker in asked else score
            for worker, score in self.candidates.items()
        )


class _Hold(NamedTuple):
    """Leading blocks of the prompt that some workers (a bit set) hold, and what it would cost the
    fleet, besides the prefill itself, to have them computed elsewhere."""

    slots: int
    blocks: int
    saves: float


_NOTHING = _Hold(0, 0, 0.0)
_tuple = tuple.__new__
"""Makes a NamedTuple in a third of the time (a score for each candidate)."""


def _holds(found: list[Holders], scatter: float) -> list[_Hold]:
    """`found` with what it saves: `scatter` times the tokens, divided among their holders."""
    if len(found) == 1:
        blocks, slots = found[0]
        saves = scatter * blocks * BLOCK_TOKENS / slots.bit_count()
        return [_tuple(_Hold, (slots, blocks, saves))]
    parts, holders = [], 0
    for at, each in enumerate(found):
        holders += each.slots.bit_count()
        behind = found[at + 1].blocks if at + 1 < len(found) else 0
        parts.append(scatter * (each.blocks - behind) * BLOCK_TOKENS / holders)
    holds, saves = [], 0.0
    for each, part in zip(reversed(found), reversed(parts), strict=True):
        saves += part
        holds.append(_tuple(_Hold, (each.slots, each.blocks, saves)))
    holds.reverse()
    return holds


class Router:
    """Chooses a worker for each job; remembers nothing but the rendezvous orders."""

    def __init__(self, config: RoutingConfig | None = None) -> None:
        self._config = config or RoutingConfig()
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
    ) -> Route:
        """Where `job` goes at wall-clock `now_ms`; no worker when none has room.

        `shared`: what the cache services hold and how fast it is fetched.
        """
        names = workload.open_workers
        if not names:
            return Route("", "no worker is ready")
        if names is not self._named:
            self._rendezvous.set_names(names)
            self._named = names
        demand = workload.demand(job, now_ms)
        if demand.level != ALL and workload.is_hopeless(demand):
            return Route("", "no worker has room")

        def may(worker: str) -> bool:
            return breakers.allows(worker, now_ms)

        free = workload.free_ones(demand, may)
        none_free = free is not None and not free
        if none_free and (demand.level == ALL or workload.find(demand, demand.level, may) is None):
            return Route("", "no worker has room")
        index.expire(now_ms)
        choice = _Choice(self._config, workload, index, may, job, demand, now_ms)
        if shared is not None:
            choice.spare(shared)
        preferred = self._preferred(job, choice.known_blocks)
        if free:
            choice.consider([*free, *choice.holders()])
            choice.alone = free[0] if len(free) == 1 else ""
        else:
            choice.consider(self._worth_a_look(choice, preferred))
        return choice.best(preferred) or choice.anywhere()

    def _preferred(self, job: Job, known_blocks: int) -> tuple[str, ...]:
        first = known_blocks * BLOCK_KEY_BYTES
        unknown = job.blocks[first : first + BLOCK_KEY_BYTES] or job.blocks[-BLOCK_KEY_BYTES:]
        found = self._rendezvous.preferred(job.affinity + unknown)
        return found[: self._config.preferred_max]

    def _worth_a_look(self, choice: _Choice, preferred: tuple[str, ...]) -> list[str]:
        """In the order in which those that cost the same are taken."""
        workload = choice.workload
        least = workload.least_loaded(self._config.least_max)
        return [*preferred, *choice.holders(), workload.least_given, *least]


class _Choice:
    """One decision in the making."""

    __slots__ = (
        "_answers",
        "_beside_all",
        "_bits",
        "_blocks",
        "_config",
        "_demand",
        "_holds",
        "_index",
        "_may",
        "_most",
        "_new",
        "_scores",
        "_share",
        "_spared",
        "alone",
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
        now_ms: int,
    ) -> None:
        """`may`: whether a worker's breaker lets a job through."""
        self._config = config
        self.workload = workload
        self._index = index
        self._bits = index.bits
        self._may = may
        self._blocks = job.blocks
        self._demand = demand
        band, held, remaining, level = demand
        self._beside_all = demand if level == ALL else _tuple(Demand, (band, held, remaining, ALL))
        self._holds = _holds(index.leaders(job.blocks), config.recompute_weight - 1)
        self._most = self._holds[0] if self._holds else _NOTHING
        new = max(1, held - self._most.blocks * BLOCK_TOKENS)
        self._new = config.balance_weight * new
        """Tokens that nobody holds, as they count where more than the mean was given."""
        self._scores: dict[str, Score] = {}
        self._answers: dict[str, Answer] = {}
        """Of those that were asked for room: whoever costs more than who has it needs not be."""
        self._share = workload.share(demand, now_ms)
        self._spared = NOTHING_SPARED
        self.alone = ""
        """The only worker with free room, where that is known."""

    def spare(self, shared: Fetching) -> None:
        """What no worker holds and the cache services do is fetched, by whoever gets the job."""
        if not shared.index:
            return
        speed = self.workload.prefill_per_s
        self._spared = shared.spares(self._blocks, self._most.blocks, speed)

    @property
    def known_blocks(self) -> int:
        """Leading blocks of the prompt that some worker holds."""
        return self._most.blocks

    def holders(self) -> list[str]:
        """Who holds most of the prompt; of those that hold the same, who has a place and least to
        do."""
        wanted = self._config.holders_max
        chosen: list[str] = []
        for found in self._holds:
            if wanted <= 0:
                break
            names = self._index.names(found.slots, NAMED_MAX)
            if names is None:
                least = self.workload.by_load(SEARCHED_MAX)
                names = self._index.among(least, found.slots, wanted)
            elif len(names) > wanted:
                names = self.workload.lightest(names, wanted)
            wanted -= len(names)
            chosen += names
        return chosen

    def consider(self, workers: Iterable[str]) -> None:
        """Score `workers`, each once; those that drain are left out."""
        scores, holds, get_bit = self._scores, self._holds, self._bits.get
        tokens, saved = self._demand.held - self._spared.tokens, self._most.saves
        given, mean, new = self.workload.given, self._share, self._new
        comfort, most, block = self._config.comfort, SHARE_MAX, BLOCK_TOKENS
        mean_per_s = self.workload.prefill_per_s
        for standing in self.workload.standings(workers, self._demand.band):
            worker, work, jobs, per_s, full = standing
            if worker in scores:
                continue
            if full:
                self._answers[worker] = _FULL
            hold = _NOTHING
            if holds:
                bit = get_bit(worker, 0)
                for each in holds:
                    if each[0] & bit:
                        hold = each
                        break
            _, blocks, saves = hold
            uncached = tokens - blocks * block
            if uncached < 1:
                uncached = 1
            slow = slowness(per_s, mean_per_s) if per_s else 1.0
            cost = (work + uncached + saved - saves) * slow
            share = given[worker] * slow / mean
            # what is new there pushes older blocks out: that is to happen everywhere alike
            price = cost + new * ((share if share < most else most) - 1)
            if blocks and share > comfort:
                price += slow * self._excess(worker, share, work, hold)
            number = len(scores)
            facts = (price, number, worker, blocks, uncached, work, cost, share, jobs, COSTS_MORE)
            scores[worker] = _tuple(Score, facts)

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
        """The best candidate with free room; None if none has any.

        A holder that has prompts enough is worth waiting for, if the others are not worth it.
        """
        unknown = self.known_blocks * BLOCK_TOKENS < self._config.known_part * self._demand.held
        ranked = sorted(self._scores.values())
        if unknown:
            bound = self._config.load_bound
            within = [score for score in ranked if score.share <= bound]
            if len(within) < len(ranked):
                ranked = within + [score for score in ranked if score.share > bound]
        best: Score | None = None
        for score in ranked:
            answer = self._ask(score)
            if answer.room is FREE:
                best = best or score
                if not answer.patient:
                    break
        else:
            return None
        assert best is not None, "at least the last one asked has room"
        best = self._neighbour(best, preferred, unknown)
        return self._route(best, self._why(best, preferred, unknown))

    def _neighbour(self, best: Score, preferred: tuple[str, ...], unknown: bool) -> Score:
        """The first of `preferred` that costs about the same as `best`."""
        uncached = self._demand.held - best.blocks * BLOCK_TOKENS - self._spared.tokens
        most = best.price + self._config.neighbour_part * uncached
        for worker in preferred:
            near = self._scores.get(worker)
            if near is best:
                break
            if near is None or near.price > most:
                continue
            if unknown and self._is_over(near) and not self._is_over(best):
                continue
            if self._ask(near).room is FREE:
                return near
        return best

    def _is_over(self, score: Score) -> bool:
        return score.share > self._config.load_bound

    def _ask(self, score: Score) -> Answer:
        """Whether the worker has free room for the job, and its breaker lets it through."""
        answer = self._answers.get(score.worker)
        if answer is None:
            # nobody's room is asked for before it is known that there is no free one
            verdict = self.workload.room_for(score.worker, self._beside_all)
            if verdict is NO_TURN:
                verdict = self.workload.room_for(score.worker, self._demand)
            room, words = verdict
            patient = verdict is NO_TURN and score.blocks > 0
            if patient:
                room = self.workload.room_for(score.worker, self._demand, patient=True).room
            if room is not NONE and not self._may(score.worker):
                room, words = NONE, "its breaker is open"
            elif room is not NONE and self._is_over(score):
                words = "over its share"
            answer = _tuple(Answer, (room, patient, words))
            self._answers[score.worker] = answer
        return answer

    def _why(self, best: Score, preferred: tuple[str, ...], unknown: bool) -> str:
        if best.worker == self.alone:
            return "the only free room"
        if not unknown and best.blocks == self.known_blocks:
            return "holds most of the prompt"
        if not unknown:
            return "its holders have more to do than it saves"
        if best.worker not in preferred:
            return "all are over their share" if self._is_over(best) else "least to do"
        return "affinity" if best.worker == preferred[0] else "spill-over"

    def anywhere(self) -> Route:
        """Whoever has room, free room first, when no candidate has free room."""
        found = self.workload.find(self._demand, ALL, self._may)
        if found is not None:
            self.consider((found,))
            return self._route(self._scores[found], "the only free room")
        if self._demand.level != ALL:
            for score in sorted(self._scores.values()):
                room, words = self.workload.room_for(score.worker, self._demand)
                if room is Room.PREEMPTING and self._may(score.worker):
                    self._answers[score.worker] = Answer(room, False, words)
                    return self._route(score, words)
            found = self.workload.find(self._demand, self._demand.level, self._may)
        if found is None:
            return Route("", "no worker has room", 0, Room.NONE, self._scores, self._answers)
        self.consider((found,))
        room, words = self.workload.room_for(found, self._demand)
        self._answers[found] = Answer(room, False, words)
        return self._route(self._scores[found], words)

    def _route(self, chosen: Score, reason: str) -> Route:
        room = self._ask(chosen).room
        scores, answers = self._scores, self._answers
        facts = (chosen.worker, reason, chosen.blocks, room, scores, answers, self._spared)
        return _tuple(Route, facts)
