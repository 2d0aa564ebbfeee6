"""A worker and a real cache service: what is written, fetched, counted and given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis

from headrace import keys, telemetry, wire
from headrace.cache_client import CacheClient
from headrace.streams import parse_entries
from headrace.types import Delta, Job
from headrace_worker import put_queue
from headrace_worker.cache_link import CacheLink, Fetched
from headrace_worker.engine import Engine
from headrace_worker.kv.export import Export, State
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.fetching import Reason
from headrace_worker.results import Outlook
from support.cache import cache_service
from support.fleet import eventually
from support.valkey import Valkey
from worker.builders import finish_all, make_engine, make_job, make_link, random_tokens
from worker.test_consumer import Running, ended

PROMPT = random_tokens(160, 1)
SLOW = Outlook(token_ms=1_000.0)
"""An engine for which any fetch is worth it."""


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[str]:
    async with cache_service(tmp_path) as url:
        yield url


@asynccontextmanager
async def running_link(engine: Engine, url: str) -> AsyncIterator[CacheLink]:
    link = make_link(engine, url)
    loop = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        link.check_integrity()
        await link.close()


def steps_of(engine: Engine, job: Job) -> list[Export]:
    """All that `job` offers until it ends."""
    engine.add(job)
    exports: list[Export] = []
    while engine.has_work:
        exports += engine.step().blocks
    return exports


async def write(link: CacheLink, exports: Sequence[Export]) -> None:
    link.store_later(exports)
    await link.flushed()


async def fetch(link: CacheLink, engine: Engine, job: Job, outlook: Outlook = SLOW) -> Fetched:
    return await link.fetch(job, engine.missing_blocks(job), outlook, INVALID_SPAN)


async def leases(url: str) -> int:
    client = CacheClient(url)
    stats = await client.stats()
    await client.close()
    assert stats is not None
    return int(stats["leases"])


async def test_one_engine_reads_what_another_wrote(tiny: LoadedModel, service: str) -> None:
    """In place: nothing is copied but into the pool. What was lent is given back after that."""
    first, second = make_engine(tiny), make_engine(tiny)
    job = make_job("a", PROMPT)
    expected = finish_all(make_engine(tiny), [job]).tokens
    async with running_link(first, service) as link:
        await write(link, steps_of(first, job))
        assert link.counts.written_blocks == 10
        assert link.counts.written_bytes == 10 * first.block_bytes
    async with running_link(second, service) as link:
        fetched = await fetch(link, second, job)
        assert (len(fetched.blocks), fetched.tier) == (9, "arena")
        assert await leases(service) == 1
        second.add(job, fetched.blocks)
        fetched.close()
        fetched.close()
        await eventually(lambda: _is_zero(service))
        out = finish_all(second)
        assert out.tokens == expected
        assert out.stories["a"].cached_imported == 144
        assert link.counts.fetched_bytes["arena"] == 9 * second.block_bytes
        assert link.counts.saved_us["arena"] > 140_000_000
        assert fetched.saved_ms > 140_000


async def test_a_fetch_tells_what_it_cost_and_saved(
    tiny: LoadedModel, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, time and what computing would have taken: in its span, the service's and metrics."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_provider", provider)
    first, second = make_engine(tiny), make_engine(tiny)
    job = make_job("a", PROMPT)
    async with running_link(first, service) as link:
        await write(link, steps_of(first, job))
    async with running_link(second, service) as link:
        fetched = await fetch(link, second, job)
        fetched.close()
        fast = await fetch(link, second, job, Outlook(token_ms=1e-6))
        fast.close()
        families = {each.name: each for each in link.counts.metrics("m")}
    spans = [span for span in exporter.get_finished_spans() if span.name == "cache lookup"]
    paid, unpaid = (dict(span.attributes or {}) for span in spans)
    size_bytes = 9 * second.block_bytes
    assert (paid["headrace.cache.bytes"], paid["headrace.cache.hit_blocks"]) == (size_bytes, 9)
    assert paid["headrace.cache.tier"] == "arena"
    fetch_ms, saved_ms = (paid[f"headrace.cache.{name}_ms"] for name in ("fetch", "saved"))
    assert isinstance(fetch_ms, float) and isinstance(saved_ms, float)
    assert fetch_ms > 0 and abs(fetch_ms + saved_ms - 144_000) < 1, "144 tokens of a second each"
    assert unpaid["headrace.cache.bytes"] == unpaid["headrace.cache.saved_ms"] == 0
    assert unpaid["headrace.cache.reason"] != paid["headrace.cache.reason"]
    counted = {
        name: {sample.labels.get("tier", ""): sample.value for sample in family.samples}
        for name, family in families.items()
    }
    assert counted["headrace_worker_cache_fetched_bytes"]["arena"] == size_bytes
    saved_s = counted["headrace_worker_cache_saved_seconds"]["arena"]
    assert abs(saved_s - saved_ms / 1000) < 1e-3
    assert counted["headrace_worker_cache_fetch_seconds"]["arena"] > 0
    client = CacheClient(service)
    stats = await client.stats()
    await client.close()
    assert stats is not None
    kv = stats["by_kind"]["kv"]
    assert kv["hit_bytes"] == size_bytes and kv["saved_us"] > 0


async def _is_zero(url: str) -> bool:
    return await leases(url) == 0


async def test_the_tail_of_a_prompt_continues_a_chain(tiny: LoadedModel, service: str) -> None:
    """Its head is in the pool, the service has more, the rest is computed."""
    first, second = make_engine(tiny), make_engine(tiny)
    async with running_link(first, service) as link:
        await write(link, steps_of(first, make_job("a", PROMPT[:100], max_tokens=1)))
    finish_all(second, [make_job("head", PROMPT[:40], max_tokens=1)])
    job = make_job("b", PROMPT)
    async with running_link(second, service) as link:
        fetched = await fetch(link, second, job)
        assert [block.depth for block in fetched.blocks] == [2, 3, 4, 5]
        second.add(job, fetched.blocks)
        fetched.close()
    out = finish_all(second)
    assert out.tokens == finish_all(make_engine(tiny), [job]).tokens
    assert (out.stories["b"].cached_local, out.stories["b"].cached_imported) == (32, 64)


async def test_what_is_there_counts_as_written_by_nobody(tiny: LoadedModel, service: str) -> None:
    """Of two workers with the same prompt one writes it; a pin reaches the service all the same."""
    job = make_job("a", PROMPT, max_tokens=1, cache_until_tokens=64, cache_ttl_ms=60_000)
    told = []
    for each in (make_job("a", PROMPT, max_tokens=1), job):
        engine = make_engine(tiny)
        async with running_link(engine, service) as link:
            await write(link, steps_of(engine, each))
            told.append(link.written_tokens("a"))
            link.forget("a")
            assert link.written_tokens("a") == 0
    assert told == [160, 0]
    client = CacheClient(service)
    stats = await client.stats()
    await client.close()
    assert stats is not None
    assert stats["pinned_bytes"] >= 4 * make_engine(tiny).block_bytes


async def test_another_layout_is_never_used(tiny: LoadedModel, service: str) -> None:
    """Same hashes, other numbers: as if nothing were there."""
    engine = make_engine(tiny)
    job = make_job("a", PROMPT)
    async with running_link(engine, service) as link:
        await write(link, steps_of(engine, job))
    client = CacheClient(service)
    other = CacheLink(client, layout=b"another!", block_bytes=engine.block_bytes)
    fetched = await fetch(other, make_engine(tiny), job)
    assert fetched.blocks == [] and other.counts.fetched_blocks.total() == 0
    fetched.close()
    await other.close()


async def test_an_absent_service_costs_nothing_but_misses(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    engine = make_engine(tiny)
    async with running_link(engine, f"unix://{tmp_path}/nobody") as link:
        job = make_job("a", PROMPT)
        fetched = await fetch(link, engine, job)
        assert fetched.blocks == []
        fetched.close()
        exports = steps_of(engine, job)
        await write(link, exports)
        assert link.written_tokens("a") == 0 and not link.is_writing("a")
        assert {export.state for export in exports} == {State.DROPPED}, "offered again later"
        assert link.counts.unwritten_blocks == len(exports)
        await link.written("a")


async def test_a_full_queue_drops_the_newest(
    tiny: LoadedModel, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before it are its parents."""
    monkeypatch.setattr(put_queue, "BLOCKS_MAX", 4)
    engine = make_engine(tiny)
    async with running_link(engine, service) as link:
        exports = steps_of(engine, make_job("a", PROMPT))
        await write(link, exports)
        assert link.counts.unwritten_blocks == len(exports) - 4
        assert link.written_tokens("a") == 64


async def test_a_block_withdrawn_in_the_middle_is_not_written(
    tiny: LoadedModel, service: str
) -> None:
    """Nor is any other with wrong bytes: a batch that was begun is given up as a whole."""
    engine = make_engine(tiny)
    async with running_link(engine, service) as link:
        exports = steps_of(engine, make_job("a", PROMPT, max_tokens=1))
        engine._kv.tensor[2, 0, 0, 0] = float("nan")
        await write(link, exports)
        assert link.written_tokens("a") == 0
        assert link.counts.unwritten_blocks > 0
        held = await link._client.has([export.facts.hash for export in exports])
        assert not any(held)


async def test_a_lookup_that_does_not_pay_is_not_made(tiny: LoadedModel, service: str) -> None:
    """Measured once; then an engine that computes a token in no time computes."""
    engine = make_engine(tiny)
    job = make_job("a", PROMPT)
    fast = Outlook(token_ms=1e-7)
    async with running_link(engine, service) as link:
        await write(link, steps_of(engine, job))
        for _ in range(3):
            size_bytes = 64 * 1024
            link.speeds.note(
                asked=1,
                found=1,
                tier="arena",
                size_bytes=size_bytes,
                took_ms=5.0,
                now_ms=link._clock.now_ms(),
            )
        fetched = await fetch(link, make_engine(tiny), job, fast)
        assert (fetched.blocks, fetched.reason, fetched.asked) == ([], Reason.DEARER, 0)
        fetched.close()
        assert link.counts.lookups == {"dearer": 1}


# in a whole worker


async def deltas_of(redis: Redis, job_id: str) -> list[Delta]:
    rows = parse_entries(await redis.xrange(keys.replies("test", "g")))
    return [d for row in rows for d in wire.decode_deltas(row.data) if d.job == job_id]


def steered(name: str, prompt: list[int], **fields: Any) -> Job:
    """A job that fills the cache and says nothing, as `prewarm` makes it."""
    wanted = {"max_tokens": 1, "cache_until_tokens": len(prompt), "cache_ttl_ms": 60_000}
    return make_job(name, prompt, **(wanted | fields))


async def test_a_prewarmed_prompt_is_written_when_its_job_ends(
    tiny: LoadedModel, valkey: Valkey, redis: Redis, service: str
) -> None:
    """Its end says how much was written; what another worker computes then comes from there."""
    worker = Running(tiny, valkey, cache_at=service)
    await ended(redis, steered("warm", PROMPT))
    deltas = await deltas_of(redis, "warm")
    assert [delta.finish is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert sum(len(delta.tokens) for delta in deltas) == 1
    assert deltas[-1].cache_write_tokens == 160
    await ended(redis, steered("again", PROMPT))
    assert (await deltas_of(redis, "again"))[-1].cache_write_tokens == 0
    await worker.stop()
    await redis.delete(keys.workers("test"))  # as the dispatcher would
    heir = Running(tiny, valkey, cache_at=service)
    await ended(redis, make_job("asked", PROMPT))
    last = (await deltas_of(redis, "asked"))[-1]
    assert (last.cached_tokens, last.cache_write_tokens) == (144, 0)
    assert heir.consumer.counts().cache.fetched_blocks["arena"] == 9
    await heir.stop()
    heir.engine.check_integrity()


async def test_the_end_of_a_job_does_not_wait_for_a_service_that_is_away(
    tiny: LoadedModel, valkey: Valkey, redis: Redis, tmp_path: Path
) -> None:
    worker = Running(tiny, valkey, cache_at=f"unix://{tmp_path}/nobody")
    tokens, _ = await ended(redis, steered("warm", PROMPT))
    assert len(tokens) == 1
    assert (await deltas_of(redis, "warm"))[-1].cache_write_tokens == 0
    await worker.stop()


async def test_what_the_engine_reads_stays_lent_whatever_becomes_of_the_job(
    tiny: LoadedModel, valkey: Valkey, redis: Redis, service: str
) -> None:
    """A later attempt comes while the engine is busy: it may be reading by then."""
    writer = make_engine(tiny)
    async with running_link(writer, service) as link:
        await write(link, steps_of(writer, make_job("w", PROMPT)))
    worker = Running(tiny, valkey, cache_at=service)
    await ended(redis, make_job("first", [5], max_tokens=1))
    busy, go_on = threading.Event(), threading.Event()

    def occupy(_: Engine) -> None:
        busy.set()
        assert go_on.wait(30)

    thread = worker.consumer._thread
    assert thread is not None
    thread.send(occupy)
    assert await asyncio.to_thread(busy.wait, 10)
    [name] = await redis.hkeys(keys.workers("test"))
    stream = keys.jobs("test", name.decode())
    await redis.xadd(stream, {"job": wire.encode_job(make_job("a", PROMPT))})
    await eventually(lambda: _lent(service, 1))
    await redis.xadd(stream, {"job": wire.encode_job(make_job("a", PROMPT, attempt=2))})
    await eventually(lambda: _lent(service, 2))
    go_on.set()
    await eventually(lambda: _lent(service, 0))
    await eventually(lambda: worker.engine.counts()[:2] == (0, 0))
    await worker.stop()
    worker.engine.check_integrity()


async def _lent(url: str, count: int) -> bool:
    return await leases(url) == count
