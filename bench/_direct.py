"""A plain aiohttp server that streams bytes which were recorded before: what Python can do at best.

It understands nothing of what it is asked and writes one event after another, as fast as it can or
with `--step-ms` between two, for all streams at the same moments. `python -m bench gateway` starts
it to have something to hold its figures against.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from aiohttp import web


class Ticks:
    """Moments that all streams wait for together."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next: asyncio.Future[None] | None = None

    async def next(self) -> None:
        if self._step_s == 0:
            return
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            loop.call_later(self._step_s, self._fire)
        await asyncio.shield(self._next)

    def _fire(self) -> None:
        fired, self._next = self._next, None
        assert fired is not None, "a tick is waited for"
        fired.set_result(None)


def make_app(events: list[bytes], step_s: float) -> web.Application:
    ticks = Ticks(step_s)

    async def stream(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, event in enumerate(events):
            await ticks.next()
            await response.write(event)
            if number == 1:
                await asyncio.sleep(0)  # the first token leaves at once
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", stream)
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=Path, required=True, help="separated by empty lines")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    events = [event + b"\n\n" for event in args.events.read_bytes().split(b"\n\n") if event]
    import uvloop

    uvloop.install()
    web.run_app(make_app(events, args.step_ms / 1000), host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
