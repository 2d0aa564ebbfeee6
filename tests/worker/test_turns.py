"""What bands mean inside a worker: whose turn it is, who gives way, who ages, who is too late."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.policy.priority import is_late
from headrace.types import Band
from headrace_worker.policy import turns
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.plan import Plan
from headrace_worker.policy.scheduler import Scheduler
from headrace_worker.policy.sequence import PROMOTE_MS, Sequence, Status
from headrace_worker.policy.turns import HURRIED_STEPS_MAX
from worker.builders import make_job, make_sequence, random_tokens

INTERACTIVE, STANDARD, BATCH = Band


def make_scheduler(blocks: int = 400, **limits: int) -> Scheduler:
    facts = {"running_max": 8, "step_tokens_max": 64} | limits
    return Scheduler(BlockPool(blocks), **facts)


def step(scheduler: Scheduler, now: int = 0, lower: int = 16) -> Plan:
    plan = scheduler.schedule(now, lower_prefill_tokens=lower)
    scheduler.apply(plan, [[7] if item.samples else [] for item in plan.items])
    scheduler.check_integrity()
    return plan


def counts(plan: Plan) -> dict[str, int]:
    return {item.sequence.id: item.count for item in plan.items}


def ids(sequences: Sequences[Sequence]) -> list[str]:
    return [sequence.id for sequence in sequences]


# --- a better band's prompt


def test_a_better_prompt_has_the_step_to_itself() -> None:
    """Neither streams nor prompts of lower bands are in the step that computes it."""
    scheduler = make_scheduler(calm_ms=0)
    scheduler.add(make_sequence("stream", [1], output=99, band=BATCH))
    step(scheduler)
    scheduler.add(make_sequence("bulk", [2] * 200, band=BATCH, order=1))
    step(scheduler)
    scheduler.add(make_sequence("vip", [3] * 100, band=INTERACTIVE, order=2))
    plans = [step(scheduler) for _ in range(3)]
    assert [counts(plan) for plan in plans[:2]] == [{"vip": 64}, {"vip": 36}]
    assert [plan.hurried for plan in plans] == [True, True, False]
    assert counts(plans[2]) == {"vip": 1, "stream": 1, "bulk": 16}


def test_streams_of_its_own_band_and_better_go_on() -> None:
    """Only those behind it wait for a standard prompt."""
    scheduler = make_scheduler()
    for order, band in enumerate(Band):
        scheduler.add(make_sequence(band.label, [order], output=99, band=band, order=order))
    for _ in range(6):
        step(scheduler)
    scheduler.add(make_sequence("prompt", [9] * 20, band=STANDARD, order=5))
    assert counts(step(scheduler)) == {"interactive": 1, "standard": 1, "prompt": 16}


@pytest.mark.parametrize(
    ("prompts", "left_out_max"),
    [
        ([INTERACTIVE], HURRIED_STEPS_MAX),
        ([STANDARD], HURRIED_STEPS_MAX),
        ([INTERACTIVE, STANDARD], 2 * HURRIED_STEPS_MAX),
    ],
)
def test_streams_are_left_out_for_a_bounded_number_of_steps(
    prompts: list[Band], left_out_max: int
) -> None:
    """Under prompts without end a batch stream gets a token every so many steps all the same."""
    scheduler = make_scheduler(calm_ms=0, running_max=64)
    stream = make_sequence("stream", [1], output=999, band=BATCH)
    scheduler.add(stream)
    step(scheduler)
    gaps, gap = [], 0
    for number in range(84):
        if number % 7 < 4 or len(prompts) == 1:
            prompt = make_sequence(f"p{number}", [2] * 70, output=1, band=prompts[0], order=1)
            scheduler.add(prompt)
        scheduler.add(make_sequence(f"q{number}", [3] * 70, output=1, band=prompts[-1], order=2))
        gap = gap + 1 if "stream" not in counts(step(scheduler)) else 0
        gaps.append(gap)
    assert max(gaps) == left_out_max
    assert stream.output_tokens >= 1 + 84 // (left_out_max + 1)


def test_standard_prompts_do_not_use_up_the_interactive_allowance() -> None:
    """Whenever it comes, an interactive prompt finds a step without lower streams."""
    scheduler = make_scheduler(running_max=64)
    scheduler.add(make_sequence("stream", [1], output=999, band=BATCH))
    step(scheduler)
    for number in range(12):
        for choice in range(2):
            prompt = random_tokens(200, 2 * number + choice)
            scheduler.add(make_sequence(f"s{number}.{choice}", prompt, output=1, order=2))
        for _ in range(1 + number % 5):
            step(scheduler)
        vip = make_sequence(f"v{number}", [500 + number] * 40, output=1, band=INTERACTIVE)
        scheduler.add(vip)
        assert counts(step(scheduler)) == {vip.id: 40}


def test_one_band_alone_never_hurries() -> None:
    """Streams and prompts share a full step, as if there were no bands."""
    scheduler = make_scheduler()
    for order in range(4):
        scheduler.add(make_sequence(f"s{order}", [order], output=99, band=BATCH, order=order))
    step(scheduler)
    scheduler.add(make_sequence("prompt", [9] * 200, band=BATCH, order=9))
    for _ in range(3):
        plan = step(scheduler)
        assert not plan.hurried and plan.tokens == 64 and len(plan.items) == 5


def test_a_better_prompt_that_does_not_fit_holds_up_nobody() -> None:
    """What waits for room of its own band gains nothing from others standing still."""
    scheduler = make_scheduler(8)
    scheduler.add(make_sequence("vip", [1] * 100, output=20, band=INTERACTIVE))
    scheduler.add(make_sequence("stream", [2], output=10, band=BATCH, order=1))
    while "stream" not in counts(step(scheduler)):
        pass
    scheduler.add(make_sequence("next", [3] * 100, output=20, band=INTERACTIVE, order=2))
    plan = step(scheduler)
    assert counts(plan) == {"vip": 1, "stream": 1} and not plan.hurried


# --- chunks of lower bands


def test_lower_prompts_are_cut_small_while_a_better_band_is_about() -> None:
    """While it streams, and for a while after it ran; then steps are full again."""
    scheduler = make_scheduler(calm_ms=100)
    scheduler.add(make_sequence("vip", [1], output=3, band=INTERACTIVE))
    step(scheduler)
    scheduler.add(make_sequence("std", [2] * 500, order=1))
    assert [counts(step(scheduler, now)).get("std") for now in (10, 20, 119, 120)] == [
        16, 16, 16, 64,
    ]  # fmt: skip


def test_all_lower_prompts_share_the_limit_in_their_order() -> None:
    """Standard first, batch with what is left; the best band itself is not limited."""
    scheduler = make_scheduler(step_tokens_max=256)
    for order, (id, band) in enumerate([("b", BATCH), ("s", STANDARD), ("v", INTERACTIVE)]):
        scheduler.add(make_sequence(id, [order] * 90, output=9, band=band, order=order))
    plans = [step(scheduler) for _ in range(9)]
    assert counts(plans[0]) == {"v": 90}
    for plan in plans:
        lower = sum(item.count for item in plan.items if item.sequence.band and item.count > 1)
        assert lower <= 16
    assert sum(counts(plan).get("s", 0) for plan in plans) > 90 - 16
    assert sum(counts(plan).get("b", 0) for plan in plans) > 0


def test_lower_streams_are_not_limited() -> None:
    """The limit is on prompts: any number of streams gets its token."""
    scheduler = make_scheduler(running_max=8)
    for order in range(7):
        scheduler.add(make_sequence(f"s{order}", [order], output=99, order=order))
    step(scheduler, lower=2)
    scheduler.add(make_sequence("vip", [9], output=9, band=INTERACTIVE, order=8))
    step(scheduler, lower=2)
    assert len(counts(step(scheduler, lower=2))) == 8


def test_age_earns_no_long_steps() -> None:
    """Batch work that waited a minute goes first, in small chunks beside interactive work."""
    scheduler = make_scheduler()
    scheduler.add(make_sequence("old", [2] * 300, band=BATCH, added_ms=0))
    scheduler.add(make_sequence("vip", [1] * 8, band=INTERACTIVE, arrived_ms=9, order=1))
    assert counts(step(scheduler, 2 * PROMOTE_MS)) == {"old": 16, "vip": 8}


@given(
    here=st.lists(st.sampled_from(list(Band)), max_size=4),
    ran=st.dictionaries(st.integers(0, 2), st.integers(0, 100)),
)
def test_the_guarded_band_is_the_best_one_about(here: list[Band], ran: dict[int, int]) -> None:
    """Here, or run within the calm time; without anybody nothing is limited."""
    sequences = [make_sequence(f"{n}", [1], band=band) for n, band in enumerate(here)]
    guarded = turns.guarded_band(sequences, ran, now=100, calm_ms=50)
    about = {int(band) for band in here} | {band for band, at in ran.items() if at > 50}
    assert guarded == min(about, default=BATCH)


def test_groups_are_bands_until_one_has_used_up_its_allowance() -> None:
    """Then it goes together with all behind it, those before it for themselves as ever."""
    sequences = [make_sequence(band.label, [1], band=band) for band in reversed(Band)]
    split = turns.groups(sequences, 0, {0: HURRIED_STEPS_MAX - 1})
    assert [ids(group) for group in split] == [["interactive"], ["standard"], ["batch"]]
    split = turns.groups(sequences, 0, {1: HURRIED_STEPS_MAX})
    assert [ids(group) for group in split] == [["interactive"], ["standard", "batch"]]
    split = turns.groups(sequences, 0, {0: HURRIED_STEPS_MAX})
    assert [ids(group) for group in split] == [["interactive", "standard", "batch"]]
    aged = turns.groups(sequences, PROMOTE_MS, {})
    assert [ids(group) for group in aged] == [["standard", "interactive"], ["batch"]]


# --- who gives way


def test_the_lowest_band_gives_way_then_the_least_work() -> None:
    """When blocks run out, batch work goes first, within a band whoever has computed least."""
    scheduler = make_scheduler(6)
    scheduler.add(make_sequence("vip", [1] * 16, output=80, band=INTERACTIVE))
    scheduler.add(make_sequence("big", [2] * 30, output=60, band=BATCH, order=1))
    scheduler.add(make_sequence("small", [3] * 16, output=60, band=BATCH, order=2))
    victims: list[str] = []
    while len(victims) < 2:
        victims += ids(step(scheduler).preempted)
    assert victims == ["small", "big"]
    ended: list[str] = []
    while scheduler.running or scheduler.waiting:
        before = [*scheduler.running, *scheduler.waiting]
        step(scheduler)
        ended += [s.id for s in before if s.status is Status.FINISHED]
    assert sorted(ended) == ["big", "small", "vip"]


def test_work_that_others_hold_is_not_lost() -> None:
    """Of two with as many computed tokens the one whose prompt is shared gives way."""
    scheduler = make_scheduler(20, step_tokens_max=128)
    prompt = [5] * 64
    scheduler.add(make_sequence("keeper", prompt, output=40, band=INTERACTIVE))
    step(scheduler)
    scheduler.add(make_sequence("sharer", [*prompt, 8], output=90, band=BATCH, order=1))
    scheduler.add(make_sequence("alone", [6] * 40, output=90, band=BATCH, order=2))
    victims: list[str] = []
    while not victims:
        if len(scheduler.running) == 3:
            rank = {s.id: scheduler._expendable(s, 0) for s in scheduler.running}
            assert max(rank, key=rank.__getitem__) == "sharer"
            scheduler.add(make_sequence("vip", [7] * 190, output=1, band=INTERACTIVE, order=3))
        victims += ids(step(scheduler).preempted)
    assert victims[0] == "sharer"


@pytest.mark.parametrize(
    ("first", "second", "gone"),
    [
        ({"band": BATCH}, {"band": STANDARD}, "first"),
        ({"computed": 9}, {"computed": 30}, "first"),
        ({"computed": 9, "preemptions": 1}, {"computed": 30}, "second"),
        ({"virtual": 2.0}, {"virtual": 1.0}, "first"),
        ({"due_ms": 5}, {"due_ms": 9}, "second"),
        ({}, {}, "second"),
        ({"band": BATCH, "added_ms": -2 * PROMOTE_MS}, {"band": STANDARD}, "second"),
    ],
)
def test_the_victim_score(first: dict[str, int], second: dict[str, int], gone: str) -> None:
    """Effective band, preemptions, lost work, rank: in that order."""
    scores = {}
    for order, (id, facts) in enumerate([("first", first), ("second", second)]):
        facts = dict(facts)
        lost, preemptions = facts.pop("computed", 0), facts.pop("preemptions", 0)
        sequence = make_sequence(id, [1], order=order, **facts)
        sequence.preemptions = preemptions
        scores[id] = turns.expendable(sequence, lost, 0)
    assert max(scores, key=scores.__getitem__) == gone


# --- aging


def test_waiting_raises_the_band() -> None:
    """After PROMOTE_MS batch work ranks with standard work, and its earlier arrival counts."""
    scheduler = make_scheduler(6, running_max=1)
    scheduler.add(make_sequence("old", [1] * 4, band=BATCH, arrived_ms=0, added_ms=0))
    scheduler.add(make_sequence("new", [2] * 4, arrived_ms=9, added_ms=PROMOTE_MS))
    assert ids(step(scheduler, now=PROMOTE_MS).admitted) == ["old"]


def test_running_does_not_raise_the_band() -> None:
    """A batch stream of two minutes still makes way for whoever is interactive."""
    scheduler = make_scheduler(6, running_max=1)
    bulk = make_sequence("bulk", [1] * 4, output=60, band=BATCH)
    scheduler.add(bulk)
    for now in range(0, 4 * PROMOTE_MS, PROMOTE_MS // 10):
        step(scheduler, now)
    assert bulk.effective_band(now) == BATCH
    scheduler.add(make_sequence("vip", [2] * 4, band=INTERACTIVE, added_ms=now, order=1))
    plan = step(scheduler, now)
    assert ids(plan.preempted) == ["bulk"] and ids(plan.admitted) == ["vip"]


def test_age_is_what_it_waited_in_all() -> None:
    """Pushed out again and again it gets on: each wait counts, what it ran between does not."""
    sequence = make_sequence("a", [1], band=BATCH, added_ms=100)
    bands = []
    for start in range(100, 100 + 8 * PROMOTE_MS, PROMOTE_MS):
        sequence.note_step(computed=True, now=start + PROMOTE_MS // 2)
        bands.append(sequence.effective_band(start + PROMOTE_MS - 1))
        sequence.note_step(computed=False, now=start + PROMOTE_MS)
        sequence.note_step(computed=False, now=start + PROMOTE_MS + 1)
    assert bands == [2, 1, 1, 0, 0, 0, 0, 0]


# --- deadlines


def test_who_is_late() -> None:
    """The first deadline counts until there is a token, the last one always."""
    scheduler = make_scheduler()
    facts = {"ttft_by_ms": 50, "done_by_ms": 90}
    scheduler.add(make_sequence("fresh", [1], **facts))
    scheduler.add(make_sequence("resumed", [2], logged=[3], order=1, **facts))
    scheduler.add(make_sequence("free", [4], order=2))
    late = [ids(scheduler.late(now)) for now in (49, 50, 89, 90)]
    assert late == [[], ["fresh"], ["fresh"], ["fresh", "resumed"]]
    step(scheduler)
    assert ids(scheduler.late(50)) == [] and ids(scheduler.late(90)) == ["fresh", "resumed"]


@given(st.integers(-5, 5), st.integers(-5, 5), st.booleans(), st.integers(-5, 5))
@settings(max_examples=200)
def test_lateness_is_that_of_the_shared_policy(
    ttft: int, done: int, started: bool, now: int
) -> None:
    """On whichever clock: a sequence is late when its job is."""
    wall = 1_000_000
    job = make_job("a", [1], ttft_by_ms=wall + ttft, done_by_ms=wall + done)
    sequence = make_sequence(
        "a", [1], logged=[2] if started else [], ttft_by_ms=ttft, done_by_ms=done
    )
    assert sequence.is_late(now) == is_late(job, wall + now, int(started))
