"""Routing by what the cache services hold: prompts that no worker has need not be computed."""

from __future__ import annotations

from dataclasses import replace

from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, BlockNews, Progress
from headrace_gateway.hops import route_attributes
from headrace_gateway.policy.dispatch import Decision, DispatchPolicy
from headrace_gateway.policy.fetching import PART_DEFAULT, Spared
from headrace_gateway.policy.workload import WorkerFacts
from support.waiting import waiting

NOW = 1_700_000_000_000
BLOCKS = 100


def keys_of(first: int, last: int) -> bytes:
    return b"".join((16 * n).to_bytes(BLOCK_KEY_BYTES, "little") for n in range(first, last))


def a_policy(*, workers: int = 3, shared: bytes = b"", held: bytes = b"") -> DispatchPolicy:
    """Workers, the first of which holds `held`, and a cache service that has `shared`."""
    policy = DispatchPolicy()
    policy.set_workers([WorkerFacts(f"w{n}", 1_000_000, 100) for n in range(workers)], NOW)
    policy.progress(Progress("w0", 1, stored=held), NOW)
    policy.shared.index.note(BlockNews("a", "1", 1, shared))
    return policy


def next_of(policy: DispatchPolicy) -> Decision:
    """What becomes of a prompt of BLOCKS blocks and half a one."""
    item = waiting("job", prompt=BLOCKS * BLOCK_TOKENS + 8)
    job = replace(item.job, blocks=keys_of(0, BLOCKS))
    assert policy.push(replace(item, job=job))
    decision = policy.next(NOW)
    assert decision is not None
    policy.check_integrity()
    return decision


def test_what_the_cache_services_hold_is_spared_everywhere_alike() -> None:
    """60 of 100 blocks: each candidate is charged a tenth of what computing them takes."""
    without, having = next_of(a_policy()), next_of(a_policy(shared=keys_of(0, 60)))
    spared = int(60 * BLOCK_TOKENS * (1 - PART_DEFAULT))
    assert without.route.spared == Spared() and having.route.spared == Spared(60, spared)
    assert having.uncached_tokens == without.uncached_tokens - spared
    before = {score.worker: score.cost for score in without.route.scores}
    for score in having.route.scores:
        assert score.cost == before[score.worker] - spared
    assert having.route.worker == without.route.worker


def test_what_a_worker_holds_is_not_spared_twice() -> None:
    """The services count from where the best worker's blocks end, and only without a gap."""
    decision = next_of(a_policy(shared=keys_of(20, 50), held=keys_of(0, 30)))
    assert decision.route.worker == "w0" and decision.route.cached_blocks == 30
    assert decision.route.spared.blocks == 20
    gap = next_of(a_policy(shared=keys_of(40, 50), held=keys_of(0, 30)))
    assert gap.route.spared == Spared()


def test_slow_fetching_spares_nothing() -> None:
    """Workers said that they fetch slower than they compute."""
    policy = a_policy(shared=keys_of(0, 60))
    for sequence in range(2, 30):
        policy.progress(
            Progress("w0", sequence, busy_ms=1_000, prefill_tokens=4_000, fetched_tokens=1_000,
                     fetch_ms=1_000),
            NOW,
        )  # fmt: skip
    assert next_of(policy).route.spared == Spared(60, 0)


def test_a_trace_says_what_is_fetched() -> None:
    told = route_attributes(next_of(a_policy(shared=keys_of(0, 60))).route)
    assert told["headrace.route.shared_blocks"] == 60
    scores = told["headrace.route.scores"]
    assert isinstance(scores, list) and all("or fetch (60 blocks)" in words for words in scores)
    plain = route_attributes(next_of(a_policy()).route)["headrace.route.scores"]
    assert isinstance(plain, list) and not any("fetch" in words for words in plain)
