"""`python -m headrace_cache`: the cache service until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from headrace import logs, telemetry, turns
from headrace.config import load_or_exit
from headrace.errors import SettingsError
from headrace.frames import Address, parse_address
from headrace_cache.arena import Arena
from headrace_cache.disk import DiskTier, offer_bytes_for
from headrace_cache.fleet_link import FleetLink
from headrace_cache.policy.names import POLICIES
from headrace_cache.server import CacheServer
from headrace_cache.settings import CacheSettings
from headrace_cache.store import Store

log = structlog.get_logger("headrace_cache")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen_metrics(server: CacheServer, address: Address, port: int) -> None:
    host = address.host or "127.0.0.1"
    try:
        server.metrics.listen(host, port)
    except OSError as error:
        raise SettingsError(f"HEADRACE_METRICS_PORT: {host}:{port}: {error}") from error


async def serve(settings: CacheSettings) -> None:
    """Run until a signal to stop. Raises SettingsError when an address cannot be had."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    folder = Path(settings.cache_arena_dir) if settings.cache_arena_dir else None
    try:
        arena = Arena(settings.cache_bytes, folder)
    except OSError as error:
        raise SettingsError(f"HEADRACE_CACHE_BYTES: {settings.cache_bytes}: {error}") from error
    disk = None
    if settings.cache_disk_path:
        disk = DiskTier(
            Path(settings.cache_disk_path),
            settings.cache_disk_bytes,
            offer_bytes_max=offer_bytes_for(settings.cache_bytes),
        )
    server = CacheServer(_store(settings, arena), disk=disk)
    try:
        address = await server.start(parse_address(settings.cache_listen))
        if settings.metrics_port:
            _listen_metrics(server, address, settings.metrics_port)
        log.info(
            "listening",
            address=str(address),
            budget_bytes=settings.cache_bytes,
            shared=bool(arena.path),
            huge_pages=arena.huge_pages,
        )
        if address.host and not _is_loopback(address.host):
            log.warning("whoever reaches this address can read and write the cache")
        async with _telling(settings, address, server):
            await stop.wait()
        log.info("stopping", entries=len(server.store))
    finally:
        await server.stop()
        arena.close()


@contextlib.asynccontextmanager
async def _telling(
    settings: CacheSettings, address: Address, server: CacheServer
) -> AsyncIterator[None]:
    """The fleet is told of this service meanwhile, if there is a Redis to tell it."""
    if not settings.redis_url:
        yield
        return
    told = settings.cache_address or _reached_at(address)
    link = FleetLink(settings.redis_url, told, server.tiers, server.clock)
    task = asyncio.get_running_loop().create_task(link.run())
    task.add_done_callback(_note_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await link.close()


def _note_end(task: asyncio.Task[None]) -> None:
    """Telling ended by itself is our bug, and no reason to serve no more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the fleet is not told any more", error=repr(error), exc_info=error)


def _reached_at(address: Address) -> str:
    if address.host in ("0.0.0.0", "::"):  # compared, not bound
        address = address._replace(host=socket.gethostname())
    return str(address)


def _store(settings: CacheSettings, arena: Arena) -> Store:
    pinned_bytes_max = int(settings.cache_bytes * settings.cache_pinned_share)
    policy = POLICIES[settings.cache_policy](pinned_bytes_max)
    watermarks = (settings.cache_high_watermark, settings.cache_low_watermark)
    return Store(settings.cache_bytes, policy, arena, watermarks=watermarks)


def _loop_factory() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def main() -> None:
    settings = load_or_exit(CacheSettings)
    logs.setup("cache-service", level=settings.log_level, json=settings.log_json)
    telemetry.setup("cache-service", settings.otlp_endpoint)
    # those who wait for an answer share their cores with what computes
    short = turns.ask(turns.SHORT_NS)
    log.debug("turns", short=short)
    try:
        with asyncio.Runner(loop_factory=_loop_factory) as runner:
            runner.run(serve(settings))
    except SettingsError as error:
        print(f"headrace: bad setting: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        telemetry.shutdown()


if __name__ == "__main__":
    main()
