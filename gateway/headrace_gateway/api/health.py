"""What an operator asks: is it alive, does it take requests, what does it hold."""

from __future__ import annotations

from aiohttp import web

from headrace import __version__
from headrace_gateway.api.context import GATEWAY


async def live(_: web.Request) -> web.Response:
    """200 as long as the event loop turns."""
    return web.json_response({"status": "live"})


async def ready(request: web.Request) -> web.Response:
    """200 when requests are taken, else 503 with the reason."""
    reason = request.app[GATEWAY].ready()
    if reason:
        return web.json_response({"status": "not ready", "reason": reason}, status=503)
    return web.json_response({"status": "ready"})


async def health(request: web.Request) -> web.Response:
    """The same status, with what this gateway knows and holds."""
    gateway = request.app[GATEWAY]
    reason = gateway.ready()
    body = {
        "status": "unhealthy" if reason else "healthy",
        "reason": reason,
        "gateway": gateway.fleet.gateway_id,
        "version": __version__,
        "uptime_ms": gateway.clock.now_ms() - gateway.started_ms,
        "draining": gateway.draining,
        "models": {
            record.name: {
                "fingerprint": record.fingerprint,
                "architecture": record.architecture,
                "context_tokens": record.context_tokens,
            }
            for record in gateway.fleet.models()
        },
        "counts": gateway.counts(),
    }
    return web.json_response(body, status=503 if reason else 200)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' exposition text."""
    return web.Response(
        body=request.app[GATEWAY].metrics.render(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )
