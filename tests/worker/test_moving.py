"""A job moves from the worker that computed its prompt to one that goes on with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import INVALID_SPAN
from redis.asyncio import Redis
from tokenizers import Tokenizer

from headrace import frames, grammars, keys
from headrace.arena_view import ArenaView
from headrace.clock import SystemClock
from headrace.errors import WireError
from headrace.frame_codec import PREFIX
from headrace.types import BLOCK_TOKENS, FinishReason, Job, WorkerRole, pack_tokens
from headrace_gateway.fleet import Fleet
from headrace_worker.consumer import Consumer
from headrace_worker.engine import Engine, EngineConfig
from headrace_worker.kv.export import Export
from headrace_worker.loading import LoadedModel
from headrace_worker.membership import Capacity
from headrace_worker.moving import messages
from headrace_worker.moving.inbox import Inbox
from headrace_worker.moving.landing import Landing
from headrace_worker.moving.mover import Mover
from headrace_worker.settings import WorkerSettings
from support.fleet import eventually
from support.valkey import Valkey
from worker.builders import Output, finish_all, make_engine, make_job, random_tokens, take_export
from worker.test_consumer import everything

PROMPT = random_tokens(150, 5)
KV_TOKENS = 4_096

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 77, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
}


def moving(job: Job) -> Job:
    return replace(job, move_to="d", move_address="tcp://127.0.0.1:1")


def first_part(engine: Engine, job: Job) -> tuple[Output, list[Export], Job]:
    """Steps until `job` is to move: what was said, what was lent, the job as it goes on."""
    out, lent = Output(), []
    engine.add(moving(job))
    while engine.has_work:
        result = engine.step()
        out.deltas += result.deltas
        lent += result.lent
        for story in result.handed:
            said = [token for delta in out.deltas for token in delta.tokens]
            found = story.progress.cached
            there = replace(job, attempt=2, logged=pack_tokens(said), found_tokens=found)
            engine.check_integrity()
            return out, lent, there
    raise AssertionError("it ended instead of moving")


@pytest.mark.parametrize("name", SAMPLINGS)
def test_two_engines_together_say_what_one_says(tiny: LoadedModel, name: str) -> None:
    """Text, logprobs and what is told of the cache do not show where the job was."""
    job = make_job("j", PROMPT, max_tokens=30, **SAMPLINGS[name])
    alone = finish_all(make_engine(tiny), [job])
    out, lent, there = first_part(make_engine(tiny, step_tokens_max=64), job)
    assert len(lent) == len(PROMPT) // BLOCK_TOKENS, "each full block of the prompt, once"
    decode = make_engine(tiny)
    decode.take_in([take_export(export) for export in lent], job.band, job.tenant)
    rest = finish_all(decode, [there])
    said = [*there.logged, *rest.tokens["j"]]
    assert said == alone.tokens["j"]
    assert rest.steps == 29, "only the end of the prompt is computed again, in the first step"
    logprobs = [each for delta in (*out.deltas, *rest.deltas) for each in delta.logprobs]
    expected = [each for delta in alone.deltas for each in delta.logprobs]
    assert [each.top[:1] and each.top[0][0] for each in logprobs] == [
        each.top[:1] and each.top[0][0] for each in expected
    ]
    assert [each.logprob for each in logprobs] == pytest.approx(
        [each.logprob for each in expected], abs=1e-4
    )
    prompt = [each for delta in (*out.deltas, *rest.deltas) for each in delta.prompt_logprobs]
    assert len(prompt) == (len(PROMPT) - 1 if name == "logprobs" else 0)
    assert {delta.cached_tokens for delta in rest.deltas} == {0}, "as its first worker said"
    assert rest.stories["j"].progress == alone.stories["j"].progress


def test_blocks_that_give_way_before_they_were_sent_are_kept_or_missing(tiny: LoadedModel) -> None:
    """The pool of the first worker goes on being used; what is lent never changes under way."""
    job = make_job("j", PROMPT, max_tokens=8)
    alone = finish_all(make_engine(tiny), [job])
    prefill = make_engine(tiny, kv_tokens=256)
    _, lent, there = first_part(prefill, job)
    finish_all(prefill, [make_job("other", random_tokens(200, 9), max_tokens=4)])
    decode = make_engine(tiny)
    decode.take_in([take_export(export) for export in lent], job.band, job.tenant)
    rest = finish_all(decode, [there])
    assert [*there.logged, *rest.tokens["j"]] == alone.tokens["j"]


def test_a_job_that_nobody_takes_goes_on_where_it_is(tiny: LoadedModel) -> None:
    job = make_job("j", PROMPT, max_tokens=8)
    alone = finish_all(make_engine(tiny), [job])
    prefill = make_engine(tiny)
    _, lent, there = first_part(prefill, job)
    for export in lent:
        export.drop()
    rest = finish_all(prefill, [there])
    assert [*there.logged, *rest.tokens["j"]] == alone.tokens["j"]
    assert rest.steps == 7


def test_a_pool_without_room_takes_what_fits(tiny: LoadedModel) -> None:
    """A receiver that is full leaves the rest to be computed; those that run lose nothing."""
    job = make_job("j", PROMPT, max_tokens=4)
    _, lent, _ = first_part(make_engine(tiny), job)
    decode = make_engine(tiny, kv_tokens=96)
    payloads = [take_export(export) for export in lent]
    decode.take_in(payloads, job.band, job.tenant)
    decode.check_integrity()
    nothing = replace(payloads[0], hash=b"x" * 32, data=b"short")
    decode.take_in([nothing], job.band, job.tenant)
    assert not decode.holds(nothing.hash), "what is no KV is not found"
    decode.check_integrity()


class Pair:
    """A receiver's engine behind an inbox, whose commands run at once, and a sender."""

    def __init__(self, loaded: LoadedModel, *, shared: bool) -> None:
        self.prefill, self.decode = make_engine(loaded, step_tokens_max=64), make_engine(loaded)
        self.inbox = Inbox(
            self.decode,
            "tcp://127.0.0.1:0",
            kv_tokens=KV_TOKENS,
            max_jobs=8,
            send=lambda command: command(self.decode),
        )
        if not shared:
            self.inbox.landing.close()
        self.mover = Mover(self.prefill.layout, self.prefill.block_bytes, SystemClock())

    async def __aenter__(self) -> Pair:
        self.address = await self.inbox.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.mover.close()
        await self.inbox.stop()

    def start(self, job: Job) -> Job:
        """Computes the prompt and lends its KV; the job as it goes on."""
        self.mover.begin(replace(job, move_to="d", move_address=self.address))
        _, lent, there = first_part(self.prefill, job)
        self.mover.lend(lent)
        return there


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
async def test_kv_arrives_over_shared_memory_and_over_tcp(tiny: LoadedModel, shared: bool) -> None:
    jobs = [make_job(f"j{n}", random_tokens(150 + 40 * n, n), max_tokens=6) for n in range(6)]
    alone = finish_all(make_engine(tiny), jobs)
    async with Pair(tiny, shared=shared) as pair:
        moved = [pair.start(job) for job in jobs]
        for job in jobs:
            arrived = await pair.mover.finish(job.id)
            assert (arrived.reason, arrived.shared) == ("", shared)
            assert arrived.blocks == len(job.prompt) // BLOCK_TOKENS
            assert (arrived.kv_tokens, arrived.max_jobs) == (KV_TOKENS, 8)
        pair.inbox.check_integrity()
        assert pair.inbox.landing.free_count == pair.inbox.landing.count
        rest = finish_all(pair.decode, moved)
        for job, there in zip(jobs, moved, strict=True):
            assert [*there.logged, *rest.tokens[job.id]] == alone.tokens[job.id]
        assert rest.steps == 5
        again = pair.start(make_job("again", jobs[0].prompt, max_tokens=6))
        assert (await pair.mover.finish("again")).blocks == 0, "what is there is not sent twice"
        assert len(again.logged) == 1


async def test_a_receiver_that_is_gone_or_leaves_says_so_soon(tiny: LoadedModel) -> None:
    job = make_job("j", PROMPT, max_tokens=6)
    async with Pair(tiny, shared=True) as pair:
        pair.inbox.closed_for = "the worker leaves"
        pair.start(job)
        assert "leaves" in (await pair.mover.finish("j")).reason
        pair.inbox.closed_for = ""
        pair.mover = Mover(b"another.", pair.prefill.block_bytes, SystemClock())
        pair.start(job)
        assert "another model" in (await pair.mover.finish("j")).reason
    pair.mover = Mover(pair.prefill.layout, pair.prefill.block_bytes, SystemClock())
    pair.start(job)
    assert (await pair.mover.finish("j")).reason.startswith("ConnectionRefused")
    assert (await pair.mover.finish("never begun")).reason == "its KV was not sent"


async def test_a_sender_that_goes_leaves_no_slot_behind(tiny: LoadedModel) -> None:
    """Slots that it had been given come back when it cannot write there any more."""
    async with Pair(tiny, shared=True) as pair:
        pair.start(make_job("j", PROMPT))
        pair.mover.forget("j")
        await pair.mover.close()
        landing = pair.inbox.landing
        await eventually(lambda: landing.free_count == landing.count, limit_s=10)
        pair.inbox.check_integrity()


def test_slots_of_a_sender_that_still_has_them_mapped_are_not_given_again(tmp_path: Path) -> None:
    landing = Landing(4096, 4, tmp_path)
    landing.give(7, 3)
    view = ArenaView.open(frames.Welcome(0, landing.path, landing.nonce, landing.size_bytes, 7))
    assert view is not None
    landing.abandon(7)
    assert landing.free_count == 1
    del view
    landing.sweep()
    assert landing.free_count == 4
    landing.check_integrity()
    landing.close()
    assert not list(tmp_path.iterdir())
    Landing(4096, 4, tmp_path)._file = -1  # as if killed: nobody holds its lock
    Landing(4096, 4, tmp_path).close()


MESSAGES = [
    messages.Greet(1, b"layout..", 4096),
    messages.Welcome(1, "", 100, 8, "/dev/shm/x", b"n" * 16, 5000, 3, 512, 4096),
    messages.Ask(2, (b"h" * 32, b"g" * 32)),
    messages.Places(2, (messages.HELD, 7)),
    messages.Blocks(3, 1, "tenant", (messages.Block(b"h" * 32, b"p" * 32, 4, 7),), (9,), 4096),
    messages.Flush(4),
    messages.Flushed(4, "the worker leaves"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_come_back_as_they_were(message: messages.Message) -> None:
    raw = messages.encode(message)
    _, header_bytes, payload_bytes = PREFIX.unpack(raw[: PREFIX.size])
    assert header_bytes == len(raw) - PREFIX.size
    assert payload_bytes == sum(message.sizes)
    assert messages.decode(raw[PREFIX.size :]) == message


@given(
    st.sampled_from(MESSAGES),
    st.integers(0, 400),
    st.binary(max_size=4),
)
def test_a_damaged_message_is_refused_or_another_valid_one(
    message: messages.Message, at: int, junk: bytes
) -> None:
    header = bytearray(messages.encode(message)[PREFIX.size :])
    header[at : at + len(junk)] = junk
    try:
        found = messages.decode(bytes(header))
    except WireError:
        return
    assert isinstance(found, messages.Message)


# whole workers


@pytest.fixture
async def fleet(valkey: Valkey) -> AsyncIterator[Fleet]:
    fleet = Fleet(valkey.url, "g")
    await fleet.start()
    yield fleet
    await fleet.stop()


class Working:
    """A consumer of some role and its task."""

    def __init__(self, loaded: LoadedModel, valkey: Valkey, role: WorkerRole, **settings: object):
        self.engine = Engine(loaded, EngineConfig(kv_tokens=KV_TOKENS), SystemClock())
        self.consumer = Consumer(
            WorkerSettings(redis_url=valkey.url, worker_id=role.value, **settings),  # type: ignore[arg-type]
            self.engine,
            loaded.record,
            Capacity(KV_TOKENS, 8, role),
            SystemClock(),
            None,
            threads=1,
        )
        self.task = asyncio.create_task(self.consumer.run())

    async def stop(self) -> None:
        self.consumer.drain()
        async with asyncio.timeout(20):
            await self.task


async def both_ready(fleet: Fleet, redis: Redis) -> None:
    await eventually(lambda: fleet.ready() == "", limit_s=20)
    await eventually(lambda: _two(redis), limit_s=20)
    await asyncio.sleep(0.4)  # the dispatcher looks at the fleet four times a second


async def _two(redis: Redis) -> bool:
    return len(await redis.hkeys(keys.workers("test"))) == 2


async def test_jobs_move_between_two_workers_and_nobody_can_tell(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """Through gateway, dispatcher and Redis: the same text, usage of the first, nothing left."""
    jobs = [
        make_job(f"j{n}", random_tokens(60 + 30 * n, n), max_tokens=20, **sampling)
        for n, sampling in enumerate(SAMPLINGS.values())
    ]
    alone = finish_all(make_engine(tiny), jobs)
    prefill = Working(tiny, valkey, WorkerRole.PREFILL)
    decode = Working(tiny, valkey, WorkerRole.DECODE)
    await both_ready(fleet, redis)
    generations = [await fleet.submit(job, INVALID_SPAN) for job in jobs]
    for job, generation in zip(jobs, generations, strict=True):
        tokens, reason = await everything(generation)
        assert (tokens, reason) == (alone.tokens[job.id], FinishReason.LENGTH)
        assert generation.attempt == 2, "it moved once"
    moves = prefill.consumer._moves
    assert (moves.moved_out, moves.stayed) == (len(jobs), 0)
    await eventually(lambda: _nothing_reserved(redis), limit_s=5)
    await prefill.stop()
    await decode.stop()
    prefill.engine.check_integrity()
    decode.engine.check_integrity()


async def test_a_grammar_is_kept_to_across_a_move(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """Whoever goes on compiles it and follows what stands there already."""
    words = ["the mill stands still", "the wheel turns on and on"]
    job = make_job("held", PROMPT, max_tokens=90, grammar=grammars.choice(words))
    prefill = Working(tiny, valkey, WorkerRole.PREFILL)
    decode = Working(tiny, valkey, WorkerRole.DECODE)
    await both_ready(fleet, redis)
    generation = await fleet.submit(job, INVALID_SPAN)
    tokens, reason = await everything(generation)
    text = Tokenizer.from_buffer(tiny.record.tokenizer_json).decode(tokens)
    assert (text in words, reason) == (True, FinishReason.STOP)
    assert generation.attempt == 2
    await prefill.stop()
    await decode.stop()


async def test_a_job_that_cannot_move_stays_and_says_the_same(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """The decoding worker lives and takes nothing: whoever computed the prompt goes on."""
    job = make_job("j", PROMPT, max_tokens=20, temperature=0.8, seed=4)
    alone = finish_all(make_engine(tiny), [job])
    prefill = Working(tiny, valkey, WorkerRole.PREFILL)
    decode = Working(tiny, valkey, WorkerRole.DECODE)
    await both_ready(fleet, redis)
    inbox = decode.consumer._moves._inbox
    assert inbox is not None
    inbox.closed_for = "as if it left"
    generation = await fleet.submit(job, INVALID_SPAN)
    assert await everything(generation) == (alone.tokens["j"], FinishReason.LENGTH)
    assert generation.attempt == 1
    assert prefill.consumer._moves.stayed == 1
    await eventually(lambda: _nothing_reserved(redis), limit_s=5)
    await prefill.stop()
    await decode.stop()


async def test_a_cancel_finds_a_job_wherever_it_is(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """Before, in the middle of and after its move; also where the move is refused."""
    prefill = Working(tiny, valkey, WorkerRole.PREFILL)
    decode = Working(tiny, valkey, WorkerRole.DECODE)
    await both_ready(fleet, redis)
    inbox = decode.consumer._moves._inbox
    assert inbox is not None
    for number, pause_s in enumerate((0.0, 0.01, 0.02, 0.05, 0.1, 0.3) * 2):
        inbox.closed_for = "as if it left" if number >= 6 else ""
        job = make_job(f"j{number}", random_tokens(200, number), max_tokens=250)
        generation = await fleet.submit(job, INVALID_SPAN)
        await asyncio.sleep(pause_s)
        await generation.cancel()
        await eventually(lambda: _nothing_reserved(redis), limit_s=10)
        assert not prefill.consumer._tickets and not decode.consumer._tickets
    await prefill.stop()
    await decode.stop()


async def test_a_worker_takes_the_role_that_it_is_told(
    tiny: LoadedModel, valkey: Valkey, fleet: Fleet, redis: Redis
) -> None:
    """Through its stream; the word leaves no entry behind, and nonsense changes nothing."""
    worker = Working(tiny, valkey, WorkerRole.DECODE)
    await eventually(lambda: _one(redis), limit_s=20)
    for word, role in (
        ("prefill", WorkerRole.PREFILL),
        ("nonsense", WorkerRole.PREFILL),
        ("decode", WorkerRole.DECODE),
    ):
        await redis.xadd(keys.jobs("test", "decode"), {"role": word})
        await eventually(lambda: _nothing_reserved(redis), limit_s=5)
        assert worker.consumer.status().role is role
    await worker.stop()


async def _one(redis: Redis) -> bool:
    return len(await redis.hkeys(keys.workers("test"))) == 1


async def _nothing_reserved(redis: Redis) -> bool:
    for worker in ("prefill", "decode"):
        held = await redis.hgetall(keys.load("test", worker))
        if any(int(value) for value in held.values()) or await redis.xlen(
            keys.jobs("test", worker)
        ):
            return False
    return True
