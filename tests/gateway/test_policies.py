"""The gateway's pure policies: choice of a worker."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from headrace_gateway.policy.routing import LOAD_BOUND, Candidate, choose


def workers(count: int, jobs: int = 0, jobs_max: int = 1_000) -> list[Candidate]:
    return [Candidate(f"w{i}", jobs * 100, jobs, 1_000_000, jobs_max) for i in range(count)]


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_equal_prompts_meet_on_one_worker_and_different_ones_spread() -> None:
    fleet = workers(4)
    assert len({choose(key(7), 10, fleet).worker for _ in range(10)}) == 1
    spread = Counter(choose(key(i), 10, fleet).worker for i in range(400))
    assert set(spread) == {"w0", "w1", "w2", "w3"}
    assert max(spread.values()) < 2 * min(spread.values())


@given(st.integers(1, 8), st.lists(st.integers(0, 3), min_size=1, max_size=100))
def test_no_worker_holds_more_than_its_bounded_share(count: int, prompts: list[int]) -> None:
    """Even when everybody asks with the same prefix, the load stays within the bound."""
    held = Counter({f"w{i}": 0 for i in range(count)})
    for number in prompts:
        fleet = [Candidate(w, jobs * 10, jobs, 1_000_000, 1_000) for w, jobs in held.items()]
        route = choose(key(number), 10, fleet)
        held[route.worker] += 1
        assert route.worker, route
        bound = -(-LOAD_BOUND * sum(held.values()) // count)
        assert held[route.worker] <= bound
        assert len(route.scores) == count


def test_leaving_workers_move_only_their_own_prompts() -> None:
    before = {i: choose(key(i), 1, workers(5)).worker for i in range(200)}
    after = {i: choose(key(i), 1, workers(4)).worker for i in range(200)}
    moved = {i for i in before if before[i] != after[i]}
    assert moved == {i for i in before if before[i] == "w4"}


def test_a_full_fleet_makes_the_job_wait_and_says_why() -> None:
    fleet = workers(2, jobs=3, jobs_max=3)
    route = choose(key(1), 10, fleet)
    assert route.worker == ""
    assert route.reason == "no worker has room"
    assert {score.verdict for score in route.scores} == {"no room"}
    assert choose(key(1), 10, []).reason == "no worker is ready"


def test_an_idle_worker_takes_a_job_larger_than_what_is_usually_free() -> None:
    alone = Candidate("w0", 0, 0, 100, 4)
    assert choose(key(1), 1_000, [alone]).worker == "w0"
