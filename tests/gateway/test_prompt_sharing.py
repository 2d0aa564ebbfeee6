"""Which requests are the same, and how several of them read one computation.

The fleet is scripted: each job's tokens come when its test says so, and it can break anywhere.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.clock import SystemClock
from headrace.errors import DependencyError, OverloadError
from headrace.types import Band, Finish, FinishReason, Job, Sampling, pack_tokens
from headrace_gateway.generation import Chunk
from headrace_gateway.policy.sharing import Rank, is_deterministic, may_follow, request_key
from headrace_gateway.prompt_cache import Asked, PromptCache, Tracked, Way
from support.api import make_record

GREEDY = Sampling(max_tokens=8, temperature=0.0)
PROMPT = pack_tokens(range(40))
RECORD = make_record()


def key_of(sampling: Sampling = GREEDY, **changes: Any) -> bytes:
    facts: dict[str, Any] = {"fingerprint": "f", "salt": b"s", "prompt": PROMPT, "reading": [[]]}
    return request_key(sampling=sampling, **(facts | changes))


def test_greedy_and_seeded_requests_are_deterministic() -> None:
    assert is_deterministic(GREEDY, seeded=False)
    assert is_deterministic(replace(GREEDY, temperature=0.7), seeded=True)
    assert not is_deterministic(replace(GREEDY, temperature=0.7), seeded=False)


OTHER: dict[str, Any] = {
    "max_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 7,
    "stop_token_ids": (5,), "ignore_eos": True, "min_p": 0.1, "typical_p": 0.9,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
    "logit_bias": ((4, 1.0),), "min_tokens": 2, "bad_words": ((1, 2),), "logprobs": 0,
    "prompt_logprobs": 0, "grammar": "start: /a/",
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_every_sampling_option_tells_requests_apart(name: str) -> None:
    """Also one that is added to Sampling later: then it is missing in OTHER here."""
    seeded = Sampling(max_tokens=8, temperature=0.7, seed=1)
    assert key_of(seeded) != key_of(replace(seeded, **{name: OTHER[name]}))


def test_whatever_else_decides_the_text_tells_requests_apart() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"fingerprint": "g"}, {"salt": b"t"}, {"prompt": PROMPT[:-1]}, {"reading": [["stop"]]},
        {"fingerprint": "fs", "salt": b""},
    ]  # fmt: skip
    assert len({key_of(**change) for change in changes}) == len(changes)


def test_what_greedy_choice_does_not_use_does_not_count() -> None:
    """Seed and filters change nothing where the first highest logit is taken; -0.0 is 0."""
    loose = replace(GREEDY, seed=9, top_p=0.5, top_k=4, min_p=0.2, typical_p=0.3)
    assert key_of(loose) == key_of()
    assert key_of(replace(GREEDY, presence_penalty=-0.0)) == key_of()
    assert key_of(replace(GREEDY, stop_token_ids=(3, 1, 3))) == key_of(
        replace(GREEDY, stop_token_ids=(1, 3))
    )


def test_nobody_follows_what_comes_later_than_itself() -> None:
    batch, standard = Rank(Band.BATCH, 0), Rank(Band.STANDARD, 0)
    assert may_follow(standard, batch).follows
    assert not may_follow(batch, standard).follows
    assert "lower band" in may_follow(batch, standard).reason
    assert not may_follow(Rank(Band.BATCH, 5), batch).follows
    assert may_follow(Rank(Band.STANDARD, 5), batch).follows
    assert may_follow(standard, standard).follows


class Made:
    """A job that was handed to the fleet: `say` delivers, `fail` breaks it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cancelled = False
        self._queue: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

    def say(self, *tokens: int, finish: FinishReason | None = None) -> None:
        ending = None if finish is None else Finish(finish)
        self._queue.put_nowait(Chunk(tokens, ending, cached_tokens=16))

    def fail(self, error: Exception) -> None:
        self._queue.put_nowait(error)

    async def next(self) -> Chunk:
        assert not self.cancelled, "nobody reads what was cancelled"
        step = await self._queue.get()
        if isinstance(step, Exception):
            raise step
        return step

    async def cancel(self) -> None:
        self.cancelled = True


class Desk:
    """A PromptCache without a cache service, and the jobs that it handed on."""

    def __init__(self) -> None:
        self.cache = PromptCache(None, SystemClock())
        self.made: list[Made] = []
        self.refusal: Exception | None = None
        self.gate: asyncio.Event | None = None

    async def start(self, job: Job) -> Made:
        if self.gate is not None:
            await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        self.made.append(Made(job))
        return self.made[-1]

    def asked(self, name: str, band: Band = Band.STANDARD, **job: Any) -> Asked:
        made = Job(
            id=name,
            model="tiny",
            tenant="t",
            band=band,
            arrived_ms=0,
            gateway="g",
            prompt=PROMPT,
            sampling=GREEDY,
            **job,
        )
        return Asked(key_of(), made, RECORD, self.start)

    async def open(self, name: str, band: Band = Band.STANDARD, **job: Any) -> Tracked:
        source = await self.cache.open(self.asked(name, band, **job))
        self.cache.check_integrity()
        return source


async def rest_of(source: Tracked) -> tuple[list[int], FinishReason]:
    """All tokens that are still to come, and how it ended."""
    tokens: list[int] = []
    while True:
        chunk = await source.next()
        tokens += chunk.tokens
        if chunk.finish is not None:
            return tokens, chunk.finish.reason


async def test_the_same_request_reads_along_from_the_start() -> None:
    """One job; the second reader came late and misses nothing."""
    desk = Desk()
    first = await desk.open("a")
    desk.made[0].say(1, 2)
    assert (await first.next()).tokens == (1, 2)
    second = await desk.open("b")
    assert (first.way, second.way) == (Way.COMPUTED, Way.FOLLOWED)
    chunk = await second.next()
    assert chunk.tokens == (1, 2)
    assert chunk.cached_tokens == len(PROMPT), "it computed none of its prompt"
    desk.made[0].say(3, finish=FinishReason.STOP)
    assert await rest_of(first) == ([3], FinishReason.STOP)
    assert await rest_of(second) == ([3], FinishReason.STOP)
    assert len(desk.made) == 1
    assert desk.cache.counts() == {"shared_computations": 0}


async def test_a_leader_that_leaves_takes_nobody_with_it() -> None:
    """The job goes on as long as somebody reads it, and is cancelled with the last one."""
    desk = Desk()
    first, second = await desk.open("a"), await desk.open("b")
    await first.cancel()
    assert not desk.made[0].cancelled
    third = await desk.open("c")
    desk.made[0].say(1)
    assert (await second.next()).tokens == (1,)
    await second.cancel()
    assert (await third.next()).tokens == (1,)
    assert not desk.made[0].cancelled
    await third.cancel()
    assert desk.made[0].cancelled
    assert desk.cache.counts() == {"shared_computations": 0}


async def test_a_leaders_failure_is_its_own() -> None:
    """One follower goes on with its own job after the tokens that all have seen; others follow."""
    desk = Desk()
    first, second, third = [await desk.open(name) for name in "abc"]
    desk.made[0].say(1, 2)
    desk.made[0].fail(DependencyError("the log is lost"))
    assert (await first.next()).tokens == (1, 2)
    with pytest.raises(DependencyError):
        await first.next()
    readers = [asyncio.create_task(rest_of(each)) for each in (second, third)]
    while len(desk.made) < 2:
        await asyncio.sleep(0)
    assert desk.made[1].job.id == "b"
    assert list(desk.made[1].job.logged) == [1, 2]
    desk.cache.check_integrity()
    desk.made[1].say(3, finish=FinishReason.LENGTH)
    for reader in readers:
        assert await reader == ([1, 2, 3], FinishReason.LENGTH)
    assert len(desk.made) == 2


async def test_a_refused_leader_leaves_its_followers_to_themselves() -> None:
    """Refused while it was being handed over: whoever waited for it asks for itself."""
    desk = Desk()
    desk.gate = asyncio.Event()
    desk.refusal = OverloadError("full")
    leader = asyncio.create_task(desk.open("a"))
    await asyncio.sleep(0)
    second = await desk.open("b")
    desk.gate.set()
    with pytest.raises(OverloadError):
        await leader
    desk.refusal = None
    reading = asyncio.create_task(rest_of(second))
    while not desk.made:
        await asyncio.sleep(0)
    desk.made[0].say(5, finish=FinishReason.STOP)
    assert await reading == ([5], FinishReason.STOP)
    assert second.way is Way.COMPUTED


async def test_a_better_band_and_a_deadline_do_not_wait_for_others() -> None:
    desk = Desk()
    batch = await desk.open("a", Band.BATCH)
    urgent = await desk.open("b", Band.INTERACTIVE)
    timed = await desk.open("c", Band.BATCH, done_by_ms=5)
    assert [each.way for each in (batch, urgent, timed)] == [Way.COMPUTED] * 3
    late = await desk.open("d", Band.BATCH)
    assert late.way is Way.FOLLOWED
    desk.made[1].say(1, finish=FinishReason.STOP)
    assert await rest_of(late) == ([1], FinishReason.STOP)
    for source in (batch, timed):
        await source.cancel()
    assert [each.cancelled for each in desk.made] == [True, False, True]


STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "say", "break", "read"]), st.integers(0, 7)),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_reader_gets_the_same_text_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """Readers come, leave and fall behind, jobs break anywhere: the text is 0, 1, 2, … for all.

    A reader fails only with its own job, and in the end nothing runs that nobody reads.
    """
    with asyncio.Runner() as runner:
        runner.run(_play(steps))


async def _play(steps: list[tuple[str, int]]) -> None:
    desk = Desk()
    readers: dict[str, Tracked] = {}
    seen: dict[str, list[int]] = {}
    failed: set[str] = set()
    said: dict[str, int] = {}
    broken: set[str] = set()

    async def read(name: str) -> None:
        try:
            async with asyncio.timeout(0.005):
                chunk = await readers[name].next()
        except TimeoutError:
            return
        except DependencyError:
            assert name in broken, "only its own job's failure ends a reader"
            failed.add(name)
            del readers[name]
            return
        seen[name] += chunk.tokens
        assert seen[name] == list(range(len(seen[name])))

    for step, number in steps:
        live = [each for each in desk.made if not each.cancelled and each.job.id not in broken]
        match step:
            case "join":
                name = f"j{len(seen)}"
                seen[name] = []
                readers[name] = await desk.open(name, Band(number % 3))
            case "leave" if readers:
                name = sorted(readers)[number % len(readers)]
                await readers.pop(name).cancel()
            case "say" if live:
                each = live[number % len(live)]
                at = said.get(each.job.id, len(each.job.logged))
                each.say(at)
                said[each.job.id] = at + 1
            case "break" if live:
                each = live[number % len(live)]
                broken.add(each.job.id)
                each.fail(DependencyError("gone"))
            case "read" if readers:
                await read(sorted(readers)[number % len(readers)])
        desk.cache.check_integrity()
    for name in sorted(readers):
        await readers.pop(name).cancel()
    await asyncio.sleep(0)
    assert all(each.cancelled or each.job.id in broken for each in desk.made)
    assert desk.cache.counts() == {"shared_computations": 0}
