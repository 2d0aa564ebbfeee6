"""The client: batches over real sockets, and a service that is away, slow, wrong or killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cache.builders import (
    chain,
    client_of,
    data_of,
    folder_of,
    hash_of,
    make_store,
    serving,
)
from headrace import cache_client
from headrace.cache_client import CacheClient, PutEntry
from headrace.cache_lane import BREAK_MS_MAX, BREAK_MS_MIN, FAILURES_MAX, Breaker
from headrace.cache_reads import KEYS_PER_ROUND
from headrace.checksum import checksum
from headrace.clock import ManualClock
from headrace.copying import LOCKED_BYTES_MAX, copy_bytes
from headrace.frame_codec import PREFIX, decode_request, encode
from headrace.frames import KV, PROMPT, Counted, EntryKey, Found, Get, Hello, Welcome
from headrace.types import Band

LOCAL = "tcp://127.0.0.1:0"
PATIENCE_S = 10.0


@pytest.fixture(params=["tcp", "unix", "arena"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Entries sent over either kind of socket, or read and written in place."""
    if request.param == "tcp":
        return LOCAL
    (tmp_path / request.param).mkdir()
    return f"unix://{tmp_path / request.param / 'cache.sock'}"


def hashes(entries: list[PutEntry]) -> list[bytes]:
    return [entry.hash for entry in entries]


async def test_batches_go_there_and_back(listen: str) -> None:
    """A chain of 200 entries, 70 MB: several frames, one call each way."""
    entries = chain("a", 200, 350_000)
    store = make_store(1 << 28, folder=folder_of(listen))
    async with (
        serving(listen, store=store) as (_, url),
        client_of(url) as client,
    ):
        assert await client.get_run(hashes(entries)) == []
        assert await client.put(entries)
        assert await client.has([*hashes(entries), hash_of("other")]) == [True] * 200 + [False]
        found = await client.get_run([*hashes(entries), hash_of("other")])
        assert [key for key, _ in found] == hashes(entries)
        assert all(data == entry.data for (_, data), entry in zip(found, entries, strict=True))
        assert (client.counts.hits, client.counts.misses) == (200, 201)
        stats = await client.stats()
        assert stats is not None
        assert stats["by_kind"]["kv"]["entries"] == 200


async def test_a_run_ends_at_the_first_entry_that_is_missing(listen: str) -> None:
    entries = chain("a", 3)
    async with serving(listen) as (_, url), client_of(url) as client:
        await client.put([entries[0], entries[2]])
        assert [key for key, _ in await client.get_run(hashes(entries))] == [entries[0].hash]
        assert await client.get_run([]) == []


async def test_prompts_are_kept_apart_from_blocks(listen: str) -> None:
    async with serving(listen) as (_, url), client_of(url) as client:
        assert await client.put(chain("answer", 1, kind=PROMPT))
        (entry,) = chain("answer", 1)
        assert await client.get_run([entry.hash]) == []
        assert len(await client.get_run([entry.hash], kind=PROMPT)) == 1


async def test_memoryviews_and_bytearrays_are_stored_as_they_are(listen: str) -> None:
    data = data_of("a", 5_000)
    async with serving(listen) as (_, url), client_of(url) as client:
        await client.put(
            [
                PutEntry(hash_of(1), memoryview(data)[1000:4000]),
                PutEntry(hash_of(2), bytearray(data)),
            ]
        )
        (_, first), (_, second) = await client.get_run([hash_of(1), hash_of(2)])
        assert (first, second) == (data[1000:4000], data)
        first[0] = 1  # the caller's own copy


async def test_a_reader_of_a_higher_class_keeps_an_entry_alive() -> None:
    """Two batch entries, one read by an interactive request, then more than fits: it stays."""
    store = make_store(5_000, reserved_bytes_max=5_000)
    async with serving(LOCAL, store=store) as (server, url), client_of(url) as client:
        entries = [PutEntry(hash_of(i), data_of(i, 1000), band=Band.BATCH) for i in range(4)]
        await client.put(entries[:2])
        await client.get_run([entries[1].hash], band=Band.INTERACTIVE)
        for entry in entries[2:]:
            await client.put([entry])
        assert [key == entries[0].hash for key, _ in await client.get_run([hash_of(1)])] == [False]
        assert server.store.tallies.by_kind["kv"].evictions > 0


async def test_a_run_is_read_right_into_its_readers_memory(listen: str) -> None:
    """What has another length than its place ends the run, and nothing behind it is touched."""
    entries = chain("a", 3, 100_000)
    memory = bytearray(3 * 100_000)
    places = [memoryview(memory)[at : at + 100_000] for at in (0, 100_000, 200_000)]
    store = make_store(1 << 20, folder=folder_of(listen))
    async with serving(listen, store=store) as (_, url), client_of(url) as client:
        assert await client.read_into(hashes(entries), places) == 0
        assert await client.put(entries)
        short = [places[0], places[1][:-1], places[2]]
        assert await client.read_into(hashes(entries), short) == 1
        assert memory == bytes(entries[0].data) + bytes(200_000)
        assert await client.read_into(hashes(entries), places) == 3
        assert memory == b"".join(bytes(entry.data) for entry in entries)


async def test_a_corrupt_entry_is_not_read_into_place_as_good(listen: str) -> None:
    entries = chain("a", 3, 100_000)
    store = make_store(1 << 20, folder=folder_of(listen))
    async with serving(listen, store=store) as (_, url), client_of(url) as client:
        assert await client.put(entries)
        store.data(store.index.find(EntryKey(KV, entries[1].hash)))[7] ^= 1
        places = [memoryview(bytearray(100_000)) for _ in entries]
        assert await client.read_into(hashes(entries), places) == 1
        assert await client.has(hashes(entries)) == [True, False, True]


async def test_nothing_is_written_to_places_once_their_reader_has_gone_on() -> None:
    """An answer that stops halfway: the reader gets nothing in time, and the rest goes nowhere."""
    entry = chain("a", 1, 100_000)[0]
    data = bytes(entry.data)
    more = asyncio.Event()
    over = asyncio.Event()

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        prefix = await reader.readexactly(PREFIX.size)
        request = decode_request(await reader.readexactly(PREFIX.unpack(prefix)[1]))
        writer.write(encode(Found(request.id, (len(data),), (checksum(data),), False)))
        writer.write(data[:50_000])
        await more.wait()
        writer.write(data[50_000:])
        writer.close()
        over.set()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    place = memoryview(bytearray(len(data)))
    client = CacheClient(url, timeout_s=PATIENCE_S, arena=False)
    assert await client.read_into([entry.hash], [place], timeout_s=0.3) == 0
    place[:] = bytes(len(data))
    more.set()
    await over.wait()
    await asyncio.sleep(0.05)
    assert place == bytes(len(data))
    await client.close()
    server.close()


@pytest.mark.parametrize("size", [0, 1, LOCKED_BYTES_MAX, LOCKED_BYTES_MAX + 1, 300_000])
@pytest.mark.parametrize(
    "build", [bytes, bytearray, memoryview, lambda d: memoryview(bytearray(d))]
)
def test_copies_are_whatever_they_are_copied_from(
    size: int, build: Callable[[bytes], bytes | bytearray | memoryview]
) -> None:
    """Small and large, from memory that may be written to and not, and never past their place."""
    data = (b"headrace" * (size // 8 + 1))[:size]
    memory = bytearray(size + 2)
    copy_bytes(memoryview(memory)[1:-1], build(data))
    assert memory == b"\0" + data + b"\0"
    with pytest.raises(ValueError, match="do not fit"):
        copy_bytes(memoryview(memory), build(data))


async def test_a_corrupt_entry_is_dropped_and_counts_as_a_miss(listen: str) -> None:
    entries = chain("a", 3)
    async with serving(listen) as (server, url), client_of(url) as client:
        await client.put(entries)
        server.store.data(server.store.index.find(EntryKey(KV, entries[1].hash)))[7] ^= 1
        assert [key for key, _ in await client.get_run(hashes(entries))] == [entries[0].hash]
        assert (client.counts.corrupt, client.counts.misses) == (1, 2)
        assert await client.has(hashes(entries)) == [True, False, True]
        server.check_integrity()
        assert await client.put(entries), "it can be stored anew"
        assert len(await client.get_run(hashes(entries))) == 3


async def test_gets_in_parallel_get_their_own_answers(listen: str) -> None:
    chains = [chain(f"c{number}", 5, 20_000) for number in range(20)]
    async with serving(listen) as (_, url), client_of(url) as client:
        for entries in chains:
            assert client.offer(entries)
        assert await client.flush(PATIENCE_S)
        runs = await asyncio.gather(*(client.get_run(hashes(entries)) for entries in chains))
        for run, entries in zip(runs, chains, strict=True):
            assert run == [(entry.hash, entry.data) for entry in entries]


# ----- a service that is away


async def test_without_a_service_everything_is_a_miss_at_once() -> None:
    """After the first refusal calls are skipped, until the pause is over; pauses double."""
    clock = ManualClock()
    async with serving(LOCAL) as (_, url):
        pass
    async with client_of(url, clock=clock) as client:
        assert await client.get_run([hash_of(1)]) == []
        assert (client.counts.failures, client.counts.skipped) == (1, 0)
        assert await client.has([hash_of(1)]) == [False]
        assert await client.stats() is None
        assert not await client.ping()
        assert (client.counts.failures, client.counts.skipped) == (1, 3)
        assert not await client.put(chain("a", 2)), "puts have a breaker of their own"
        assert client.counts.puts_failed == 2
        clock.advance(BREAK_MS_MIN)
        assert not await client.ping()
        assert client.counts.failures == 3


async def test_a_service_that_comes_back_is_used_again() -> None:
    clock = ManualClock()
    async with serving(LOCAL) as (_, url), client_of(url, clock=clock) as client:
        assert await client.ping()
    async with client_of(url, clock=clock) as client:
        assert not await client.ping()
        async with serving(url):
            assert not await client.ping(), "still skipping"
            clock.advance(BREAK_MS_MIN)
            assert await client.ping()
            assert await client.put(chain("a", 1))


def test_a_breaker_needs_three_slow_calls_or_one_refusal() -> None:
    slow, refused = Breaker(), Breaker()
    assert [slow.failed(0) for _ in range(FAILURES_MAX)] == [False, False, True]
    assert refused.failed(0, surely=True)
    assert not refused.allows(BREAK_MS_MIN - 1)


def test_a_breaker_lets_one_call_try_and_doubles_its_pause() -> None:
    breaker = Breaker()
    breaker.failed(0, surely=True)
    now_ms, pause_ms = 0, BREAK_MS_MIN
    for _ in range(8):
        now_ms += pause_ms
        assert breaker.allows(now_ms)
        assert not breaker.allows(now_ms), "one trial at a time"
        assert breaker.failed(now_ms)
        assert not breaker.failed(now_ms), "calls from before the pause do not lengthen it"
        pause_ms = min(2 * pause_ms, BREAK_MS_MAX)
        assert not breaker.allows(now_ms + pause_ms - 1)
    breaker.succeeded()
    assert breaker.allows(now_ms)


def test_a_success_forgets_failures() -> None:
    breaker = Breaker()
    for _ in range(10):
        assert not breaker.failed(0)
        assert not breaker.failed(0)
        breaker.succeeded()


# ----- a service that is slow or wrong


Reaction = Callable[[Get, asyncio.StreamWriter], None]


@asynccontextmanager
async def impostor(react: Reaction) -> AsyncIterator[str]:
    """Something that reads gets and answers as `react` likes."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            while True:
                _, header_bytes, payload_bytes = PREFIX.unpack(await reader.readexactly(16))
                request = decode_request(await reader.readexactly(header_bytes))
                await reader.readexactly(payload_bytes)
                if isinstance(request, Hello):
                    writer.write(encode(Welcome(request.id, "", bytes(16), 0, 0)))
                if isinstance(request, Get):
                    react(request, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.01)


def found(request_id: int, data: bytes) -> bytes:
    return encode(Found(request_id, (len(data),), (checksum(data),), False)) + data


async def test_a_late_answer_is_never_taken_for_a_later_one() -> None:
    """The first get is answered only when the second is asked, with different bytes."""
    held: list[int] = []

    def react(request: Get, writer: asyncio.StreamWriter) -> None:
        if not held:
            held.append(request.id)
            return
        writer.write(found(held[0], b"old" * 50_000) + found(request.id, b"new"))

    async with impostor(react) as url, client_of(url, timeout_s=0.5) as client:
        assert await client.get_run([hash_of(1)]) == []
        assert await client.get_run([hash_of(2)]) == [(hash_of(2), b"new")]
        assert client.counts.failures == 1


async def test_answers_in_another_order_reach_their_askers() -> None:
    waiting: list[int] = []

    def react(request: Get, writer: asyncio.StreamWriter) -> None:
        waiting.append(request.id)
        if len(waiting) == 3:
            for request_id in reversed(waiting):
                writer.write(found(request_id, b"%d" % request_id))

    async with impostor(react) as url, client_of(url) as client:
        runs = await asyncio.gather(*(client.get_run([hash_of(i)]) for i in range(3)))
        assert [bytes(run[0][1]) for run in runs] == [b"%d" % each for each in sorted(waiting)]


async def test_three_slow_answers_and_the_client_stops_asking() -> None:
    asked: list[int] = []
    async with (
        impostor(lambda request, _: asked.append(request.id)) as url,
        client_of(url, timeout_s=0.02, clock=ManualClock()) as client,
    ):
        for _ in range(10):
            assert await client.get_run([hash_of(1)]) == []
        assert len(asked) == FAILURES_MAX
        assert client.counts.skipped == 10 - FAILURES_MAX


@pytest.mark.parametrize(
    "nonsense",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        encode(Counted(1, 0)),
        encode(Found(1, (5,), (0,), False))[:-3],
    ],
    ids=["another protocol", "another kind of answer", "half a frame"],
)
async def test_nonsense_is_a_miss(nonsense: bytes) -> None:
    def react(request: Get, writer: asyncio.StreamWriter) -> None:
        writer.write(nonsense)

    async with impostor(react) as url, client_of(url, timeout_s=0.1) as client:
        assert await client.get_run([hash_of(1)]) == []
        assert client.counts.failures == 1


async def test_a_service_that_hangs_up_is_a_miss() -> None:
    async with impostor(lambda _, writer: writer.close()) as url, client_of(url) as client:
        assert await client.get_run([hash_of(1)]) == []


async def test_what_came_before_the_time_limit_is_kept() -> None:
    """A long run is fetched in rounds; the service falls silent after the first."""
    rounds: list[int] = []

    def react(request: Get, writer: asyncio.StreamWriter) -> None:
        rounds.append(len(request.keys))
        if len(rounds) == 1:
            count = len(request.keys)
            writer.write(encode(Found(request.id, (1,) * count, (checksum(b"a"),) * count, False)))
            writer.write(b"a" * count)

    async with impostor(react) as url, client_of(url, timeout_s=0.5) as client:
        run = await client.get_run([hash_of(i) for i in range(KEYS_PER_ROUND + 5)])
        assert len(run) == KEYS_PER_ROUND
        assert rounds == [KEYS_PER_ROUND, 5]


# ----- puts in the background


async def test_the_queue_of_puts_is_bounded_and_drops_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_client, "PUT_QUEUE_BYTES_MAX", 10_000)
    async with serving(LOCAL) as (server, url), client_of(url) as client:
        offers = [client.offer(chain(f"c{number}", 4)) for number in range(4)]
        assert offers == [True, True, False, False]
        assert client.counts.puts_dropped == 8
        assert await client.flush(PATIENCE_S)
        assert len(server.store) == 8
        assert await client.put(chain("later", 4)), "there is room again"


async def test_the_queue_of_puts_is_bounded_in_entries_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_client, "PUT_QUEUE_ENTRIES_MAX", 4)
    async with serving(LOCAL) as (_, url), client_of(url) as client:
        assert client.offer(chain("a", 3))
        assert not await client.put(chain("b", 2))


async def test_closing_gives_up_what_is_queued() -> None:
    async with impostor(lambda *_: None) as url:
        client = CacheClient(url)
        waiting = asyncio.ensure_future(client.put(chain("a", 2)))
        await asyncio.sleep(0.01)
        await client.close()
        assert await waiting is False
        assert client.counts.puts_dropped == 2
        client.check_integrity()


async def test_a_put_that_nobody_reads_ends_in_time_and_gets_go_on() -> None:
    """The impostor answers no put; gets have a connection of their own."""

    def react(request: Get, writer: asyncio.StreamWriter) -> None:
        writer.write(found(request.id, b"here"))

    async with (
        impostor(react) as url,
        client_of(url, put_timeout_s=0.1) as client,
    ):
        slow = asyncio.ensure_future(client.put(chain("a", 3)))
        assert await client.get_run([hash_of(1)]) == [(hash_of(1), b"here")]
        assert await slow is False


@pytest.mark.parametrize(
    "entry",
    [
        PutEntry(b"short", b"x"),
        PutEntry(hash_of(1), b""),
        PutEntry(hash_of(1), b"x", parent=b"short"),
        PutEntry(hash_of(1), memoryview(b"1234").cast("I")),
        PutEntry(hash_of(1), b"x", depth=-1),
        PutEntry(hash_of(1), b"x", kind="video"),
    ],
)
async def test_misuse_is_a_bug_of_ours(entry: PutEntry) -> None:
    async with client_of("tcp://127.0.0.1:1") as client:
        with pytest.raises(AssertionError):
            await client.put([entry])
        with pytest.raises(AssertionError):
            await client.get_run([b"short"])
