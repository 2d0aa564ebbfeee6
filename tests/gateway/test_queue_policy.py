"""The dispatcher's queue: whose turn it is, what it costs, what idleness and haste are worth."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.types import Band
from headrace_gateway.policy.band_shares import EARNED_TOKENS_MAX
from headrace_gateway.policy.fair_queue import BAND_SHARES, FairQueue, Queued
from headrace_gateway.policy.timeline import Timeline
from headrace_gateway.policy.virtual_counters import VirtualCounters
from support.waiting import serve, waiting


def pushed(*items: Queued) -> FairQueue:
    queue = FairQueue()
    for item in items:
        assert queue.push(item)
    return queue


# --- order ------------------------------------------------------------------------------------


def test_bands_go_before_due_times_and_due_times_before_sequence() -> None:
    queue = pushed(
        waiting("late", arrived_ms=20),
        waiting("batch", band=Band.BATCH, arrived_ms=1),
        waiting("early", arrived_ms=10),
        waiting("urgent", band=Band.INTERACTIVE, arrived_ms=99),
        waiting("second", arrived_ms=10),
    )
    assert serve(queue, 9) == ["urgent", "early", "second", "late", "batch"]
    queue.check_integrity()


def test_a_job_waits_once() -> None:
    queue = pushed(waiting("one"))
    assert not queue.push(waiting("one"))
    assert len(queue) == 1


def test_every_band_that_waits_offers_one_job() -> None:
    """If the first finds no room, a lower band's may: a worker never idles beside a queue."""
    queue = pushed(
        waiting("b", band=Band.BATCH),
        waiting("i", band=Band.INTERACTIVE),
        waiting("s"),
        waiting("z"),
    )
    assert [item.job.id for item in queue.heads()] == ["i", "s", "b"]
    assert queue.counts == (1, 2, 1)
    assert queue.work == (12, 24, 12)
    queue.take("i", 4)
    assert [item.job.id for item in queue.heads()] == ["s", "b"]


def test_who_had_less_for_its_weight_goes_first() -> None:
    """Equal jobs, weights 2 and 1: the heavier tenant gets two for one, in turns."""
    queue = FairQueue()
    for i in range(20):
        queue.push(waiting(f"a{i}", "a", weight=2.0))
        queue.push(waiting(f"b{i}", "b"))
    for served in range(3, 30, 3):
        serve(queue, 3)
        assert Counter({"a": 20, "b": 20}) - Counter(
            item.job.tenant for item, _ in queue.order(99)
        ) == {"a": served * 2 // 3, "b": served // 3}


def test_output_counts_twice_and_counts_as_it_appears() -> None:
    queue = pushed(waiting("a1", "a"), waiting("a2", "a"), waiting("b1", "b", prompt=40))
    queue.take("a1", 4)
    assert queue.heads()[0].job.id == "b1"
    queue.take("b1", 40)
    queue.push(waiting("b2", "b"))
    queue.charge("a", 1.0, Band.STANDARD, output_tokens=17)
    assert queue.counters.value("a", Band.STANDARD) == 38.0
    assert queue.heads()[0].job.id == "a2"
    queue.charge("a", 1.0, Band.STANDARD, output_tokens=2)
    assert queue.heads()[0].job.id == "b2"


def test_within_a_tenant_deadlines_and_the_callers_priority_order() -> None:
    queue = pushed(
        waiting("plain", arrived_ms=100_000),
        waiting("hasty", arrived_ms=100_000, ttft_by_ms=101_000),
        waiting("lower", arrived_ms=100_000, priority=3),
        waiting("older", arrived_ms=99_000),
        waiting("rescued", arrived_ms=90_000, rescued_from="w1"),
    )
    assert serve(queue, 9) == ["rescued", "hasty", "older", "plain", "lower"]


def test_priority_and_deadlines_do_not_reach_another_tenant() -> None:
    queue = pushed(waiting("a1", "a", priority=-600, ttft_by_ms=1), waiting("b1", "b"))
    queue.charge("a", 1.0, Band.STANDARD, input_tokens=1)
    assert serve(queue, 2) == ["b1", "a1"]


# --- idleness ---------------------------------------------------------------------------------


def test_idleness_saves_nothing_up() -> None:
    """Who comes back after others were served starts level with the least of them."""
    queue = pushed(*(waiting(f"a{i}", "a") for i in range(9)), waiting("b0", "b"))
    serve(queue, 6)
    for i in range(1, 5):
        queue.push(waiting(f"b{i}", "b"))
    turns = [name[0] for name in serve(queue, 4)]
    assert Counter(turns) == {"a": 2, "b": 2}


def test_where_nobody_waits_a_newcomer_starts_where_the_last_one_left() -> None:
    queue = pushed(waiting("a0", "a"))
    serve(queue)
    queue.push(waiting("b0", "b"))
    assert queue.counters.value("b", Band.STANDARD) == 20.0


def test_what_was_taken_while_nobody_asked_is_not_held_against_anyone() -> None:
    queue = FairQueue()
    for i in range(100):
        queue.push(waiting(f"a{i}", "a"))
        serve(queue)
    queue.push(waiting("a", "a"))
    queue.push(waiting("b", "b"))
    assert queue.counters.value("a", Band.STANDARD) == queue.counters.value("b", Band.STANDARD)


def test_a_correction_gives_back_no_more_than_was_charged_since_the_return() -> None:
    queue = pushed(waiting("a0", "a", prompt=100), waiting("a1", "a"), waiting("b0", "b"))
    queue.take("a0", 100)
    assert queue.heads()[0].job.id == "b0"
    queue.charge("a", 1.0, Band.STANDARD, input_tokens=-500)
    assert queue.counters.value("a", Band.STANDARD) == 0.0
    assert queue.heads()[0].job.id == "a1"
    queue.check_integrity()


def test_a_prompt_that_is_all_cached_counts_as_one_token() -> None:
    """Or its tenant would stay first for as long as its jobs have made nothing."""
    queue = pushed(*(waiting(f"a{i}", "a") for i in range(3)), waiting("b", "b", arrived_ms=1))
    for _ in range(2):
        job = queue.heads()[0].job
        queue.take(job.id, 0)
    assert job.id == "b"


def test_a_backlog_in_batch_is_no_credit_elsewhere() -> None:
    """A tenant whose batch jobs waited long does not take over the band above."""
    queue = pushed(waiting("x", "x", Band.BATCH))
    for i in range(60):
        queue.push(waiting(f"a{i}", "a", Band.INTERACTIVE))
    serve(queue, 30)
    for i in range(30):
        queue.push(waiting(f"x{i}", "x", Band.INTERACTIVE))
    turns = Counter(name[0] for name in serve(queue, 21))
    assert abs(turns["a"] - turns["x"]) <= 2


# --- bands' shares ----------------------------------------------------------------------------


def test_a_lower_band_is_never_starved() -> None:
    """Interactive jobs without end: standard gets its 10 % of the tokens and batch its 5 %."""
    queue = FairQueue()
    served: Counter[str] = Counter()
    for i in range(2_000):
        for band in Band:
            queue.push(waiting(f"{band.label}{i}", band=band, prompt=50 + 100 * band))
        served[serve(queue)[0].rstrip("0123456789")] += 1
    tokens = {band.label: served[band.label] * (58 + 100 * band) for band in Band}
    total = sum(tokens.values())
    assert tokens["standard"] / total == pytest.approx(BAND_SHARES[1], rel=0.02)
    assert tokens["batch"] / total == pytest.approx(BAND_SHARES[2], rel=0.05)


def test_one_job_at_a_time_goes_ahead() -> None:
    queue = FairQueue()
    for i in range(300):
        queue.push(waiting(f"i{i}", band=Band.INTERACTIVE))
        queue.push(waiting(f"b{i}", band=Band.BATCH))
    turns = "".join(name[0] for name in serve(queue, 200))
    assert "bb" not in turns
    assert turns.index("b") in (20, 21), "after as much work as pays for it"


def test_a_band_that_was_idle_gets_no_burst() -> None:
    queue = FairQueue()
    for i in range(900):
        queue.push(waiting(f"i{i}", band=Band.INTERACTIVE))
    serve(queue, 500)
    for i in range(50):
        queue.push(waiting(f"b{i}", band=Band.BATCH))
    turns = "".join(name[0] for name in serve(queue, 100))
    assert turns.index("b") in (20, 21)
    assert turns.count("b") <= 5


def test_what_was_earned_is_gone_when_the_last_job_leaves() -> None:
    """A job that is cancelled just before its turn leaves its turn to nobody."""
    queue = pushed(*(waiting(f"i{i}", band=Band.INTERACTIVE) for i in range(99)))
    queue.push(waiting("b0", band=Band.BATCH))
    serve(queue, 19)
    queue.remove("b0")
    queue.push(waiting("b1", band=Band.BATCH))
    assert serve(queue, 22).index("b1") in (20, 21)


def test_what_a_band_took_while_no_other_waited_is_no_debt() -> None:
    queue = pushed(*(waiting(f"b{i}", band=Band.BATCH) for i in range(500)))
    serve(queue, 400)
    for i in range(99):
        queue.push(waiting(f"i{i}", band=Band.INTERACTIVE))
    turns = "".join(name[0] for name in serve(queue, 90))
    assert turns.index("b") in (20, 21)


def test_a_job_that_comes_back_undone_brings_its_bands_share_back() -> None:
    """Its worker died before it made a token. Batch had earned its 1,000 for 20,000 of work."""
    queue = pushed(*(waiting(f"i{i}", band=Band.INTERACTIVE) for i in range(5_000)))
    job = waiting("b", band=Band.BATCH, output=1_000)
    for _ in range(2):
        queue.push(job)
        turns = 0
        while (head := queue.heads()[0]) is not job:
            queue.take(head.job.id, 4)
            turns += 1
        queue.take("b", 4)
    assert turns < 100


def test_what_a_band_is_owed_is_bounded_while_its_jobs_find_no_room() -> None:
    """Batch is due but never fits; once it does, it does not take everything over for long."""
    queue = FairQueue()
    for i in range(3_000):
        queue.push(waiting(f"i{i}", band=Band.INTERACTIVE, prompt=1_000))
        queue.push(waiting(f"b{i}", band=Band.BATCH, prompt=1_000))
    for i in range(2_500):
        queue.take(f"i{i}", 1_000)
    queue.check_integrity()
    turns = "".join(name[0] for name in serve(queue, 200))
    assert len(turns) - len(turns.lstrip("b")) <= EARNED_TOKENS_MAX / (0.95 * 1_008) + 1


def test_jobs_that_stop_early_do_not_cost_their_band_its_share() -> None:
    """Batch jobs say 1,000 tokens and make 10: measured in tokens made, batch still gets 5 %."""
    queue = FairQueue()
    tokens: Counter[Band] = Counter()
    for i in range(4_000):
        queue.push(waiting(f"i{i}", band=Band.INTERACTIVE, output=100))
        queue.push(waiting(f"b{i}", band=Band.BATCH, output=1_000))
        job = queue.heads()[0].job
        queue.take(job.id, 4)
        made = 10 if job.band == Band.BATCH else 100
        queue.charge(job.tenant, job.weight, job.band, output_tokens=made)
        queue.finished(job.id, made)
        tokens[job.band] += 4 + made
    assert tokens[Band.BATCH] / tokens.total() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("shares", [(0.0, -0.1, 0.1), (0.5, 0.4, 0.2)])
def test_impossible_shares_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        FairQueue(shares)


# --- deadlines, waits, places -----------------------------------------------------------------


def test_late_jobs_are_named_until_they_are_removed() -> None:
    queue = pushed(
        waiting("never"),
        waiting("total", done_by_ms=300, ttft_by_ms=900),
        waiting("first", ttft_by_ms=200),
        waiting("begun", ttft_by_ms=100, done_by_ms=400, logged=3),
    )
    assert queue.late(199) == []
    assert [item.job.id for item in queue.late(300)] == ["first", "total"]
    assert [item.job.id for item in queue.late(400)] == ["first", "total", "begun"]
    queue.remove("total")
    assert [item.job.id for item in queue.late(999)] == ["first", "begun"]
    queue.check_integrity()


def test_who_has_waited_since_before() -> None:
    queue = pushed(*(waiting(f"j{ns}", queued_ns=ns) for ns in (5, 3, 9)))
    assert [item.job.id for item in queue.queued_before(9)] == ["j3", "j5"]
    assert [item.job.id for item in queue.queued_before(5)] == ["j3"]
    assert len(queue) == 3


def test_a_timeline_forgets_what_was_dropped() -> None:
    """Ten thousand come and go: what is kept does not grow with them."""
    line: Timeline[str] = Timeline()
    for number in range(10_000):
        line.add(number, number, "x")
        if number >= 10:
            line.drop(number - 10)
    line.drop(0)
    line.check_integrity()
    assert len(line) == 10
    assert len(line.passed(20_000)) == 10


JOBS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]), st.integers(1, 40), st.integers(1, 20), st.integers(0, 9)
    ),
    max_size=30,
)


@given(JOBS, st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_the_predicted_order_comes_true_when_jobs_do_what_is_expected(
    jobs: list[tuple[str, int, int, int]], limit: int
) -> None:
    """And the work ahead of each is the work of those before it."""
    queue = FairQueue()
    for i, (tenant, prompt, output, arrived) in enumerate(jobs):
        weight = 2.0 if tenant == "a" else 1.0
        queue.push(
            waiting(
                f"j{i}", tenant, prompt=prompt, output=output, arrived_ms=arrived, weight=weight
            )
        )
    places = queue.order(limit)
    ahead = 0
    for item, work in places:
        assert work == ahead
        ahead += len(item.job.prompt) + item.job.expected_output
    queue.check_integrity()
    assert [item.job.id for item, _ in places] == serve(queue, limit)


def test_places_are_told_by_band() -> None:
    queue = pushed(waiting("b", band=Band.BATCH), waiting("s"), waiting("i", band=Band.INTERACTIVE))
    assert [(item.job.id, ahead) for item, ahead in queue.order(2)] == [("i", 0), ("s", 12)]


# --- hand-offs that fail, terms that end ------------------------------------------------------


def test_a_hand_off_that_is_taken_back_leaves_no_trace() -> None:
    queue = pushed(
        waiting("a0", "a"),
        waiting("b0", "b", arrived_ms=1),
        waiting("u", band=Band.INTERACTIVE),
        waiting("z", band=Band.BATCH),
    )
    before = queue.order(9)
    item = queue.take("a0", 3)
    assert item is not None
    assert "a0" not in queue
    assert queue.put_back(item, 3)
    assert not queue.put_back(item, 3)
    queue.check_integrity()
    assert queue.counters.value("a", Band.STANDARD) == 0.0
    assert queue.order(9) == before
    queue.take("z", 4)
    assert queue.heads()[0].job.id == "u"


def test_jobs_that_have_left_the_queue_leave_nothing_to_collect() -> None:
    """Who is the last of a tenant goes at once, its prompt and all, not when a collector comes."""
    queue = FairQueue()
    gc.collect()
    gc.disable()
    try:
        for n in range(20):
            queue.push(waiting(f"a{n}", tenant="a"))
            queue.push(waiting(f"b{n}", tenant="b", band=Band.INTERACTIVE))
            queue.take(f"a{n}", 4)
            queue.remove(f"b{n}")
        assert gc.collect() == 0, "nothing was left in a circle"
    finally:
        gc.enable()


def test_counters_survive_a_term_and_strangers_start_lifted() -> None:
    queue = pushed(*(waiting(f"{t}{i}", t) for i in range(9) for t in ("a", "b")))
    queue.charge("a", 1.0, Band.STANDARD, input_tokens=50)
    serve(queue, 7)
    queue.heads()
    saved = queue.counters.snapshot()
    later = FairQueue()
    later.push(waiting("soon", "b"))
    later.counters.restore(saved | {"junk": 1.0, "9:x": 1.0, "1:nan": float("nan"), "1:c": -3.0})
    for tenant in ("a", "b"):
        now = later.counters.value(tenant, Band.STANDARD)
        assert now == queue.counters.value(tenant, Band.STANDARD)
    later.push(waiting("new", "stranger"))
    assert later.counters.value("stranger", Band.STANDARD) == now > 0, "b alone waits"
    later.check_integrity()
    empty = FairQueue()
    empty.counters.restore(saved)
    empty.push(waiting("new", "stranger"))
    least = min(queue.counters.value(tenant, Band.STANDARD) for tenant in ("a", "b"))
    assert empty.counters.value("stranger", Band.STANDARD) == least > 0


def test_only_so_many_idle_tenants_are_remembered() -> None:
    """Those that had least go first: forgetting them gives them nothing."""
    counters = VirtualCounters(tenants_max=8)
    counters.lift("waits", 1, None)
    for i in range(100):
        counters.charge(f"t{i}", 1.0, 1, input_tokens=i)
        counters.check_integrity()
    assert counters.value("t99", 1) == 99.0
    assert counters.value("t50", 1) == 0.0
    for i in range(20):
        counters.lift(f"w{i}", 1, 0.0)
    for i in range(20):
        counters.leave(f"w{i}", 1)
        counters.check_integrity()
    assert counters.value("waits", 1) == 0.0


# --- any program ------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(
        st.just("push"),
        st.sampled_from(Band),
        st.sampled_from(["a", "b", "c", "d"]),
        st.integers(1, 60),
        st.integers(0, 3_000),
        st.booleans(),
    ),
    st.tuples(st.just("take"), st.integers(0, 2)),
    st.tuples(st.just("remove"), st.integers(0, 40)),
    st.tuples(st.just("charge"), st.integers(0, 40), st.integers(-30, 30), st.integers(0, 20)),
    st.tuples(st.just("finish"), st.integers(0, 40), st.integers(0, 80)),
    st.tuples(st.just("back"), st.integers(0, 40)),
    st.tuples(st.just("late"), st.integers(0, 8_000)),
)
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 0.5}


@dataclass
class Run:
    """Runs a program on a queue, with a plain list beside it that says what must hold."""

    queue: FairQueue = field(default_factory=FairQueue)
    model: dict[str, Queued] = field(default_factory=dict)
    taken: list[tuple[Queued, int]] = field(default_factory=list)
    log: list[list[str]] = field(default_factory=list)
    pushes: int = 0

    def step(self, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(*step[1:])
        self.queue.check_integrity()
        assert len(self.queue) == len(self.model)
        assert bool(self.queue.heads()) == bool(self.model), "what waits is offered"
        self.log.append([item.job.id for item in self.queue.heads()])

    def push(self, band: Band, tenant: str, prompt: int, due: int, deadline: bool) -> None:
        item = waiting(
            f"j{self.pushes}",
            tenant,
            band,
            prompt=prompt,
            arrived_ms=due,
            weight=WEIGHTS[tenant],
            ttft_by_ms=due + 99 if deadline else 0,
        )
        self.pushes += 1
        assert self.queue.push(item)
        self.model[item.job.id] = item

    def take(self, place: int) -> None:
        """Whoever is offered has the least counter among those that wait in its band."""
        heads = self.queue.heads()
        if place < len(heads):
            job = heads[place].job
            counters = self.queue.counters
            rivals = {i.job.tenant for i in self.model.values() if i.job.band == job.band}
            least = min(counters.value(tenant, job.band) for tenant in rivals)
            assert counters.value(job.tenant, job.band) == least
            item = self.queue.take(job.id, len(job.prompt))
            assert item is self.model.pop(job.id)
            self.taken.append((item, len(job.prompt)))

    def remove(self, number: int) -> None:
        found = self.queue.remove(f"j{number}")
        assert found is self.model.pop(f"j{number}", None)

    def charge(self, number: int, input_tokens: int, output_tokens: int) -> None:
        if number < len(self.taken):
            job = self.taken[number][0].job
            self.queue.charge(job.tenant, job.weight, job.band, input_tokens, output_tokens)

    def finish(self, number: int, output_tokens: int) -> None:
        self.queue.finished(f"j{number}", output_tokens)

    def back(self, number: int) -> None:
        if number < len(self.taken):
            item, tokens = self.taken.pop(number)
            assert self.queue.put_back(item, tokens)
            self.model[item.job.id] = item

    def late(self, now_ms: int) -> None:
        late = {item.job.id for item in self.queue.late(now_ms)}
        assert late == {
            name for name, item in self.model.items() if 0 < item.job.ttft_by_ms <= now_ms
        }


@given(st.lists(STEPS, max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_program_keeps_the_queue_whole_offers_what_waits_and_repeats(
    program: list[tuple[Any, ...]],
) -> None:
    first, again = Run(), Run()
    for step in program:
        first.step(step)
    for step in program:
        again.step(step)
    assert first.log == again.log
    while first.model:
        first.take(0)
        first.queue.check_integrity()
    assert first.queue.counts == first.queue.work == (0, 0, 0)
