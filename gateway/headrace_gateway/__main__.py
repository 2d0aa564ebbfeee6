"""`python -m headrace_gateway`: serves until SIGTERM or SIGINT, then drains and leaves."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog
from aiohttp import web

from headrace import config, large_pages, logs, loops, telemetry, turns
from headrace.clock import SystemClock
from headrace.errors import SettingsError
from headrace.garbage import settle_memory
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.app import make_app, make_runner
from headrace_gateway.fleet import Fleet
from headrace_gateway.settings import GatewaySettings
from headrace_gateway.tenants import Tenants, load_tenants

log = structlog.get_logger()

BACKLOG = 1_024


async def serve(settings: GatewaySettings, tenants: Tenants) -> None:
    """Run one gateway until a signal comes. Raises OSError when the port is taken."""
    clock = SystemClock()
    stop = asyncio.Event()
    fleet = Fleet(
        settings.redis_url,
        settings.gateway_id,
        host=settings.host,
        port=settings.port,
        clock=clock,
        limits=settings.admission,
        on_broken=stop.set,
    )
    app = make_app(settings, fleet, tenants, clock)
    runner = make_runner(app)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG).start()
        await fleet.start()
        settle_memory()
        large_pages.gather()
        host, port = runner.addresses[0][:2]
        log.info("gateway listens", url=f"http://{host}:{port}", gateway=settings.gateway_id)
        await stop.wait()
        log.info("gateway drains", turns=len(app[GATEWAY].turns))
        if not await app[GATEWAY].drain():
            log.warning("turns were cut off", turns=len(app[GATEWAY].turns))
    finally:
        await runner.cleanup()
        await fleet.stop()


def main() -> None:
    settings = config.load_or_exit(GatewaySettings)
    try:
        tenants = load_tenants(settings.api_keys, prompt_entries=settings.prompt_entries)
    except SettingsError as error:
        print(f"headrace: bad setting: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error
    logs.setup("gateway", level=settings.log_level, json=settings.log_json)
    telemetry.setup("gateway", settings.otlp_endpoint, settings.gateway_id)
    turns.ask(turns.SHORT_NS)  # clients wait for it, also where workers keep every core busy
    try:
        loops.run(serve(settings, tenants))
    except OSError as error:
        print(
            f"headrace: cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    finally:
        telemetry.shutdown()


if __name__ == "__main__":
    main()
