"""POST /v1/responses, and the turn that HTTP and WebSocket have in common."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from headrace_gateway.api.caching import marked_caching
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.errors import as_headrace_error
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.response_events import (
    Json,
    Line,
    ResponseEvents,
    ResponseFacts,
    lines_of,
)
from headrace_gateway.api.response_schemas import ResponseRequest, parse_response
from headrace_gateway.api.sse import EventStream, event_of
from headrace_gateway.api.tool_plans import make_plan
from headrace_gateway.api.turn import ClientGoneError, Turn
from headrace_gateway.api.waiting import Place
from headrace_gateway.api.wishes import make_wish
from headrace_gateway.choices import Piece

ID_PREFIX = "resp_"


async def responses(request: web.Request) -> web.StreamResponse:
    """Answers a response request, streamed or whole."""
    async with Turn(request.app[GATEWAY], make_call(request, "chat"), ID_PREFIX) as turn:
        parsed = parse_response(await read_object(request))
        events = await start(turn, parsed)
        if parsed.stream:
            return await _stream(request, turn, events)
        [piece] = await turn.collect()
        return web.json_response(events.whole(piece, turn.usage(), wall_s(turn)))


async def start(turn: Turn, parsed: ResponseRequest) -> ResponseEvents:
    """Hand the response's one job to the fleet. Raises CallerError, OverloadError, …"""
    (messages, marks), offer = parsed.conversation(), parsed.offer()
    turn.begin(parsed)
    tools = await make_plan(turn.gateway, turn.record, offer)
    prompt = await turn.encode_chat(messages, tools)
    caching = await marked_caching(turn, parsed.caching, marks, messages, tools, prompt)
    wish = await make_wish(
        turn.gateway, turn.record, parsed, [prompt], tools=tools, caching=caching
    )
    await turn.submit(wish)
    facts = ResponseFacts(
        turn.id, turn.created_s, turn.record.name, turn.service_tier, parsed, turn.cached
    )
    return ResponseEvents(facts, turn.tokenizer)


def finished(turn: Turn, events: ResponseEvents) -> list[Json]:
    """The closing events of a turn that ran to its end."""
    return events.finished(turn.choices[0].finish, turn.usage(), wall_s(turn))


def wall_s(turn: Turn) -> int:
    return turn.gateway.clock.wall_ms() // 1000


class TextOutlet:
    """Writes a response's text as it comes, where it goes on: with `write`, when `ready`."""

    def __init__(
        self, events: ResponseEvents, ready: Callable[[], bool], write: Callable[[Line], None]
    ) -> None:
        self._events = events
        self._ready = ready
        self._write = write

    def ready(self) -> bool:
        return self._events.text_goes_on and self._ready()

    def tell(self, _: int, text: str) -> None:
        self._write(self._events.text_line(text))


async def _stream(request: web.Request, turn: Turn, events: ResponseEvents) -> web.StreamResponse:
    opening = _events_of(lines_of(events.opening()))
    async with EventStream(request, opening) as stream:

        async def send(piece: Piece) -> None:
            said = _events_of(events.lines(piece))
            if piece.finish is None:
                await stream.write(said)
            else:
                stream.hold(said)

        async def tell(place: Place | None) -> None:
            await stream.write(_events_of(lines_of(events.place(place))))

        def tell_text(line: Line) -> None:
            stream.write_now(event_of(line.json, line.type).encode())

        try:
            await turn.run(send, tell, TextOutlet(events, stream.ready, tell_text))
            last = finished(turn, events)
        except ClientGoneError:
            raise
        except Exception as error:  # headers are out: the stream itself has to say it
            turn.note_error(error)
            last = events.failed(as_headrace_error(error, request.path), turn.usage())
        await stream.end(_events_of(lines_of(last)))
    return stream.response


def _events_of(lines: list[Line]) -> str:
    return "".join([event_of(line.json, line.type) for line in lines])
