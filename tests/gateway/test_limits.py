"""Limits of API keys on a real Valkey: exact over gateways, drained evenly, and never stuck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from headrace import keys
from headrace.clock import ManualClock, SystemClock
from headrace.errors import DependencyError, OverloadError
from headrace.streams import connect
from headrace_gateway import limits as limits_module
from headrace_gateway.limits import Grant, Limiter, spell_duration
from headrace_gateway.tenants import KeyLimits
from support.valkey import Valkey

KEY = "k" * 32


@asynccontextmanager
async def another(valkey: Valkey) -> AsyncIterator[Limiter]:
    """The limiter of another gateway, with connections of its own."""
    client = connect(valkey.url)
    limiter = Limiter(client, SystemClock())
    yield limiter
    await limiter.close()
    await client.aclose()


async def taken(limiter: Limiter, limits: KeyLimits, lease: str, tokens: int = 0) -> Grant | None:
    """The grant, or None when the limits refused it."""
    try:
        return await limiter.take(limits, lease, tokens)
    except OverloadError as error:
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        assert error.retry_after_ms
        return None


async def refusal(limiter: Limiter, limits: KeyLimits, tokens: int = 0) -> OverloadError:
    with pytest.raises(OverloadError) as caught:
        await limiter.take(limits, "refused", tokens)
    return caught.value


@pytest.mark.parametrize(
    "limits",
    [
        KeyLimits(KEY, requests_per_minute=50),
        KeyLimits(KEY, tokens_per_minute=500),
        KeyLimits(KEY, concurrency=50),
        KeyLimits(KEY, 50, 5_000, 60),
    ],
)
async def test_two_gateways_racing_let_exactly_the_limit_through(
    valkey: Valkey, limits: KeyLimits
) -> None:
    """400 requests of 10 tokens at once, half at each gateway; 50 fit, whatever limits it.

    What drains while they race may let few more through: one request in 1.2 s.
    """
    async with another(valkey) as one, another(valkey) as two:
        began_s = time.monotonic()
        grants = await asyncio.gather(
            *(taken(gateway, limits, f"{name}{at}", 10)
              for at in range(200) for name, gateway in (("a", one), ("b", two)))
        )  # fmt: skip
        drained = 0 if not (limits.requests_per_minute or limits.tokens_per_minute) else 50 / 60
        most = 50 + drained * (time.monotonic() - began_s)
        assert 50 <= sum(grant is not None for grant in grants) <= most


async def test_all_is_taken_or_nothing(redis: Redis) -> None:
    """A request that one limit refuses uses nothing of the others."""
    limiter = Limiter(redis, SystemClock())
    limits = KeyLimits(KEY, 10, 1_000, 1)
    await limiter.take(limits, "first", 100)
    before = await redis.hgetall(keys.limit_used(KEY))
    assert await taken(limiter, limits, "second", 100) is None, "one runs already"
    assert await taken(limiter, limits, "third", 950) is None, "and too few tokens are left"
    assert await redis.hgetall(keys.limit_used(KEY)) == before
    assert await redis.zrange(keys.limit_running(KEY), 0, -1) == [b"first"]


async def test_the_wait_that_is_told_is_right(redis: Redis) -> None:
    """A token a millisecond: 150 tokens too many are there after 150 ms, not before."""
    limiter = Limiter(redis, SystemClock())
    limits = KeyLimits(KEY, tokens_per_minute=60_000)
    await limiter.take(limits, "all", 60_000)
    error = await refusal(limiter, limits, 150)
    assert error.retry_after_ms is not None
    assert 100 < error.retry_after_ms <= 150
    assert "60000 tokens a minute" in error.message
    await asyncio.sleep(error.retry_after_ms / 2_000)
    again = await refusal(limiter, limits, 150)
    assert again.retry_after_ms is not None
    await asyncio.sleep(again.retry_after_ms / 1_000)
    await limiter.take(limits, "later", 150)


async def test_what_is_known_to_be_refused_is_refused_without_asking(redis: Redis) -> None:
    clock = ManualClock()
    limiter = Limiter(redis, clock)
    limits = KeyLimits(KEY, requests_per_minute=1)
    limiter.check(limits)
    await limiter.take(limits, "only", 0)
    error = await refusal(limiter, limits)
    assert error.retry_after_ms is not None
    with pytest.raises(OverloadError) as caught:
        limiter.check(limits)
    assert caught.value.retry_after_ms == error.retry_after_ms
    clock.advance(error.retry_after_ms)
    limiter.check(limits)


async def test_a_settled_request_pays_what_it_used(redis: Redis) -> None:
    """Less than predicted comes back, more is charged, and what was not accepted costs nothing."""
    limiter = Limiter(redis, SystemClock())
    limits = KeyLimits(KEY, 10, 100_000, 5)

    async def used() -> tuple[float, float]:
        stored = await redis.hgetall(keys.limit_used(KEY))
        return float(stored[b"requests"]), float(stored[b"tokens"])

    shorter = await limiter.take(limits, "a", 50_000)
    await limiter.settle(shorter, 20_000)
    requests, tokens = await used()
    assert requests == pytest.approx(1, abs=0.5)
    assert tokens == pytest.approx(20_000, rel=0.2)
    await limiter.settle(shorter, 90_000)
    assert (await used())[1] <= tokens, "only once"
    longer = await limiter.take(limits, "b", 10_000)
    await limiter.settle(longer, 170_000)
    assert (await used())[1] == pytest.approx(190_000, rel=0.05)
    error = await refusal(limiter, limits, 1_000)
    assert error.retry_after_ms == pytest.approx(54_600, rel=0.05), "the debt has to drain first"
    assert await redis.zcard(keys.limit_running(KEY)) == 0
    unlimited = KeyLimits(KEY, 10, 0, 5)
    refused = await limiter.take(unlimited, "c", 5)
    before = (await used())[0]
    await limiter.settle(refused, 0, counts=False)
    assert (await used())[0] == pytest.approx(before - 1, abs=0.2)


async def test_a_dead_gateways_requests_end_with_their_leases(
    redis: Redis, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lives renews; what nobody renews is free again after the lease (here 0.3 s)."""
    monkeypatch.setattr(limits_module, "LEASE_MS", 300)
    limits = KeyLimits(KEY, concurrency=2)
    living = Limiter(redis, SystemClock())
    async with another(valkey) as dead:
        await dead.take(limits, "dead", 0)
        grant = await living.take(limits, "alive", 0)
        assert await taken(living, limits, "third") is None
        for _ in range(4):
            await asyncio.sleep(0.1)
            await living.renew()
        assert await taken(living, limits, "third") is not None
        assert await taken(living, limits, "fourth") is None, "the living one still has its lease"
        await living.settle(grant, 0)
        assert await taken(living, limits, "fourth") is not None


async def test_a_place_among_the_running_frees_about_when_it_is_told(redis: Redis) -> None:
    """The guess is the mean duration over the places."""
    clock = ManualClock()
    limiter = Limiter(redis, clock)
    limits = KeyLimits(KEY, concurrency=2)
    for at in range(2):
        grant = await limiter.take(limits, f"past{at}", 0)
        clock.advance(4_000)
        await limiter.settle(grant, 0)
    await limiter.take(limits, "a", 0)
    await limiter.take(limits, "b", 0)
    error = await refusal(limiter, limits)
    assert error.retry_after_ms == 2_000
    assert "2 requests at once" in error.message


async def test_what_can_never_fit_is_told_so(redis: Redis) -> None:
    limiter = Limiter(redis, SystemClock())
    error = await refusal(limiter, KeyLimits(KEY, tokens_per_minute=100), 101)
    assert (error.status, error.retry_after_ms) == (429, None)
    assert "101 tokens" in error.message
    assert not await redis.keys("headrace:limit:*")


async def test_the_headers_follow_the_minute() -> None:
    """From what was last heard, drained by our own clock since; nothing is asked for them."""
    clock = ManualClock()
    limiter = Limiter(connect("redis://nowhere.invalid"), clock)
    limits = KeyLimits(KEY, 60, 6_000)
    assert limiter.headers(limits) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "60",
        "x-ratelimit-reset-requests": "0ms",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "6000",
        "x-ratelimit-reset-tokens": "0ms",
    }
    limiter._note(limits, [b"2", b"5999.5"])
    made = limiter.headers(limits)
    assert made["x-ratelimit-remaining-requests"] == "58"
    assert made["x-ratelimit-reset-requests"] == "2s"
    assert made["x-ratelimit-remaining-tokens"] == "0"
    assert made["x-ratelimit-reset-tokens"] == "59.995s"
    clock.advance(1_500)
    made = limiter.headers(limits)
    assert made["x-ratelimit-remaining-requests"] == "59"
    assert made["x-ratelimit-reset-requests"] == "500ms"
    assert not limiter.headers(KeyLimits(KEY, concurrency=5))


async def test_without_redis_nothing_is_accepted_and_nothing_is_lost(
    valkey: Valkey, redis: Redis
) -> None:
    limiter = Limiter(redis, SystemClock())
    limits = KeyLimits(KEY, concurrency=1)
    grant = await limiter.take(limits, "a", 0)
    valkey.kill()
    with pytest.raises(DependencyError) as caught:
        await limiter.take(limits, "b", 0)
    assert caught.value.status == 503
    await limiter.renew()
    await limiter.settle(grant, 5)
    await limiter.close()


async def test_use_leaves_nothing_behind(redis: Redis) -> None:
    """Every key ends by itself soon after its minute."""
    limiter = Limiter(redis, SystemClock())
    limits = KeyLimits(KEY, 60, 1_000, 3)
    await limiter.take(limits, "a", 500)
    assert 30_000 <= await redis.pttl(keys.limit_used(KEY)) <= 31_000
    assert 29_000 <= await redis.pttl(keys.limit_running(KEY)) <= 30_000


@pytest.mark.parametrize(
    ("milliseconds", "spelled"),
    [
        (0, "0ms"), (12, "12ms"), (999, "999ms"), (1_000, "1s"), (1_500, "1.5s"), (10_000, "10s"),
        (59_995, "59.995s"), (60_000, "1m0s"), (360_000, "6m0s"), (3_661_010, "1h1m1.01s"),
    ],
)  # fmt: skip
def test_durations_are_spelled_as_openai_does(milliseconds: int, spelled: str) -> None:
    assert spell_duration(milliseconds) == spelled


@given(st.integers(0, 10**8))
def test_any_duration_is_spelled_exactly(milliseconds: int) -> None:
    text, total = spell_duration(milliseconds), 0.0
    if text.endswith("ms"):
        total = int(text[:-2])
    else:
        for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
            if unit in text:
                number, text = text.split(unit, 1)
                total += float(number) * size
    assert round(total) == milliseconds
