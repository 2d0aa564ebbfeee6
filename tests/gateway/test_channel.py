"""A channel's picture of the queue, on a real Valkey: the board, and what came since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis

from headrace import keys, wire_reports
from headrace.cache_directory import Directory
from headrace.clock import SystemClock
from headrace.errors import DependencyError, OverloadError
from headrace.policy.hashing import model_tag
from headrace.types import BLOCK_KEY_BYTES, BLOCK_TOKENS, Band, BlockNews, Board, CacheNode
from headrace.wire_cache import encode_news
from headrace_gateway.channel import Channel
from headrace_gateway.policy.admission import AdmissionLimits, Ask
from support.fleet import MODEL, a_job, eventually
from support.valkey import Valkey

LIMITS = AdmissionLimits(queue_jobs_max=5, wait_ms_max=(1_000, 5_000, 9_000))


@pytest.fixture
async def channel(valkey: Valkey, redis: Redis) -> AsyncIterator[Channel]:
    """With nothing running but what reads the board."""
    made = Channel(valkey.url, redis, MODEL, "g1", SystemClock(), LIMITS)
    polling = asyncio.create_task(made._poll_board())
    yield made
    polling.cancel()
    await asyncio.gather(polling, return_exceptions=True)
    await made.settle()


Publish = Callable[..., Awaitable[None]]


@pytest.fixture
def publish(redis: Redis, channel: Channel) -> Publish:
    """Puts a board where the dispatcher puts it, and waits until the channel has it."""

    async def put(
        at_ms: int, queued: int = 0, work: int = 0, wait_ms: int = 0, fetched_per_s: float = 0.0
    ) -> None:
        board = Board(
            leader="other", published_ms=at_ms, queued=(0, queued, 0), queued_work=(0, work, 0),
            waits_ms=(0, wait_ms, wait_ms), capacity_tokens=0, reserved_tokens=0, workers=1,
            work_per_s=100.0, prefill_per_s=100.0, fetched_per_s=fetched_per_s,
        )  # fmt: skip
        await redis.set(keys.board(MODEL.name), wire_reports.encode_board(board))
        await eventually(lambda: channel.board == board)

    return put


async def test_what_came_since_the_board_counts_until_the_next(
    channel: Channel, publish: Publish
) -> None:
    """4 may wait for standard: two do, two come, and there is no room until the next board."""
    await publish(1, queued=2, work=100)
    for name in ("a", "b"):
        await channel.submit(a_job(name, "g1"), INVALID_SPAN)
    assert "4 jobs wait, 4 may" in channel.admit(Ask(Band.STANDARD)).reason
    with pytest.raises(OverloadError) as caught:
        await channel.submit(a_job("c", "g1"), INVALID_SPAN)
    assert caught.value.code == "queue_full"
    assert caught.value.retry_after_ms
    assert channel.admit(Ask(Band.INTERACTIVE)).admitted
    await publish(2, queued=3, work=45)
    assert channel.admit(Ask(Band.STANDARD)).admitted


async def test_pace_and_deadline_meet_at_the_channel(channel: Channel, publish: Publish) -> None:
    """What its generations taught it counts: 10 tokens 100 ms apart take a second."""
    await publish(1)
    job = Ask(Band.STANDARD, now_ms=5_000, output_tokens=10, done_by_ms=5_500)
    assert channel.admit(job).admitted
    channel.lengths.note_pace(100)
    assert channel.admit(job).code == "deadline_unreachable"


async def test_without_a_readable_board_nobody_is_admitted(
    channel: Channel, redis: Redis, valkey: Valkey, publish: Publish
) -> None:
    assert channel.admit(Ask(Band.STANDARD)).code == "no_worker"
    await publish(1)
    assert channel.admit(Ask(Band.STANDARD)).admitted
    await redis.set(keys.board(MODEL.name), b"\xc1")
    await eventually(lambda: channel.board_error)
    assert channel.admit(Ask(Band.INTERACTIVE)).code == "unavailable"
    await publish(2)
    await eventually(lambda: not channel.board_error)
    assert channel.admit(Ask(Band.STANDARD)).admitted
    valkey.kill()
    await eventually(lambda: channel.board_error)
    with pytest.raises(DependencyError):
        await channel.submit(a_job("a", "g1"), INVALID_SPAN)


async def test_admission_counts_what_the_cache_services_hold(
    channel: Channel, redis: Redis, publish: Publish
) -> None:
    """A prompt of which they have 60 of 100 blocks meets a deadline that it could not else.

    Fetching takes a quarter of computing, as the board says.
    """
    blocks = b"".join((16 * n).to_bytes(BLOCK_KEY_BYTES, "little") for n in range(100))
    tag = model_tag(MODEL.fingerprint)
    await redis.hset(keys.MODELS, MODEL.name, MODEL.fingerprint)
    await Directory(redis).announce(CacheNode("tcp://c:1", "boot", 1 << 30, 0))
    assert channel.held_tokens(blocks) == 0
    held = BlockNews("tcp://c:1", "boot", 1, blocks[: 60 * BLOCK_KEY_BYTES])
    await redis.set(keys.cache_blocks(tag, held.address), encode_news(held))
    watching = asyncio.create_task(channel._held_watch.run())
    try:
        await eventually(lambda: channel.held_tokens(blocks) > 0)
        await publish(1, fetched_per_s=400.0)
        assert channel.held_tokens(blocks) == 60 * BLOCK_TOKENS * 3 // 4
        assert channel.held_tokens(b"") == channel.held_tokens(blocks[-BLOCK_KEY_BYTES:]) == 0
        spared = channel.lengths.expect_cached("t", 1_600, channel.held_tokens(blocks))
        asked = Ask(Band.STANDARD, 0, 1_600 - spared, 1, ttft_by_ms=9_000)
        assert channel.admit(asked).admitted
        assert channel.admit(replace(asked, uncached_tokens=1_600)).code == "deadline_unreachable"
        more = BlockNews("tcp://c:1", "boot", 2, blocks[60 * BLOCK_KEY_BYTES :])
        await redis.xadd(keys.cache_events(tag), {"n": encode_news(more)})
        await eventually(lambda: channel.held_tokens(blocks) == 100 * BLOCK_TOKENS * 3 // 4)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
