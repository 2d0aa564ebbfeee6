"""One connection that many share, on a real Valkey: whose answer is whose, whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from redis.exceptions import ConnectionError as LinkDownError
from redis.exceptions import NoScriptError, ResponseError

from headrace.redis_link import Link
from headrace.streams import REDIS_DOWN, Scripts, connect, link_of
from support.valkey import Valkey


@pytest.fixture
async def link(valkey: Valkey) -> AsyncIterator[Link]:
    redis = connect(valkey.url)
    yield link_of(redis)
    await redis.aclose()


async def test_everybody_gets_their_own_answers_whoever_leaves(link: Link) -> None:
    """Callers come in any order, with one command or several, and some are cancelled."""
    dice = random.Random(11)
    right = 0

    async def ask(number: int) -> None:
        nonlocal right
        count = 1 + number % 3
        words = [f"{number}.{at}" for at in range(count)]
        answers = await link.many([("ECHO", word) for word in words])
        assert [answer.decode() for answer in answers] == words
        right += 1

    tasks = [asyncio.create_task(ask(number)) for number in range(400)]
    gone = dice.sample(tasks, 100)
    for task in gone:
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not [task for task in tasks if not task.cancelled() and task.exception()]
    assert right == sum(not task.cancelled() for task in tasks) >= 300
    link.check_integrity()


async def test_a_refused_command_is_its_callers_alone(link: Link) -> None:
    """Its neighbours in the same call have their answers; alone it raises what it earned."""
    first, refused, last = await link.many([("SET", "k", "text"), ("INCR", "k"), ("GET", "k")])
    assert (first, last) == (b"OK", b"text")
    assert isinstance(refused, ResponseError)
    with pytest.raises(NoScriptError):
        await link.one("EVALSHA", "0" * 40, 0)


async def test_what_is_sent_is_on_its_way_before_anybody_waits_for_it(valkey: Valkey) -> None:
    """Of a script too, also when Redis has forgotten it, or is opened by this very call; what
    it earns is raised where the answer is awaited."""
    redis = connect(valkey.url)
    lua, link = Scripts(redis), link_of(redis)
    count = "return redis.call('INCRBY', KEYS[1], ARGV[1])"
    assert not link.is_open
    assert await lua.send(count, ["n"], [1]) == 1
    sent = link.send([("INCR", "n"), ("GET", "n")])
    called = lua.send(count, ["n"], [10])
    told = await _count(valkey)
    assert told == 12, "neither was awaited"
    assert (await sent, await called) == ([2, b"2"], 12)
    await redis.script_flush()
    assert await lua.send(count, ["n"], [1]) == 13
    with pytest.raises(ResponseError):
        await lua.send(count, ["n"], ["no number"])
    link.check_integrity()
    await redis.aclose()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_is_written_past_the_transport_overtakes_nothing(valkey: Valkey, loop: str) -> None:
    """Commands that are sent at once and such that are not, larger than a socket takes: each has
    its own answer, in whatever way its bytes left."""
    factory = {
        "asyncio": asyncio.new_event_loop,
        "uvloop": pytest.importorskip("uvloop").new_event_loop,
    }[loop]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_mix(valkey))


async def _mix(valkey: Valkey) -> None:
    redis, dice = connect(valkey.url), random.Random(5)
    link = link_of(redis)
    await link.one("PING")
    asked: list[tuple[bytes, asyncio.Future[list[bytes]]]] = []
    for number in range(300):
        size = dice.choice((1, 100, 3_000_000 if number % 10 == 0 else 10_000))
        word = b"%d." % number + b"x" * size
        if dice.random() < 0.5:
            asked.append((word, link.send([("ECHO", word)])))
        else:
            asked.append((word, asyncio.ensure_future(link.many([("ECHO", word)]))))
        if dice.random() < 0.3:
            await asyncio.sleep(0)
    for word, answer in asked:
        assert await answer == [word]
    link.check_integrity()
    await redis.aclose()


async def _count(valkey: Valkey) -> int:
    """What another client reads, once everything sent before has been executed."""
    other = connect(valkey.url)
    try:
        await asyncio.sleep(0.05)
        return int(await other.get("n") or 0)
    finally:
        await other.aclose()


async def test_what_takes_too_long_ends_the_connection_and_the_next_call_opens_another(
    valkey: Valkey,
) -> None:
    """The late answer is nobody's: not that of the call which comes after it."""
    pool = connect(valkey.url).connection_pool
    link = Link(pool.make_connection, 0.2)
    waits = asyncio.create_task(link.one("BLPOP", "empty", 5))
    await asyncio.sleep(0.1)
    behind = asyncio.create_task(link.one("ECHO", "behind"))
    with pytest.raises(TimeoutError):
        await waits
    with pytest.raises(LinkDownError):
        await behind
    assert await link.one("ECHO", "again") == b"again"
    link.check_integrity()
    await link.close()


async def test_a_link_survives_redis(valkey: Valkey, link: Link) -> None:
    assert await link.one("ECHO", "before") == b"before"
    waits = asyncio.create_task(link.one("BLPOP", "empty", 5))
    await asyncio.sleep(0.05)
    valkey.kill()
    with pytest.raises(LinkDownError):
        await waits
    with pytest.raises(REDIS_DOWN):
        await link.one("ECHO", "nobody")
    valkey.start()
    assert await link.one("ECHO", "after") == b"after"
