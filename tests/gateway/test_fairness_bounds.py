"""What a tenant can gain or lose, measured on a small machine against the bounds of theory.

The machine runs jobs side by side, as many as its memory holds, and makes one token of each in a
round, as an engine does. Service is counted as in the paper: input tokens when a job starts, output
tokens twice, as they appear. Bound of VTC (OSDI 2024, theorem 4.4), for two tenants that both wait
all the time: 2 * max(INPUT_WEIGHT * longest input, OUTPUT_WEIGHT * memory), by the lesser weight.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import Band
from headrace_gateway.policy.fair_queue import BAND_SHARES, FairQueue, Queued
from headrace_gateway.policy.virtual_counters import INPUT_WEIGHT, OUTPUT_WEIGHT
from support.waiting import serve, waiting

MEMORY = 1_000
"""KV tokens of the machine."""


@dataclass(frozen=True)
class Size:
    """A request: what it brings, what it really makes, what it claims that it will make."""

    prompt: int
    output: int
    claimed: int = 0


@dataclass
class Client:
    """Keeps `backlog` requests waiting: with the usual one, more than can start in one round."""

    size: Callable[[random.Random], Size]
    weight: float = 1.0
    backlog: int = 20
    band: Band = Band.STANDARD


@dataclass
class Machine:
    """A queue, its clients, and an engine of MEMORY tokens."""

    clients: dict[str, Client]
    seed: int = 0
    jobs_max: int = 16
    queue: FairQueue = field(default_factory=FairQueue)
    running: dict[str, list[int]] = field(default_factory=dict)
    items: dict[str, Queued] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    waits: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    round: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.held = 0

    def step(self) -> None:
        """One round: clients ask, what has room starts, everything that runs makes a token."""
        self.round += 1
        for name, client in self.clients.items():
            for _ in range(client.backlog - self.waits[name]):
                self.ask(name, client)
        while self.start():
            pass
        assert self.running or not self.queue.heads(), "nothing idles beside a queue"
        for job_id, progress in list(self.running.items()):
            self.advance(job_id, progress)

    def ask(self, name: str, client: Client) -> None:
        size = client.size(self.random)
        job_id = f"{name}{len(self.outputs)}"
        item = waiting(
            job_id,
            name,
            client.band,
            arrived_ms=self.round,
            prompt=size.prompt,
            output=size.claimed or size.output,
            weight=client.weight,
        )
        self.outputs[job_id] = size.output
        self.items[job_id] = item
        self.queue.push(item)
        self.waits[name] += 1

    def start(self) -> bool:
        for item in self.queue.heads():
            job = item.job
            if self.held + job.cost_tokens <= MEMORY and len(self.running) < self.jobs_max:
                self.queue.take(job.id, len(job.prompt))
                self.waits[job.tenant] -= 1
                self.running[job.id] = [0]
                self.held += job.cost_tokens
                self.serve(job.tenant, INPUT_WEIGHT, len(job.prompt))
                return True
        return False

    def advance(self, job_id: str, progress: list[int]) -> None:
        job = self.items[job_id].job
        progress[0] += 1
        self.queue.charge(job.tenant, job.weight, job.band, output_tokens=1)
        self.serve(job.tenant, OUTPUT_WEIGHT, 1)
        if progress[0] == self.outputs[job_id]:
            self.queue.finished(job_id, progress[0])
            self.held -= job.cost_tokens
            del self.running[job_id], self.items[job_id]

    def serve(self, tenant: str, weight: float, tokens: int) -> None:
        self.served[tenant] += int(weight * tokens)
        self.tokens[tenant] += tokens

    def gap_of(self, one: str, other: str, service: float) -> tuple[float, float]:
        """The most that `one`, and that `other`, got more than the other in any interval.

        Runs until each has had `service` in all.
        """
        a, b = self.clients[one].weight, self.clients[other].weight
        low = high = self.served[one] / a - self.served[other] / b
        rise = fall = 0.0
        while min(self.served[one], self.served[other]) < service:
            self.step()
            ahead = self.served[one] / a - self.served[other] / b
            low, high = min(low, ahead), max(high, ahead)
            rise, fall = max(rise, ahead - low), max(fall, high - ahead)
        self.queue.check_integrity()
        return rise, fall


def bound(longest_input: int, least_weight: float = 1.0) -> float:
    return 2 * max(INPUT_WEIGHT * longest_input, OUTPUT_WEIGHT * MEMORY) / least_weight


def steady(prompt: int, output: int, claimed: int = 0) -> Callable[[random.Random], Size]:
    return lambda _: Size(prompt, output, claimed)


def usual(rng: random.Random) -> Size:
    return Size(rng.randint(10, 100), rng.randint(10, 60))


ADVERSARIES = {
    "a thousand tiny requests": Client(steady(1, 1), backlog=1_000),
    "a few huge prompts": Client(steady(900, 5), backlog=3),
    "the most of max_tokens, stops early": Client(steady(10, 3, claimed=400)),
    "long answers": Client(steady(5, 300)),
    "huge, then tiny": Client(lambda rng: rng.choice([Size(900, 20), Size(1, 1)])),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversaries_gain_nothing(name: str) -> None:
    """In no interval does one get more than an honest tenant by more than the bound, nor does it
    lose more: whatever the shape of its requests, and though both get many times the bound."""
    machine = Machine({"honest": Client(usual), "adversary": ADVERSARIES[name]})
    limit = bound(longest_input=900)
    gain, loss = machine.gap_of("adversary", "honest", service=8 * limit)
    assert gain <= limit, f"gained {gain}"
    assert loss <= limit, f"lost {loss}"


def test_coming_and_going_gains_nothing() -> None:
    """Who sends the next request only when the last was taken never waits long, yet cannot get
    more than a tenant that waits all the time."""
    machine = Machine({"honest": Client(usual), "adversary": Client(steady(5, 200), backlog=1)})
    limit = bound(longest_input=100)
    gain, _ = machine.gap_of("adversary", "honest", service=5 * limit)
    assert gain <= limit


def test_a_tenant_that_pauses_is_no_worse_and_no_better_off() -> None:
    """After 2,000 rounds of absence the returned tenant shares evenly again, at once."""
    machine = Machine({"stays": Client(usual), "returns": Client(usual)})
    for _ in range(500):
        machine.step()
    machine.clients["returns"].backlog = 0
    for _ in range(2_000):
        machine.step()
    machine.clients["returns"].backlog = 20
    machine.step()
    limit = bound(longest_input=100)
    service = machine.served["returns"] + 8 * limit
    gain, loss = machine.gap_of("returns", "stays", service)
    assert max(gain, loss) <= limit


def test_weights_hold_within_five_percent() -> None:
    """Weights 4:1 with quite different requests: served tokens come out at 4:1."""
    machine = Machine(
        {"big": Client(usual, weight=4.0), "small": Client(steady(60, 30), weight=1.0)}
    )
    gain, loss = machine.gap_of("big", "small", service=50_000)
    assert max(gain, loss) <= bound(longest_input=100)
    assert machine.served["big"] / machine.served["small"] == pytest.approx(4.0, rel=0.05)


@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=5),
    longest=st.integers(1, 400),
)
@settings(max_examples=25, deadline=None)
def test_any_tenants_stay_within_the_bound_of_each_other(
    seed: int, weights: list[float], longest: int
) -> None:
    """Random requests, random weights: no pair drifts apart further than theory allows."""

    def size(rng: random.Random) -> Size:
        return Size(rng.randint(1, longest), rng.randint(1, 100), rng.choice([0, 300]))

    clients = {f"t{i}": Client(size, weight=weight) for i, weight in enumerate(weights)}
    machine = Machine(clients, seed)
    spread: list[tuple[float, float]] = []
    for _ in range(600):
        machine.step()
        had = [machine.served[name] / client.weight for name, client in clients.items()]
        spread.append((min(had), max(had)))
    assert max(high - low for low, high in spread) <= bound(longest, min(weights))
    machine.queue.check_integrity()


def test_batch_gets_its_share_of_tokens_under_flood() -> None:
    """All three bands wait all the time; predictions are wrong in each; shares hold in tokens."""
    machine = Machine(
        {
            "chat": Client(steady(30, 20, claimed=60), band=Band.INTERACTIVE),
            "app": Client(steady(50, 40, claimed=45)),
            "night": Client(steady(100, 50, claimed=200), band=Band.BATCH),
        }
    )
    for _ in range(15_000):
        machine.step()
    total = machine.tokens.total()
    assert machine.tokens["app"] / total >= 0.97 * BAND_SHARES[Band.STANDARD]
    assert machine.tokens["night"] / total >= 0.97 * BAND_SHARES[Band.BATCH]
    assert machine.tokens["chat"] / total >= 0.80


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 80)), max_size=60),
    st.integers(1, 80),
)
@settings(max_examples=150, deadline=None)
def test_who_comes_back_goes_after_at_most_one_job_of_each_other(
    jobs: list[tuple[int, int]], prompt: int
) -> None:
    """The bound on waiting within a band, for a tenant that owes nothing."""
    queue = FairQueue()
    for i, (tenant, tokens) in enumerate(jobs):
        queue.push(waiting(f"j{i}", f"t{tenant}", prompt=tokens, arrived_ms=-i))
    serve(queue, len(jobs) // 3)
    others = {item.job.tenant for item, _ in queue.order(99)}
    queue.push(waiting("mine", "back", prompt=prompt, arrived_ms=999_999))
    before = serve(queue, 99)
    before = before[: before.index("mine")]
    tenants = [f"t{jobs[int(name[1:])][0]}" for name in before]
    assert len(tenants) == len(set(tenants)) <= len(others)


@given(
    st.lists(st.tuples(st.sampled_from(Band), st.integers(1, 400)), min_size=1, max_size=150),
    st.tuples(st.floats(0, 0.2), st.floats(0, 0.3), st.floats(0, 0.3)),
)
@settings(max_examples=150, deadline=None)
def test_no_band_waits_longer_than_its_share_says(
    jobs: list[tuple[Band, int]], shares: tuple[float, float, float]
) -> None:
    """After each hand-off, for each band that waits: since it began to, it had its share of the
    work, but for the job that it waits for and one job of each band."""
    queue = FairQueue(shares)
    for i, (band, tokens) in enumerate(jobs):
        queue.push(waiting(f"j{i}", "t", band, prompt=tokens, output=1))
    had, total, longest = Counter[Band](), 0, 401
    while len(queue):
        job = queue.heads()[0].job
        serve(queue)
        work = len(job.prompt) + 1
        had[job.band] += work
        total += work
        for band in Band:
            if queue.counts[band]:
                assert had[band] >= shares[band] * total - longest * (1 + 3 * shares[band])
