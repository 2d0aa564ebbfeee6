"""The gateway's HTTP application: routes, middlewares, life cycle.

Invariant: a client that goes away cancels its handler at once (`handler_cancellation`), which is
how its jobs stop; every way to run the app goes through `make_runner`.
"""

from __future__ import annotations

from aiohttp import web

from headrace.clock import Clock
from headrace_gateway.api import cache, health, models
from headrace_gateway.api.chat import chat_completions
from headrace_gateway.api.completions import completions
from headrace_gateway.api.context import GATEWAY, FleetSeam, Gateway
from headrace_gateway.api.errors import add_reply_headers, errors_middleware
from headrace_gateway.api.responses import responses
from headrace_gateway.api.websocket import close_sockets, responses_socket
from headrace_gateway.settings import GatewaySettings
from headrace_gateway.tenants import Tenants

SHUTDOWN_S = 1.0
"""What is left of a handler's time after the drain, before it is cancelled."""


def make_app(
    settings: GatewaySettings, fleet: FleetSeam, tenants: Tenants, clock: Clock
) -> web.Application:
    """The application; `app[GATEWAY]` holds its parts."""
    app = web.Application(middlewares=[errors_middleware], client_max_size=settings.body_bytes_max)
    app[GATEWAY] = Gateway(settings, fleet, tenants, clock)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            web.post("/v1/responses", responses),
            web.get("/v1/responses", responses_socket, allow_head=False),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{id:.+}", models.get_model),
            web.get("/live", health.live),
            web.get("/ready", health.ready),
            web.get("/health", health.health),
            web.get("/metrics", health.metrics),
            *(web.route(method, path, handler) for (method, path), handler in cache.ROUTES.items()),
        ]
    )
    app.on_response_prepare.append(add_reply_headers)
    app.on_shutdown.append(_on_shutdown)
    app.on_cleanup.append(_on_cleanup)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """How the app has to be run; signals are the caller's."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        handle_signals=False,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
    )


async def _on_shutdown(app: web.Application) -> None:
    app[GATEWAY].draining = True
    await close_sockets(app[GATEWAY])


async def _on_cleanup(app: web.Application) -> None:
    gateway = app[GATEWAY]
    await gateway.grammars.close()
    if gateway.cache is not None:
        await gateway.cache.close()
