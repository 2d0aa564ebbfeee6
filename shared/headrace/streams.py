"""Redis the way streams need it: quiet producers, patient readers, scripts by hash.

Invariants, each the answer to a trap that was measured with redis-py 8:
- a command is sent once: retries are off, and what may be repeated is idempotent (ACCEPT, FINISH)
  or harmless (token frames carry positions);
- a reader owns its connection, blocks for a bounded time, and moves its own position: reading
  changes nothing in Redis, so that a cancelled or crashed reader loses nothing. Rejected:
  consumer groups, whose pending lists swallow entries when a blocked read is cancelled as they
  arrive (docs/adr/0002);
- a cancelled call raises CancelledError: redis-py loses about half of the cancels that arrive while
  a command is under way, and a loop that was told to stop would run for ever;
- job streams are never trimmed, only emptied entry by entry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import NoScriptError, RedisError

from headrace import scripts
from headrace.redis_link import KINDS, Link, keep_cancel

CONNECTIONS_MAX = 32
COMMAND_TIMEOUT_S = 5.0
BLOCK_MS = 1_000
WATCHDOG_GRACE_S = 5.0
READ_COUNT_MAX = 512
BACKOFF_S_MAX = 2.0

REDIS_DOWN = (RedisError, OSError, asyncio.TimeoutError)
"""What a call raises when Redis is away or refuses; everything else is our bug."""


class _Pipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        return await keep_cancel(super().execute(raise_on_error))


class _Client(Redis):
    link: Link

    def owning(self, pool: BlockingConnectionPool) -> _Client:
        """This client, as the only one who uses `pool`."""
        self.auto_close_connection_pool = True
        self.link = Link(pool.make_connection, COMMAND_TIMEOUT_S)
        return self

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await self.link.close()
        await super().aclose(close_connection_pool)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        call = super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # theirs
        return await keep_cancel(call)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def _pool(url: str, **options: Any) -> BlockingConnectionPool:
    """A pool of our connections; no command is sent twice."""
    pool = BlockingConnectionPool.from_url(url, retry=Retry(NoBackoff(), 0), **options)
    pool.connection_class = KINDS[pool.connection_class]
    return pool


def connect(url: str) -> Redis:
    """A client for ordinary commands: pooled, each sent once, each with a time limit."""
    pool = _pool(
        url,
        max_connections=CONNECTIONS_MAX,
        timeout=COMMAND_TIMEOUT_S,
        socket_timeout=COMMAND_TIMEOUT_S,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
    )
    return _Client(connection_pool=pool).owning(pool)


def link_of(redis: Redis) -> Link:
    """The connection that all who have this client share, for what must be quick."""
    assert isinstance(redis, _Client), "`connect` makes our clients"
    return redis.link


def _reading_link(url: str) -> Link:
    """A connection for one reader, which waits for entries."""
    pool = _pool(url, max_connections=1, socket_connect_timeout=COMMAND_TIMEOUT_S)
    return Link(pool.make_connection, BLOCK_MS / 1000 + WATCHDOG_GRACE_S)


def as_bytes(value: bytes | str) -> bytes:
    """What our clients always answer; redis-py's types allow for decoding clients too."""
    return value if isinstance(value, bytes) else value.encode()


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream. `kind` is its only field's name, `data` that field's value."""

    id: str
    kind: str
    data: bytes


def parse_entries(rows: Sequence[Any]) -> list[Entry]:
    """Entries from what XRANGE or XREAD answers; an entry without fields is kept, empty."""
    entries = []
    for entry_id, fields in rows:
        kind, data = next(iter(fields.items()), (b"", b"")) if fields else (b"", b"")
        entries.append(Entry(entry_id.decode(), kind.decode(errors="replace"), data))
    return entries


async def read_range(
    redis: Redis, stream: str, first: str = "-", last: str = "+"
) -> AsyncIterator[list[Entry]]:
    """All entries from `first` to `last`, in pages of READ_COUNT_MAX."""
    start = first
    while True:
        rows = await redis.xrange(stream, min=start, max=last, count=READ_COUNT_MAX)
        if not rows:
            return
        page = parse_entries(rows)
        yield page
        if len(page) < READ_COUNT_MAX:
            return
        start = f"({page[-1].id}"


class Tail:
    """Follows one stream from after a position ("$": from now on), across Redis' absence.

    Iterate it in a task of its own; it ends within a second of `stop()`. `after` is the id of
    the last entry returned and may be read at any time.
    """

    def __init__(self, url: str, stream: str, after: str = "0-0") -> None:
        self.stream = stream
        self.after = after
        self._link = _reading_link(url)
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    async def _last_id(self) -> str:
        """The newest id; a literal "$" in each read would skip what arrives between two reads."""
        rows = await self._link.one("XREVRANGE", self.stream, "+", "-", "COUNT", 1)
        return _entries_of(rows)[0].id if rows else "0-0"

    async def settle(self) -> None:
        """Turn "$" into an id, so that what is read elsewhere from now on is older than the tail.

        Raises what redis-py raises.
        """
        if self.after == "$":
            self.after = await self._last_id()

    async def close(self) -> None:
        self._stopping = True
        await self._link.close()

    async def __aiter__(self) -> AsyncIterator[list[Entry]]:
        failures = 0
        while not self._stopping:
            try:
                await self.settle()
                answer = await self._link.one(
                    "XREAD", "COUNT", READ_COUNT_MAX, "BLOCK", BLOCK_MS,
                    "STREAMS", self.stream, self.after,
                )  # fmt: skip
                failures = 0
            except REDIS_DOWN:
                failures += 1
                await self._link.close()
                await asyncio.sleep(min(0.05 * 2**failures, BACKOFF_S_MAX))
                continue
            if answer:
                entries = _entries_of(_rows_of(answer))
                self.after = entries[-1].id
                yield entries


def _rows_of(answer: Any) -> Sequence[Any]:
    """The rows of the only stream in XREAD's answer (a list in RESP2, a map in RESP3)."""
    if isinstance(answer, dict):
        (rows,) = answer.values()
        return rows  # type: ignore[no-any-return]  # as it was read
    return answer[0][1]  # type: ignore[no-any-return]  # as it was read


def _entries_of(rows: Sequence[Any]) -> list[Entry]:
    """Entries as Redis writes them: an id, then names and values in turn."""
    return [
        Entry(entry_id.decode(), fields[0].decode(errors="replace"), fields[1])
        if fields
        else Entry(entry_id.decode(), "", b"")
        for entry_id, fields in rows
    ]


class Scripts:
    """The Lua scripts of `headrace.scripts`, called by hash and loaded again after a restart."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._scripts: dict[str, Script] = {}

    async def call(self, source: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run `source`. Raises what redis-py raises."""
        link = link_of(self._redis)
        try:
            return await link.one("EVALSHA", self.sha(source), len(keys), *keys, *args)
        except NoScriptError:
            return await link.one("EVAL", source, len(keys), *keys, *args)

    def send(self, source: str, keys: Sequence[str], args: Sequence[Any]) -> Awaitable[Any]:
        """As `call`, for what has something to do meanwhile: where Redis is in reach, the call is
        on its way when this returns."""
        link = link_of(self._redis)
        if not link.is_open:
            return self.call(source, keys, args)
        sent = link.send([("EVALSHA", self.sha(source), len(keys), *keys, *args)])
        return self._answer(sent, source, keys, args)

    async def _answer(
        self,
        sent: asyncio.Future[list[Any]],
        source: str,
        keys: Sequence[str],
        args: Sequence[Any],
    ) -> Any:
        [answer] = await sent
        if isinstance(answer, NoScriptError):
            return await link_of(self._redis).one("EVAL", source, len(keys), *keys, *args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sha(self, source: str) -> str:
        """The hash by which `source` is called."""
        script = self._scripts.get(source)
        if script is None:
            script = self._scripts[source] = Script(self._redis, source)  # type: ignore[arg-type]
        return str(script.sha)

    async def accept(
        self, keys: Sequence[str], payload: bytes, ttl_ms: int, attempt: int = 1
    ) -> str:
        answer: bytes = await self.call(scripts.ACCEPT, keys, (payload, ttl_ms, attempt))
        return answer.decode()
