"""A whole worker in the test's own process, with a gateway's fleet, on a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis
from tokenizers import Tokenizer

from headrace import grammars, keys, wire
from headrace.clock import SystemClock
from headrace.errors import CallerError, JobFailedError
from headrace.grammars import Grammars, Matcher
from headrace.policy.hashing import block_hashes, root_hash
from headrace.streams import parse_entries
from headrace.types import (
    BLOCK_KEY_BYTES,
    FinishReason,
    Job,
    JobDone,
    JobProgress,
    Progress,
    pack_tokens,
)
from headrace.wire_reports import Event, decode_event
from headrace_gateway.fleet import Fleet
from headrace_gateway.generation import Generation
from headrace_worker import metrics
from headrace_worker.consumer import Consumer
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.loading import LoadedModel
from headrace_worker.membership import Capacity
from headrace_worker.settings import WorkerSettings
from support.fleet import eventually
from support.stack import free_port
from support.valkey import Valkey
from worker.builders import make_job, make_link, random_tokens

KV_TOKENS = 4_096


@pytest.fixture
async def fleet(valkey: Valkey) -> AsyncIterator[Fleet]:
    fleet = Fleet(valkey.url, "g")
    await fleet.start()
    yield fleet
    await fleet.stop()


class Running:
    """A consumer and its task."""

    def __init__(
        self, loaded: LoadedModel, valkey: Valkey, *, cache_at: str = "", **settings: object
    ) -> None:
        """`cache_at`: the address of its cache service, if it has one."""
        self.engine = Engine(loaded, EngineConfig(kv_tokens=KV_TOKENS), SystemClock())
        self.cache = make_link(self.engine, cache_at) if cache_at else None
        self.consumer = Consumer(
            WorkerSettings(redis_url=valkey.url, **settings),  # type: ignore[arg-type]
            self.engine,
            loaded.record,
            Capacity(KV_TOKENS, 8),
            SystemClock(),
            self.cache,
            threads=1,
        )
        self.task = asyncio.create_task(self.consumer.run())

    async def stop(self) -> None:
        self.consumer.drain()
        async with asyncio.timeout(20):
            await self.task


def a_job(name: str, *, tokens: int = 40, seed: int = 3) -> Job:
    return make_job(name, random_tokens(30, seed), max_tokens=tokens)


async def everything(generation: Generation) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while True:
        chunk = await generation.next()
        tokens += chunk.tokens
        if chunk.finish is not None:
            return tokens, chunk.finish.reason


async def a_ready(fleet: Fleet) -> None:
    await eventually(lambda: fleet.ready() == "", limit_s=20)


async def workers(redis: Redis) -> set[bytes]:
    return set(await redis.hkeys(keys.workers("test")))


async def test_tokens_come_through_and_a_drained_worker_leaves_nothing(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    jobs = [a_job(f"j{n}", seed=n) for n in range(6)]
    generations = [await fleet.submit(job, INVALID_SPAN) for job in jobs]
    results = [await everything(g) for g in generations]
    assert {len(tokens) for tokens, _ in results} == {40}
    assert {reason for _, reason in results} == {FinishReason.LENGTH}
    again = await fleet.submit(a_job("again", seed=2), INVALID_SPAN)
    assert await everything(again) == results[2]
    await worker.stop()
    await eventually(lambda: _gone(redis))
    worker.engine.check_integrity()


async def _gone(redis: Redis) -> bool:
    left = await redis.keys("headrace:{test}:*")
    kinds = {key.split(b":")[2] for key in left}
    return not kinds & {b"lease", b"workers", b"load", b"jobs"}


async def test_a_worker_that_lost_its_lease_starts_over_and_the_stream_stays_exact(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """As after a long pause: its jobs are others' by then, here its own under a new id."""
    worker = Running(tiny, valkey, lease_ms=600)
    await a_ready(fleet)
    calm = await everything(await fleet.submit(a_job("calm", tokens=300), INVALID_SPAN))
    [before] = await workers(redis)
    generation = await fleet.submit(a_job("paused", tokens=300), INVALID_SPAN)
    first = await generation.next()
    await redis.delete(keys.lease("test", before.decode()))
    tokens, reason = await everything(generation)
    assert ([*first.tokens, *tokens], reason) == calm
    await eventually(lambda: _renamed(redis, before))
    await worker.stop()


async def _renamed(redis: Redis, before: bytes) -> bool:
    names = await workers(redis)
    return len(names) == 1 and before not in names


async def test_a_restarted_process_does_not_take_over_its_own_id(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """Killed and started again within its lease, with the same id from its environment."""
    first = Running(tiny, valkey, worker_id="pinned", lease_ms=2_000)
    await a_ready(fleet)
    calm = await everything(await fleet.submit(a_job("calm", tokens=450), INVALID_SPAN))
    generation = await fleet.submit(a_job("cut", tokens=450), INVALID_SPAN)
    start = await generation.next()
    first.task.cancel()  # as good as kill -9: it never says goodbye
    await asyncio.gather(first.task, return_exceptions=True)
    second = Running(tiny, valkey, worker_id="pinned")
    tokens, reason = await everything(generation)
    assert ([*start.tokens, *tokens], reason) == calm
    assert generation.attempt == 2
    await eventually(lambda: _renamed(redis, b"pinned"))
    await second.stop()


async def test_a_job_that_comes_twice_is_run_once(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """Redis forgot the hand-off of its last second, and the job came back to where it runs."""
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    calm = await everything(await fleet.submit(a_job("calm", tokens=450), INVALID_SPAN))
    generation = await fleet.submit(a_job("twice", tokens=450), INVALID_SPAN)
    first = await generation.next()
    [name] = await workers(redis)
    stream = keys.jobs("test", name.decode())
    [(entry, fields)] = await redis.xrange(stream)
    await redis.xadd(stream, fields)
    await redis.xdel(stream, entry)
    tokens, reason = await everything(generation)
    assert ([*first.tokens, *tokens], reason) == calm
    await eventually(lambda: _nothing_stands(redis, stream))
    await worker.stop()


async def _nothing_stands(redis: Redis, stream: str) -> bool:
    return await redis.xlen(stream) == 0


async def test_redis_away_for_a_moment_loses_no_token(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """The worker goes on computing; what it made is sent when Redis is back."""
    worker = Running(tiny, valkey, lease_ms=60_000)
    await a_ready(fleet)
    calm = await everything(await fleet.submit(a_job("calm", tokens=400), INVALID_SPAN))
    generation = await fleet.submit(a_job("cut", tokens=400), INVALID_SPAN)
    first = await generation.next()
    await asyncio.sleep(1.1)  # the append-only file is written each second
    valkey.kill()
    await asyncio.sleep(0.5)
    valkey.start()
    tokens, reason = await everything(generation)
    assert ([*first.tokens, *tokens], reason) == calm
    await worker.stop()


async def test_a_drain_hands_back_what_does_not_end_in_time(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet
) -> None:
    worker = Running(tiny, valkey, drain_ms=100)
    await a_ready(fleet)
    calm = await everything(await fleet.submit(a_job("calm", tokens=450), INVALID_SPAN))
    generation = await fleet.submit(a_job("long", tokens=450), INVALID_SPAN)
    first = await generation.next()
    heir = Running(tiny, valkey)
    await worker.stop()
    tokens, reason = await everything(generation)
    assert ([*first.tokens, *tokens], reason) == calm
    await heir.stop()


async def test_a_job_the_engine_refuses_fails_alone(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet
) -> None:
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    bad = make_job("bad", [10**6], max_tokens=4)
    refused = await fleet.submit(bad, INVALID_SPAN)
    good = await fleet.submit(a_job("good"), INVALID_SPAN)
    with pytest.raises(JobFailedError):
        await everything(refused)
    assert len((await everything(good))[0]) == 40
    await worker.stop()


async def test_a_grammar_is_compiled_for_its_job(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet
) -> None:
    """The text keeps to it; one that does not compile ends its own job, with the reason."""
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    held = make_job("held", [5], max_tokens=90, grammar=grammars.choice(["wheel", "mill"]))
    wrong = make_job("wrong", [5], grammar="no grammar at all")
    streams = [await fleet.submit(job, INVALID_SPAN) for job in (wrong, held, a_job("free"))]
    with pytest.raises(JobFailedError, match="grammar"):
        await everything(streams[0])
    tokens, reason = await everything(streams[1])
    text = Tokenizer.from_buffer(tiny.record.tokenizer_json).decode(tokens)
    assert text in ("wheel", "mill") and reason is FinishReason.STOP
    assert len((await everything(streams[2]))[0]) == 40
    await worker.stop()


async def test_logprobs_come_through(tiny: LoadedModel, valkey: Valkey, fleet: Fleet) -> None:
    """Those of the prompt with the first chunk, those of the output with their tokens."""
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    jobs = [
        make_job(f"j{i}", random_tokens(30, i), max_tokens=9, logprobs=2, prompt_logprobs=1)
        for i in range(3)
    ]
    for generation in [await fleet.submit(job, INVALID_SPAN) for job in jobs]:
        chunks = [await generation.next()]
        while chunks[-1].finish is None:
            chunks.append(await generation.next())
        assert [len(chunk.prompt_logprobs) for chunk in chunks] == [29] + [0] * (len(chunks) - 1)
        assert all(len(chunk.logprobs) == len(chunk.tokens) for chunk in chunks)
        assert sum(len(chunk.tokens) for chunk in chunks) == 9
        for item in (item for chunk in chunks for item in chunk.logprobs):
            assert len(item.top) == 2 and item.logprob <= item.top[0][1] <= 0
    await worker.stop()


async def test_metrics_tell_what_the_worker_does(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet
) -> None:
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    port = free_port()
    stop = metrics.serve(port, "test", worker.consumer.status, worker.consumer.counts)
    await everything(await fleet.submit(a_job("j"), INVALID_SPAN))
    url = f"http://127.0.0.1:{port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        lines = (await answer.text()).splitlines()
    assert f'headrace_worker_free_kv_tokens{{model="test"}} {KV_TOKENS}.0' in lines
    assert 'headrace_worker_ready{model="test"} 1.0' in lines
    assert 'headrace_worker_unwritten_blocks_total{model="test"} 0.0' in lines
    assert 'headrace_worker_forced_tokens_total{model="test"} 0.0' in lines
    told = {
        line.split("{")[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("headrace_worker_guessed")
    }
    guessed = told["headrace_worker_guessed_tokens_total"]
    right = told["headrace_worker_guessed_right_tokens_total"]
    assert 0 <= right <= guessed
    assert any(
        line.startswith("headrace_worker_steps_total") and float(line.split()[-1]) >= 2
        for line in lines
    )
    stop()
    await worker.stop()


async def test_cancel_reaches_the_engine(tiny: LoadedModel, valkey: Valkey, fleet: Fleet) -> None:
    worker = Running(tiny, valkey)
    await a_ready(fleet)
    generation = await fleet.submit(a_job("j", tokens=450), INVALID_SPAN)
    await generation.next()
    await generation.cancel()
    await eventually(lambda: worker.engine.counts() == (0, 0, KV_TOKENS))
    await worker.stop()


async def test_a_dead_part_ends_the_worker_instead_of_leaving_a_trap(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose engine died must not keep its lease: its jobs would wait for ever."""
    worker = Running(tiny, valkey, lease_ms=600)
    await a_ready(fleet)

    def broken() -> None:
        raise RuntimeError("no step today")

    monkeypatch.setattr(worker.engine, "step", broken)
    generation = await fleet.submit(a_job("j"), INVALID_SPAN)
    with pytest.raises(RuntimeError, match="engine's thread died"):
        async with asyncio.timeout(20):
            await worker.task
    monkeypatch.undo()
    heir = Running(tiny, valkey)
    assert len((await everything(generation))[0]) == 40
    await heir.stop()
    with contextlib.suppress(RuntimeError):
        await worker.task


def in_ms(milliseconds: int) -> int:
    return SystemClock().wall_ms() + milliseconds


@pytest.mark.parametrize("late", ["ttft_by_ms", "done_by_ms"])
async def test_a_job_that_comes_too_late_is_ended_as_it_comes(
    tiny: LoadedModel, valkey: Valkey, redis: Redis, late: str
) -> None:
    """Nothing is computed for it, and the dispatcher is told why."""
    worker = Running(tiny, valkey)
    job = make_job("late", [5], **{late: in_ms(-1)})
    assert await ended(redis, job) == ([], FinishReason.DEADLINE)
    [done] = [e for e in await told(redis) if isinstance(e, JobDone)]
    assert done.progress == JobProgress("late", 0, 0, 0) and done.reason is FinishReason.DEADLINE
    assert worker.engine._arrivals == 0
    assert worker.consumer.counts().late_jobs == 1
    resumed = make_job("resumed", [5], max_tokens=3, logged=[7], ttft_by_ms=in_ms(-1))
    assert (await ended(redis, resumed))[1] is FinishReason.LENGTH, "it has had its first token"
    await worker.stop()


async def test_a_deadline_passes_while_a_grammar_is_compiled(
    tiny: LoadedModel, valkey: Valkey, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends on time, whoever is still at work for it."""
    gate = threading.Event()

    def slow(self: Grammars, grammar: str) -> Matcher:
        assert gate.wait(30)
        raise CallerError("nobody wants to know any more")

    monkeypatch.setattr(Grammars, "compile", slow)
    worker = Running(tiny, valkey)
    job = make_job("held", [5], grammar=grammars.choice(["mill"]), ttft_by_ms=in_ms(300))
    assert await ended(redis, job) == ([], FinishReason.DEADLINE)
    gate.set()
    assert (await ended(redis, a_job("next")))[1] is FinishReason.LENGTH
    await worker.stop()


async def test_a_deadline_passes_while_tokens_come(
    tiny: LoadedModel, valkey: Valkey, redis: Redis
) -> None:
    """The stream ends with the tokens so far."""
    worker = Running(tiny, valkey)
    clock = worker.engine._clock = Hasty()
    job = replace(a_job("long", tokens=480), done_by_ms=in_ms(3_600_000))
    watch = asyncio.create_task(ended(redis, job))
    await eventually(lambda: redis.xlen(keys.replies("test", "g")), limit_s=20)
    clock.ahead_ms = 2 * 3_600_000
    tokens, reason = await watch
    assert reason is FinishReason.DEADLINE and 0 < len(tokens) < 480
    await worker.stop()


class Hasty(SystemClock):
    """A monotonic clock that a test sets forward."""

    ahead_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.ahead_ms


async def test_the_dispatcher_is_told_of_progress_blocks_and_ends(
    tiny: LoadedModel, valkey: Valkey, redis: Redis
) -> None:
    """Reports count from 1; prompts are computed or cached; a leaver takes its blocks away."""
    worker = Running(tiny, valkey)
    await ended(redis, a_job("first", tokens=300))
    await ended(redis, a_job("second", tokens=300))
    [name] = await workers(redis)
    blocks = keys.blocks("test", name.decode())
    await eventually(lambda: _reported(redis, output_tokens=600))
    events = await told(redis)
    ends = [event for event in events if isinstance(event, JobDone)]
    assert [(end.worker, end.progress, end.reason) for end in ends] == [
        (name.decode(), JobProgress("first", 30, 0, 300), FinishReason.LENGTH),
        (name.decode(), JobProgress("second", 14, 16, 300), FinishReason.LENGTH),
    ]
    reports = [event for event in events if isinstance(event, Progress)]
    assert [report.sequence for report in reports] == list(range(1, len(reports) + 1))
    assert sum(report.prefill_tokens for report in reports) == 44
    assert sum(report.busy_ms for report in reports) > 0
    stored = b"".join(report.stored for report in reports)
    prompt = pack_tokens(random_tokens(30, 3))
    [first] = block_hashes(root_hash(tiny.record.fingerprint, b""), prompt)
    assert stored[:BLOCK_KEY_BYTES] == first[:BLOCK_KEY_BYTES]
    await eventually(lambda: redis.exists(blocks))
    await worker.stop()
    assert not await redis.exists(blocks)


async def told(redis: Redis) -> list[Event]:
    rows = await redis.xrange(keys.events("test"))
    return [decode_event(entry.data) for entry in parse_entries(rows)]


async def _reported(redis: Redis, output_tokens: int) -> bool:
    reports = [event for event in await told(redis) if isinstance(event, Progress)]
    return sum(report.output_tokens for report in reports) == output_tokens


async def ended(redis: Redis, job: Job) -> tuple[list[int], FinishReason]:
    """What comes of a job that is put straight into the only worker's stream."""
    await eventually(lambda: _one_worker(redis), limit_s=20)
    [name] = await workers(redis)
    await redis.hset(keys.job("test", job.id), "attempt", job.attempt)
    await redis.xadd(keys.jobs("test", name.decode()), {"job": wire.encode_job(job)})
    await eventually(lambda: redis.hget(keys.job("test", job.id), "done"), limit_s=30)
    rows = parse_entries(await redis.xrange(keys.replies("test", "g")))
    deltas = [d for row in rows for d in wire.decode_deltas(row.data) if d.job == job.id]
    finish = deltas[-1].finish
    assert finish is not None
    return [token for delta in deltas for token in delta.tokens], finish.reason


async def _one_worker(redis: Redis) -> bool:
    return len(await workers(redis)) == 1
