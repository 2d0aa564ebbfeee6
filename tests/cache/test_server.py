"""The cache service against clients that are many, slow, silent or hostile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
import stat
import urllib.request
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from cache.builders import (
    chain,
    client_of,
    data_of,
    facts_of,
    make_store,
    reap,
    serving,
    spawn,
    wait_ready,
)
from headrace import config, telemetry
from headrace.clock import ManualClock
from headrace.errors import SettingsError
from headrace.frame_codec import MAGIC, PREFIX, encode
from headrace.frames import Get, Put, parse_address
from headrace_cache.metrics import Metrics
from headrace_cache.room import charged_bytes
from headrace_cache.server import Limits
from headrace_cache.settings import CacheSettings

LOCAL = "tcp://127.0.0.1:0"
PATIENCE_S = 10.0


async def dial(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = parse_address(url)
    return await asyncio.open_connection(address.host, address.port)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            while await reader.read(1 << 20):
                pass
        except ConnectionResetError:
            pass
    return True


def noise(rng: random.Random) -> bytes:
    """Nonsense that gets more or less far into the server's parser."""
    body = rng.randbytes(rng.randint(1, 400))
    head = PREFIX.pack(MAGIC, rng.randint(0, 300), rng.choice([0, 0, 100, 1 << 50]))
    valid = bytearray(encode(Put(1, (facts_of("x", b"x" * 100),))) + b"x" * 100)
    valid[rng.randrange(len(valid))] ^= 1 << rng.randrange(8)
    return rng.choice([body, MAGIC + body, head + body, bytes(valid), bytes(valid) + body])


async def test_random_bytes_cost_their_own_connection_only() -> None:
    """300 hostile connections, while another client's entries come and go undisturbed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    async with serving(LOCAL) as (server, url), client_of(url) as client:
        for turn in range(300):
            reader, writer = await dial(url)
            writer.write(noise(rng))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            await hang_up(writer)
            if turn % 10 == 0:
                entries = chain(f"good {turn}", 4)
                assert await client.put(entries)
                assert len(await client.get_run([entry.hash for entry in entries])) == 4
                server.check_integrity()
        del reader
        assert client.counts.failures == 0


async def test_connections_beyond_the_limit_are_refused() -> None:
    limits = Limits(connections_max=2)
    async with serving(LOCAL, limits=limits) as (_, url), client_of(url) as client:
        assert await client.ping()
        _, held = await dial(url)
        reader, refused = await dial(url)
        assert await ended(reader)
        assert await client.ping(), "those inside are served on"
        await hang_up(held)
        await hang_up(refused)


async def test_a_frame_that_stops_midway_ends_its_connection() -> None:
    clock = ManualClock()
    async with serving(LOCAL, clock=clock) as (server, url):
        reader, writer = await dial(url)
        facts = facts_of("big", data_of("big", 1_000_000))
        writer.write(encode(Put(1, (facts,))) + b"only a part")
        await writer.drain()
        while server.store.reserved_bytes == 0:
            await asyncio.sleep(0.001)
        server.sweep()
        assert server.store.reserved_bytes > 1_000_000
        clock.advance(server.limits.stall_ms_max + 1)
        server.sweep()
        assert await ended(reader)
        while server.store.reserved_bytes:
            await asyncio.sleep(0.001)
        await hang_up(writer)


async def test_an_idle_connection_is_closed_after_a_while_and_made_again() -> None:
    clock = ManualClock()
    async with serving(LOCAL, clock=clock) as (server, url), client_of(url) as client:
        assert await client.ping()
        clock.advance(server.limits.stall_ms_max + 1)
        server.sweep()
        assert server.snapshot()["connections"] == 1, "silence between frames is allowed"
        clock.advance(server.limits.idle_ms_max)
        server.sweep()
        while server.snapshot()["connections"]:
            await asyncio.sleep(0.001)
        assert await client.ping()


async def test_a_client_that_does_not_read_is_cut_off_and_others_are_served() -> None:
    """It asks for 100 x 8 MB and reads nothing: the server stops listening, then hangs up."""
    limits = Limits(stall_ms_max=200, unsent_bytes_max=1 << 24)
    async with serving(LOCAL, limits=limits) as (server, url), client_of(url) as client:
        entries = chain("a", 8, 1 << 20)
        assert await client.put(entries)
        assert await client.ping()
        with socket.create_connection(parse_address(url)[:2]) as slow:
            keys = tuple(facts_of(("a", depth), b"x").key for depth in range(8))
            slow.sendall(b"".join(encode(Get(number, keys)) for number in range(100)))
            async with asyncio.timeout(PATIENCE_S):
                while server.snapshot()["connections"] < 3:
                    await asyncio.sleep(0.001)
            assert len(await client.get_run([entry.hash for entry in entries])) == 8
            async with asyncio.timeout(PATIENCE_S):
                while server.snapshot()["connections"] == 3:
                    await asyncio.sleep(0.01)
        hits = server.store.tallies.by_kind["kv"].hits
        assert hits < 8 * 10, "it stopped reading requests long before the hundredth"


async def test_puts_together_hold_a_bounded_amount_of_memory() -> None:
    """Beyond the limit an entry's bytes are skipped: not stored, and no harm to the connection."""
    store = make_store(reserved_bytes_max=5 * charged_bytes(1000))
    async with serving(LOCAL, store=store) as (_, url), client_of(url) as client:
        assert not await client.put(chain("large", 6))
        assert await client.put(chain("small", 5))
        assert store.tallies.by_kind["kv"].refused == 1


async def test_what_is_there_already_is_not_received_again() -> None:
    async with serving(LOCAL) as (server, url), client_of(url) as client:
        entries = chain("a", 3)
        assert await client.put(entries)
        assert await client.put(entries)
        assert (
            server.store.tallies.by_kind["kv"].kept,
            server.store.tallies.by_kind["kv"].present,
        ) == (3, 3)


async def test_spans_of_gets_and_puts_are_children_of_the_callers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_provider", provider)
    async with serving(LOCAL) as (_, url), client_of(url) as client:
        caller = telemetry.tracer().start_span("worker")
        context = telemetry.inject(caller)
        entries = chain("a", 3, cost_ms=16.0)
        await client.put(entries, context)
        await client.get_run([entry.hash for entry in (*entries, *chain("b", 1))], context)
        await client.get_run([entries[0].hash])
    put, get = exporter.get_finished_spans()
    assert (put.name, get.name) == ("cache put", "cache get")
    for span in (put, get):
        assert span.kind is SpanKind.SERVER
        assert span.parent is not None
        assert span.parent.span_id == caller.get_span_context().span_id
        assert span.context.trace_id == caller.get_span_context().trace_id
    assert get.attributes is not None
    assert dict(get.attributes) == {
        "headrace.cache.kind": "kv",
        "headrace.cache.keys": 4,
        "headrace.cache.hits": 3,
        "headrace.cache.bytes": 3000,
        "headrace.cache.from_disk": 0,
        "headrace.cache.saved_ms": 48.0,
    }
    assert put.attributes is not None
    assert put.attributes["headrace.cache.kept"] == 3


async def test_stopping_answers_what_was_asked() -> None:
    """A get of 32 MB is on its way when the service is told to stop: it arrives whole."""
    async with serving(LOCAL) as (server, url), client_of(url) as client:
        entries = chain("a", 32, 1 << 20)
        assert await client.put(entries)
        asked = asyncio.ensure_future(client.get_run([entry.hash for entry in entries]))
        while not server.store.tallies.by_kind["kv"].hits:
            await asyncio.sleep(0)
        await server.stop()
        assert len(await asked) == 32


async def test_a_unix_socket_is_the_owners_and_goes_with_the_service(tmp_path: Path) -> None:
    path = tmp_path / "cache.sock"
    async with serving(f"unix://{path}") as (_, url), client_of(url) as client:
        assert await client.ping()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(SettingsError, match="another cache service"):
            async with serving(url):
                pass
        assert await client.ping(), "the first one still listens"
    assert not path.exists()


async def test_a_socket_left_by_a_killed_service_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "cache.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(f"unix://{path}") as (_, url), client_of(url) as client:
        assert await client.ping()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(SettingsError, match="HEADRACE_CACHE_LISTEN"):
        async with serving(f"unix://{path}"):
            pass
    assert path.read_text() == "mine"


async def test_metrics_tell_what_the_store_counts() -> None:
    async with serving(LOCAL) as (server, url), client_of(url) as client:
        port = server.metrics.listen("127.0.0.1", 0)
        await client.put(chain("a", 2, tenant="acme"))
        await client.get_run([entry.hash for entry in chain("a", 3)])
        page = await asyncio.to_thread(scrape, port)
        assert 'headrace_cache_hits_total{kind="kv"} 2.0' in page
        assert 'headrace_cache_misses_total{kind="kv"} 1.0' in page
        assert 'headrace_cache_tenant_bytes{tenant="acme"} 2000.0' in page
        assert 'headrace_cache_request_seconds_count{op="get"} 1.0' in page
        assert "headrace_cache_connections 2.0" in page
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape, port)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as page:
        return str(page.read().decode())


async def test_metrics_that_were_never_asked_for_close_quietly() -> None:
    await Metrics(lambda: make_store().stats()).close()


async def test_the_process_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """`python -m headrace_cache`, with its own event loop: ready, used, SIGTERM, exit status 0."""
    url = f"unix://{tmp_path / 'cache.sock'}"
    process = spawn(url)
    try:
        await wait_ready(url)
        async with client_of(url) as client:
            assert await client.put(chain("a", 3))
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
    finally:
        said = reap(process)
    assert "listening" in said
    assert "Traceback" not in said
    assert not (tmp_path / "cache.sock").exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HEADRACE_CACHE_LISTEN", "ftp://somewhere"),
        ("HEADRACE_CACHE_BYTES", "12"),
        ("HEADRACE_CACHE_POLICY", "random"),
        ("HEADRACE_METRICS_PORT", "70000"),
    ],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable):
        config.load(CacheSettings)


def test_the_default_address_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_CACHE_LISTEN", raising=False)
    assert parse_address(config.load(CacheSettings).cache_listen).host == "127.0.0.1"


async def test_a_taken_port_is_said_plainly() -> None:
    async with serving(LOCAL) as (_, url):
        process = spawn(url)
        try:
            assert await asyncio.to_thread(process.wait, PATIENCE_S) == 2
        finally:
            said = reap(process)
        assert "HEADRACE_CACHE_LISTEN" in said
        assert "Traceback" not in said
