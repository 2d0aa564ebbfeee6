"""Roles in the simulator: the same policy, jobs that move, and the study."""

from __future__ import annotations

import pytest

from headrace.policy.cost_model import CostModel
from headrace_sim.disaggregation import ITL_TARGETS_MS, Runs, Verdict, Way, crossover, ways_of
from headrace_sim.fleet import Fleet, FleetConfig, Transfer
from headrace_sim.metrics import Outcome
from headrace_sim.workload import Lengths, Mix, PoissonStream, Shape

COST = CostModel(
    step_ms=10.0,
    prefill_token_ms=1.0,
    decode_row_ms=1.0,
    decode_context_ms=1.0,
    prefill_context_ms=1.0,
    kv_tokens=8_192,
    max_jobs=16,
    step_tokens=512,
    name="test",
)


def a_run(
    workers: int,
    roles: tuple[int, int],
    *,
    per_s: float = 1.0,
    requests: int = 50,
    check: bool = False,
    prompt: int = 600,
    output: int = 60,
    **facts: object,
) -> Fleet:
    stream = PoissonStream(
        Mix(), Shape(Lengths(prompt, 0.5), Lengths(output, 0.5)), per_s=per_s,
        requests=requests, seed=3,
    )  # fmt: skip
    config = FleetConfig(workers, COST, roles=roles, check=check, **facts)  # type: ignore[arg-type]
    return Fleet(config, stream).run()


def complete(fleet: Fleet) -> int:
    return sum(outcome == Outcome.COMPLETE for outcome in fleet.records.outcome)


def test_jobs_move_and_every_token_is_made_once() -> None:
    """With all checks on after every event: a split loses nothing and repeats nothing."""
    both, split = a_run(4, (0, 0)), a_run(4, (2, 2), check=True)
    assert complete(both) == complete(split) == 50
    assert (both.moves, split.moves > 40) == (0, True)
    assert sum(both.records.output_tokens) == sum(split.records.output_tokens)
    made = sum(worker.output_tokens for worker in split.workers.values())
    assert made == sum(split.records.output_tokens)
    prefill = [split.workers[name].prefill_tokens for name in split.workers]
    assert min(prefill[:2]) > 10 * max(prefill[2:]), "only the ends of prompts are computed again"
    assert split.policy.next(split.wall_ms) is None


def test_streams_of_a_split_fleet_do_not_wait_for_prompts() -> None:
    gaps = {
        roles: a_run(4, roles, per_s=2.5, requests=100).gaps.percentile(1, 99)
        for roles in ((0, 0), (2, 2))
    }
    assert gaps[2, 2] < gaps[0, 0] / 2


def test_the_way_of_a_job_takes_time() -> None:
    fast = a_run(2, (1, 1), per_s=0.2, requests=40)
    slow = a_run(2, (1, 1), per_s=0.2, requests=40, transfer=Transfer(500.0, 0.0))
    assert complete(fast) == complete(slow) == 40
    assert max(slow.records.end_ms) > max(fast.records.end_ms)
    assert Transfer(4.0, 5.0).takes_ms(10_000, 2_000) == 14.0, "the rest is under way before"


def test_workers_change_sides_when_one_is_short() -> None:
    """Long outputs on one decoding worker of four: the others come to help."""
    facts = {"per_s": 0.5, "prompt": 100, "output": 700, "requests": 120}
    fixed = a_run(4, (3, 1), **facts)  # type: ignore[arg-type]
    adapts = a_run(4, (3, 1), adapts=True, **facts)  # type: ignore[arg-type]
    assert (fixed.role_changes, adapts.role_changes > 0) == (0, True)
    assert complete(fixed) == complete(adapts) == 120


def test_splits_are_as_near_to_their_ratios_as_workers_allow() -> None:
    names = [way.name for way in ways_of(16)]
    assert names == ["both", "both, steps of 1024", "4:12", "5:11", "8:8", "11:5", "12:4"]
    assert [way.name for way in ways_of(2)][2:] == ["1:1"]


def all_of(verdict: Verdict) -> dict[float, Verdict]:
    return dict.fromkeys(ITL_TARGETS_MS, verdict)


@pytest.mark.parametrize(("split_bears", "found"), [((10.0, 15.0), 15.0), ((), 0.0)])
def test_the_crossover_is_the_laxest_target_at_which_a_split_bears_more(
    split_bears: tuple[float, ...], found: float
) -> None:
    ways = [Way("both"), Way("1:1", (1, 1))]
    yes, no = Verdict(1.0, 1.0), Verdict(0.0, 0.0)
    runs = Runs(
        {
            "both": {1.0: all_of(yes), 2.0: all_of(no)},
            "1:1": {
                1.0: all_of(yes),
                2.0: {itl: yes if itl in split_bears else no for itl in ITL_TARGETS_MS},
            },
        }
    )  # fmt: skip
    assert crossover(runs, ways, ITL_TARGETS_MS) == found
