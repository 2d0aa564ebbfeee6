"""Which worker gets a job: affinity, bounded shares, prefixes and their copies, room, breakers."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.policy.hashing import hash64
from headrace.types import (
    BLOCK_TOKENS,
    Band,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    Progress,
    Sampling,
    pack_tokens,
)
from headrace_gateway.policy.breaker import BreakerConfig, Breakers
from headrace_gateway.policy.prefix_index import PrefixIndex
from headrace_gateway.policy.rendezvous import PREFERRED, Rendezvous
from headrace_gateway.policy.route import Route
from headrace_gateway.policy.routing import (
    HOLDERS_MAX,
    LEAST_MAX,
    LOAD_BOUND,
    PREFERRED_MAX,
    Router,
    RoutingConfig,
)
from headrace_gateway.policy.workload import Room, WorkerFacts, Workload

NOW = 1_700_000_000_000


def twice(tenant: str, *, max_tokens: int, longer_than: int) -> int:
    return min(max_tokens, 2 * longer_than + 1)


def chain(name: str, blocks: int, after: bytes = b"") -> bytes:
    own = (hash64(f"{name}/{at}".encode()).to_bytes(8) for at in range(blocks))
    return after + b"".join(own)


def a_job(
    name: str,
    blocks: bytes = b"",
    *,
    tokens: int = 0,
    band: Band = Band.STANDARD,
    affinity: str = "",
    output: int = 50,
) -> Job:
    """A job whose prompt has these blocks and then some `tokens`."""
    return Job(
        id=name,
        model="m",
        tenant="t",
        band=band,
        arrived_ms=NOW,
        gateway="g",
        prompt=pack_tokens([0] * (len(blocks) // 8 * BLOCK_TOKENS + tokens)),
        sampling=Sampling(max_tokens=400),
        affinity=affinity.encode(),
        expected_tokens=output,
        blocks=blocks,
    )


class Fleet:
    """Workers and all that is known about them."""

    def __init__(
        self,
        count: int,
        *,
        kv_tokens: int = 1_000_000,
        max_jobs: int = 1_000,
        routing: RoutingConfig | None = None,
    ) -> None:
        self.names = [f"w{number:03}" for number in range(count)]
        self.workload = Workload(twice)
        self.workload.set_workers([WorkerFacts(w, kv_tokens, max_jobs) for w in self.names])
        self.index = PrefixIndex()
        self.breakers = Breakers(self.workload.count_on, BreakerConfig(stall_ms=5_000))
        self.router = Router(routing)

    def route(self, job: Job, now_ms: int = NOW) -> Route:
        return self.router.choose(job, self.workload, self.index, self.breakers, now_ms)

    def send(self, job: Job, now_ms: int = NOW) -> Route:
        route = self.route(job, now_ms)
        if route.worker:
            uncached = max(1, len(job.prompt) - route.cached_blocks * BLOCK_TOKENS)
            self.workload.book(route.worker, job, uncached, now_ms)
            self.index.expect(route.worker, job.blocks, now_ms)
            self.breakers.dispatched(route.worker, now_ms)
        return route

    def finish(self, worker: str, job: Job) -> None:
        told = JobProgress(job.id, len(job.prompt), 0, 1)
        self.workload.done(JobDone(worker, told, FinishReason.STOP))


# where unknown prompts go


def test_equal_prompts_meet_and_different_ones_spread() -> None:
    fleet = Fleet(4)
    assert len({fleet.route(a_job(f"j{i}", chain("same", 8))).worker for i in range(10)}) == 1
    spread = Counter(fleet.route(a_job(f"j{i}", chain(f"p{i}", 8))).worker for i in range(400))
    assert set(spread) == set(fleet.names)
    assert max(spread.values()) < 2 * min(spread.values())
    assert fleet.route(a_job("j", chain("same", 8))).reason == "affinity"


def test_prompts_that_begin_alike_spread_by_where_they_part() -> None:
    """All have one system prompt: it must not bring all of them to one worker."""
    fleet = Fleet(8)
    system = chain("system", 4)
    for worker in fleet.names:
        fleet.index.stored(worker, system)
    jobs = [a_job(f"j{i}", chain(f"p{i}", 60, after=system)) for i in range(400)]
    spread = Counter(fleet.route(job).worker for job in jobs)
    assert set(spread) == set(fleet.names)
    assert fleet.route(jobs[0]).worker == fleet.route(jobs[0]).worker


def test_a_session_brings_its_unknown_prompts_to_one_worker() -> None:
    fleet = Fleet(8)
    prompts = [a_job(f"j{i}", b"", tokens=10, affinity="session") for i in range(20)]
    assert len({fleet.route(job).worker for job in prompts}) == 1


@pytest.mark.parametrize("count", [5, 40])
def test_a_worker_that_comes_or_goes_moves_only_its_share(count: int) -> None:
    jobs = [a_job(f"j{i}", chain(f"p{i}", 4)) for i in range(600)]
    large, small = Fleet(count), Fleet(count - 1)
    before = [large.route(job).worker for job in jobs]
    after = [small.route(job).worker for job in jobs]
    leaver = large.names[-1]
    moved = [one for one, other in zip(before, after, strict=True) if one != other]
    assert set(moved) == {leaver}
    assert len(moved) < 2 * len(jobs) / count


def test_a_key_has_the_same_order_everywhere_and_even_parts() -> None:
    names = [f"worker-{number}" for number in range(50)]
    one, other = Rendezvous(), Rendezvous()
    one.set_names(names)
    other.set_names(list(reversed(names)))
    firsts: Counter[str] = Counter()
    for number in range(10_000):
        key = str(number).encode()
        order = one.preferred(key)
        assert order == other.preferred(key)
        assert len(set(order)) == PREFERRED
        firsts[order[0]] += 1
    assert set(firsts) == set(names)
    assert max(firsts.values()) < 1.5 * 10_000 / 50
    one.set_names(names[:3])
    assert sorted(one.preferred(b"k")) == sorted(names[:3])
    # who leaves is cut out of every order, and nothing else changes
    one.set_names(names[1:])
    for number in range(200):
        key = str(number).encode()
        kept = [name for name in other.preferred(key) if name != names[0]]
        assert list(one.preferred(key)[: len(kept)]) == kept


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), min_size=1, max_size=80),
)
def test_nobody_is_given_more_than_the_bounded_share(
    count: int, prompts: list[tuple[int, int]]
) -> None:
    """Even if everybody asks with the same key: before a job it had at most its bounded share."""
    fleet = Fleet(count)
    held = Counter(dict.fromkeys(fleet.names, 0))
    for number, (key, tokens) in enumerate(prompts):
        job = a_job(f"j{number}", tokens=tokens, affinity=str(key))
        cost = tokens + 2 * 50
        route = fleet.send(job)
        bound = LOAD_BOUND * (sum(held.values()) + cost) / count
        assert held[route.worker] <= bound + 1e-6
        held[route.worker] += cost


# prefixes


def test_the_holder_of_most_gets_it_even_when_others_have_less_to_do() -> None:
    fleet = Fleet(8)
    prompt = chain("long", 100)
    fleet.index.stored("w003", prompt[: 8 * 90])
    fleet.index.stored("w005", prompt[: 8 * 40])
    fleet.send(a_job("other", tokens=600), NOW)
    route = fleet.route(a_job("j", prompt))
    assert (route.worker, route.cached_blocks) == ("w003", 90)
    assert route.reason == "holds most of the prompt"
    by_worker = {score.worker: score for score in route.scores}
    assert by_worker["w003"].uncached_tokens == 10 * BLOCK_TOKENS
    assert by_worker["w005"].uncached_tokens == 60 * BLOCK_TOKENS
    assert by_worker["w003"].cost < by_worker["w005"].cost


def test_what_shares_a_prefix_with_a_job_sent_before_follows_it_before_any_report() -> None:
    """The first has made its prompt and decodes: that is no reason to compute all of it again."""
    fleet = Fleet(16)
    job = a_job("one", chain("talk", 64))
    first = fleet.send(job)
    told = JobProgress("one", len(job.prompt), 0, 1)
    fleet.workload.progress(Progress(first.worker, 1, (told,)))
    second = fleet.route(a_job("two", chain("more", 8, after=chain("talk", 64))))
    assert second.worker == first.worker
    assert second.cached_blocks == 64


def test_a_lone_conversation_stays_where_it_is() -> None:
    """Nobody else asks, so one worker has all the work there is; that is no overload."""
    fleet = Fleet(16)
    talk, homes = b"", []
    for turn in range(8):
        talk = chain(f"turn{turn}", 40, after=talk)
        job = a_job(f"j{turn}", talk)
        homes.append(fleet.send(job, NOW + 1_000 * turn).worker)
        fleet.finish(homes[-1], job)
    assert len(set(homes)) == 1


def test_a_hot_prefix_is_copied_when_its_holder_has_had_its_share() -> None:
    """Every second request has the same long prefix: it ends up where the load asks for it."""
    fleet = Fleet(8)
    hot = chain("hot", 200)
    for number in range(400):
        alone = chain(f"p{number}", 100)
        mine = chain(f"q{number}", 4, after=hot)
        now = NOW + 50 * number
        route = fleet.send(a_job(f"j{number}", mine if number % 2 else alone), now)
        fleet.breakers.progress(route.worker, now, 1)
    copies = fleet.index.match(hot)
    assert 2 <= len(copies) < 8
    last = fleet.route(a_job("last", chain("last", 4, after=hot)), NOW + 20_000)
    assert last.cached_blocks >= 192


def test_a_busy_holder_gives_way_where_waiting_costs_more_than_computing() -> None:
    fleet = Fleet(4)
    prompt = chain("p", 10)
    fleet.index.stored("w000", prompt)
    assert fleet.route(a_job("j", prompt)).worker == "w000"
    fleet.workload.book("w000", a_job("huge", tokens=50_000), 50_000, NOW)
    route = fleet.route(a_job("j", prompt))
    assert route.worker != "w000"
    assert route.reason == "its holders have more to do than it saves"


def test_a_slow_worker_counts_for_more() -> None:
    fleet = Fleet(2)
    for worker, busy_ms in (("w000", 4_000), ("w001", 1_000)):
        for _ in range(5):
            fleet.workload.progress(Progress(worker, 1, busy_ms=busy_ms, prefill_tokens=1_000))
    prompt = chain("p", 100)
    for worker in fleet.names:
        fleet.index.stored(worker, prompt)
    job = a_job("j", chain("q", 20, after=prompt))
    assert fleet.route(job).worker == "w001"
    fleet.workload.book("w001", a_job("some", tokens=300), 300, NOW)
    assert fleet.route(job).worker == "w001", "it has more to do and is still sooner"


# room and breakers


def test_a_full_fleet_makes_the_job_wait_and_says_why() -> None:
    fleet = Fleet(2, max_jobs=3)
    for number in range(6):
        assert fleet.send(a_job(f"j{number}", tokens=10)).worker
    route = fleet.route(a_job("more", tokens=10))
    assert (route.worker, route.reason) == ("", "no worker has room")
    assert {score.verdict for score in route.scores} == {"has as many jobs as it takes"}
    assert fleet.route(a_job("more", tokens=10)).reason == "no worker has room"
    assert Fleet(0).route(a_job("j")).reason == "no worker is ready"


def test_free_room_goes_before_room_that_lower_bands_give_up() -> None:
    fleet = Fleet(3, max_jobs=1)
    prompt = chain("p", 50)
    fleet.index.stored("w000", prompt)
    fleet.workload.book("w000", a_job("b0", band=Band.BATCH), 1, NOW)
    urgent = a_job("urgent", prompt, band=Band.INTERACTIVE)
    free = fleet.route(urgent)
    assert free.worker != "w000" and free.room is Room.FREE
    for worker in fleet.names[1:]:
        fleet.workload.book(worker, a_job(f"b{worker}", band=Band.BATCH), 1, NOW)
    route = fleet.route(urgent)
    assert (route.worker, route.room) == ("w000", Room.PREEMPTING)
    assert route.reason == "lower bands give way"
    assert fleet.route(a_job("batch", prompt, band=Band.BATCH)).worker == ""


def test_the_only_free_room_in_a_large_fleet_is_found() -> None:
    fleet = Fleet(200, max_jobs=1)
    for worker in fleet.names:
        if worker != "w137":
            fleet.workload.book(worker, a_job(f"j{worker}", tokens=1), 1, NOW)
    fleet.workload.book("w137", a_job("big", tokens=90_000), 90_000, NOW)
    assert fleet.route(a_job("k")).worker == ""
    facts = [WorkerFacts(w, 1_000_000, 2 if w == "w137" else 1) for w in fleet.names]
    fleet.workload.set_workers(facts)
    route = fleet.route(a_job("k"))
    assert (route.worker, route.reason) == ("w137", "the only free room")


def test_a_stalled_worker_gets_nothing_but_its_probe() -> None:
    fleet = Fleet(2)
    prompt = chain("p", 50)
    fleet.index.stored("w000", prompt)
    assert fleet.send(a_job("j0", prompt)).worker == "w000"
    late = NOW + 6_000
    route = fleet.send(a_job("j1", prompt), late)
    assert route.worker == "w001"
    assert {s.worker: s.verdict for s in route.scores}["w000"] == "its breaker is open"
    later = late + 3_000
    fleet.breakers.progress("w001", later, 1)
    fleet.index.stored("w000", chain("q", 50))
    probe = a_job("probe", chain("q", 50))
    assert fleet.send(probe, later).worker == "w000"
    assert fleet.send(a_job("next", chain("q", 50)), later).worker == "w001"


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.tuples(
            st.sampled_from(["send", "finish", "fail", "store", "evict", "wait", "drain"]),
            st.integers(0, 5),
            st.sampled_from(Band),
            st.integers(1, 300),
        ),
        max_size=50,
    ),
)
def test_no_job_waits_while_any_allowed_worker_has_room(
    seed: int, steps: list[tuple[str, int, Band, int]]
) -> None:
    """Work conservation, after any history: one gets it, and nothing but one with room; and two
    dispatchers with the same history decide alike."""
    rnd = random.Random(seed)
    one, other = (Fleet(6, kv_tokens=700, max_jobs=3) for _ in range(2))
    prompts = [chain("root", 20)] + [chain(f"p{i}", 15, after=chain("root", 5)) for i in range(4)]
    running: list[tuple[str, Job]] = []
    now = NOW
    for number, (action, at, band, size) in enumerate(steps):
        worker = one.names[at]
        prompt = prompts[at % len(prompts)][: 8 * (size % 20)]
        job = a_job(f"j{number}", prompt, tokens=size, band=band, output=1 + size // 3)
        if action == "finish" and running:
            where, ended = running.pop(rnd.randrange(len(running)))
            one.finish(where, ended)
            other.finish(where, ended)
        now += size * 40 if action == "wait" else 0
        for fleet in (one, other):
            match action:
                case "fail":
                    fleet.breakers.failed(worker, now)
                case "store":
                    fleet.index.stored(worker, prompt)
                case "evict":
                    fleet.index.removed(worker, prompt[8 * 5 :])
                case "drain":
                    kept = [w for w in fleet.names if w != worker or size % 2]
                    fleet.workload.set_workers([WorkerFacts(w, 700, 3) for w in kept])
        rooms, _ = (
            {
                w: fleet.workload.room(w, job, now).room
                for w in fleet.workload.open_workers
                if fleet.breakers.allows(w, now)
            }
            for fleet in (one, other)
        )
        route = one.send(job, now) if action == "send" else one.route(job, now)
        assert route == (other.send(job, now) if action == "send" else other.route(job, now))
        if action == "send" and route.worker:
            running.append((route.worker, job))
        if route.worker:
            assert rooms[route.worker] is route.room is not Room.NONE
            assert route.room is Room.FREE or Room.FREE not in rooms.values()
        else:
            assert set(rooms.values()) <= {Room.NONE}
        names = [score.worker for score in route.scores]
        assert len(set(names)) == len(names) <= HOLDERS_MAX + PREFERRED_MAX + LEAST_MAX + 2
        for fleet in (one, other):
            fleet.workload.check_integrity()
            fleet.index.check_integrity()
            fleet.breakers.check_integrity()


# a whole day in small


class Pool:
    """A worker's KV pool: least recently used blocks go first, tails before heads."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._kept: OrderedDict[bytes, None] = OrderedDict()

    def leading(self, keys: list[bytes]) -> int:
        return next((at for at, key in enumerate(keys) if key not in self._kept), len(keys))

    def use(self, keys: list[bytes]) -> tuple[bytes, bytes]:
        """Blocks that came and went for this prompt."""
        stored, removed = [], []
        for key in reversed(keys):
            if key not in self._kept:
                stored.append(key)
            self._kept[key] = None
            self._kept.move_to_end(key)
        while len(self._kept) > self._blocks:
            removed.append(self._kept.popitem(last=False)[0])
        return b"".join(stored), b"".join(removed)


def skewed_prompts(rnd: random.Random, count: int) -> list[tuple[int, list[bytes]]]:
    """(arrival in ms, blocks): Zipf-popular documents, half of the requests go on talking."""
    documents = [chain(f"d{number}", 24) for number in range(300)]
    weights = [1 / (rank + 1) for rank in range(300)]
    talks: list[bytes] = []
    requests, now = [], 0.0
    for number in range(count):
        now += rnd.expovariate(1 / 60)
        if talks and rnd.random() < 0.5:
            talk = talks.pop(rnd.randrange(max(0, len(talks) - 40), len(talks)))
        else:
            talk = rnd.choices(documents, weights)[0]
        talk = chain(f"t{number}", 8, after=talk)
        if len(talk) < 8 * 100:
            talks.append(talk)
        requests.append((int(now), [talk[at : at + 8] for at in range(0, len(talk), 8)]))
    return requests


def replay(requests: list[tuple[int, list[bytes]]], workers: int, pool_blocks: int) -> tuple[
    float, float, int
]:  # fmt: skip
    """Hit ratio, most work given to one worker over the mean, copies of the hottest document."""
    fleet = Fleet(workers)
    pools = {worker: Pool(pool_blocks) for worker in fleet.names}
    free_at = dict.fromkeys(fleet.names, 0.0)
    work = Counter(dict.fromkeys(fleet.names, 0))
    order = itertools.count()
    ends: list[tuple[float, int, str, JobProgress]] = []
    hits = total = 0
    for number, (now, keys) in enumerate(requests):
        while ends and ends[0][0] <= now:
            at, _, worker, told = heapq.heappop(ends)
            fleet.workload.done(JobDone(worker, told, FinishReason.STOP))
            fleet.breakers.succeeded(worker, NOW + int(at))
        job = a_job(f"j{number}", b"".join(keys), tokens=5, output=30)
        worker = fleet.send(job, NOW + now).worker
        cached = pools[worker].leading(keys)
        stored, removed = pools[worker].use(keys)
        fleet.index.stored(worker, stored)
        fleet.index.removed(worker, removed)
        uncached = len(job.prompt) - cached * BLOCK_TOKENS
        # 1,000 prompt tokens a second, one prompt after the other; then 30 tokens of 20 ms
        begun = max(float(now), free_at[worker])
        free_at[worker] = begun + uncached
        told = JobProgress(job.id, uncached, cached * BLOCK_TOKENS, 30)
        heapq.heappush(ends, (free_at[worker] + 600, next(order), worker, told))
        hits, total = hits + cached, total + len(keys)
        work[worker] += uncached + 60
    copies = len(fleet.index.match(chain("d0", 24)))
    return hits / total, max(work.values()) * workers / sum(work.values()), copies


def test_a_fleet_of_caches_hits_like_one_large_cache_and_shares_the_work() -> None:
    """Sixteen small pools behind the router, against a single pool of their total size."""
    workers, blocks = 16, 300
    requests = skewed_prompts(random.Random(20_260_101), 4_000)
    one = Pool(workers * blocks)
    hits = 0
    for _, keys in requests:
        hits += one.leading(keys)
        one.use(keys)
    ideal = hits / sum(len(keys) for _, keys in requests)
    ratio, most, copies = replay(requests, workers, blocks)
    assert ratio >= 0.95 * ideal, (ratio, ideal)
    assert most <= LOAD_BOUND, most
    assert 1 <= copies < workers, copies
