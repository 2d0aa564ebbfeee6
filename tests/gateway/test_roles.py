"""Workers change sides when one is short for a while and the other can spare one."""

from __future__ import annotations

import random
from itertools import pairwise

from headrace.types import WorkerRole
from headrace_gateway.policy.roles import COOL_MS, HOLD_MS, RoleChange, RolePolicy, SideFacts

P, D = WorkerRole.PREFILL, WorkerRole.DECODE
SPEED = 1_000.0


def a_fleet(prompts: dict[str, int], streams: dict[str, float]) -> list[SideFacts]:
    """Workers by name: prompt tokens that wait, or how much is used."""
    return [
        *(SideFacts(name, P, 1, tokens, 0.1) for name, tokens in prompts.items()),
        *(SideFacts(name, D, int(10 * used), 0, used) for name, used in streams.items()),
    ]


def watched(
    policy: RolePolicy, fleet: list[SideFacts], from_ms: int, to_ms: int, queued: int = 0
) -> list[tuple[int, RoleChange]]:
    """What it decides over a time in which nothing changes."""
    found = []
    for now in range(from_ms, to_ms + 1, 250):
        change = policy.decide(fleet, queued, SPEED, now)
        if change is not None:
            found.append((now, change))
    return found


def test_a_decoding_worker_helps_with_prompts_that_wait() -> None:
    policy = RolePolicy()
    fleet = a_fleet({"p0": 5_000}, {"d0": 0.3, "d1": 0.1, "d2": 0.2})
    [(at, change), *_] = watched(policy, fleet, 0, HOLD_MS)
    assert (at, change.worker, change.role) == (HOLD_MS, "d1", P), "the one with least to lose"
    assert "prefill is short" in change.reason


def test_prompts_that_wait_in_the_queue_count_as_well() -> None:
    fleet = a_fleet({"p0": 0}, {"d0": 0.1, "d1": 0.1})
    assert watched(RolePolicy(), fleet, 0, HOLD_MS, queued=5_000)
    assert not watched(RolePolicy(), fleet, 0, 10 * HOLD_MS, queued=500)


def test_a_worker_of_prompts_helps_where_streams_fill_up() -> None:
    fleet = a_fleet({"p0": 100, "p1": 0}, {"d0": 0.95})
    [(_, change)] = watched(RolePolicy(), fleet, 0, HOLD_MS)
    assert (change.worker, change.role) == ("p0", D)


def test_no_side_is_left_empty_or_made_short() -> None:
    assert not watched(RolePolicy(), a_fleet({"p0": 9_000}, {"d0": 0.0}), 0, 9 * HOLD_MS)
    assert not watched(RolePolicy(), a_fleet({"p0": 0}, {"d0": 1.0}), 0, 9 * HOLD_MS)
    busy = a_fleet({"p0": 9_000}, {"d0": 0.5, "d1": 0.5})
    assert not watched(RolePolicy(), busy, 0, 9 * HOLD_MS), "one alone could not bear it"
    assert not watched(RolePolicy(), a_fleet({"p0": 9_000}, {}), 0, 9 * HOLD_MS)


def test_a_moment_is_not_enough_and_after_a_change_there_is_a_rest() -> None:
    policy = RolePolicy()
    short, calm = a_fleet({"p0": 5_000}, {"d0": 0.0, "d1": 0.0}), a_fleet({"p0": 0}, {"d0": 0.0})
    for begin in range(0, 10 * HOLD_MS, HOLD_MS):
        assert not watched(policy, short, begin, begin + HOLD_MS - 500)
        assert policy.decide(calm, 0, SPEED, begin + HOLD_MS - 250) is None
    many = a_fleet({"p0": 90_000}, {f"d{n}": 0.0 for n in range(9)})
    changes = watched(policy, many, 10 * HOLD_MS, 10 * HOLD_MS + 3 * COOL_MS)
    gaps = [b - a for (a, _), (b, _) in pairwise(changes)]
    assert len(changes) == 3 and min(gaps) >= COOL_MS


def test_nobody_goes_to_and_fro_under_any_steady_load() -> None:
    """Carried out, a change never makes the next one go back, whatever the load is."""
    for seed in range(200):
        rng = random.Random(seed)
        prompts, used = rng.uniform(0, 20_000), rng.uniform(0, 6)
        roles = {f"w{n}": P if n < rng.randint(1, 5) else D for n in range(6)}
        roles["w0"], roles["w5"] = P, D
        policy, seen = RolePolicy(), []
        for now in range(0, 20 * COOL_MS, 1_000):
            count = sum(role is P for role in roles.values())
            fleet = [
                SideFacts(name, role, 1, int(prompts / count) if role is P else 0,
                          min(1.0, used / (6 - count)) if role is D else 0.0)
                for name, role in roles.items()
            ]  # fmt: skip
            change = policy.decide(fleet, 0, SPEED, now)
            if change is not None:
                seen.append(change.role)
                roles[change.worker] = change.role
                assert {P, D} == set(roles.values())
        assert len(set(seen)) <= 1, f"seed {seed}: {seen}"
