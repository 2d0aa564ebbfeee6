"""A whole worker in the test's own process, with a gateway's fleet, on a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis
from tokenizers import Tokenizer

from headrace import grammars, keys
from headrace.clock import SystemClock
from headrace.errors import JobFailedError
from headrace.types import FinishReason, Job
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
from worker.builders import make_job, random_tokens

KV_TOKENS = 4_096


@pytest.fixture
async def fleet(valkey: Valkey) -> AsyncIterator[Fleet]:
    fleet = Fleet(valkey.url, "g")
    await fleet.start()
    yield fleet
    await fleet.stop()


class Running:
    """A consumer and its task."""

    def __init__(self, loaded: LoadedModel, valkey: Valkey, **settings: object) -> None:
        self.engine = Engine(loaded, EngineConfig(kv_tokens=KV_TOKENS), SystemClock())
        self.consumer = Consumer(
            WorkerSettings(redis_url=valkey.url, **settings),  # type: ignore[arg-type]
            self.engine,
            loaded.record,
            Capacity(KV_TOKENS, 8),
            SystemClock(),
            cache=None,
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
