"""Answers of chat completions and completions, whole and in chunks.

Invariant: the two differ only in the names of their fields; what they have in common is written
once, here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from aiohttp import web

from headrace_gateway.api.errors import as_headrace_error
from headrace_gateway.api.schemas import Choices
from headrace_gateway.api.sse import DONE, EventStream, dump, event_of, mould, quote
from headrace_gateway.api.turn import ClientGoneError, Turn, Usage
from headrace_gateway.api.waiting import Place
from headrace_gateway.api.wishes import Wish
from headrace_gateway.choices import Piece
from headrace_gateway.tools.events import Text

Json = dict[str, Any]

HOLE = "\0text\0"
"""Stands for a text in an event's mould, and in no name."""


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class TextReply(ABC):
    """How one endpoint words a turn. `with_usage` is `stream_options.include_usage`.

    `varied`: whether chunks that tell of a text differ in more than that: logprobs, an echo.
    """

    object_name: str
    chunk_name: str

    def __init__(self, turn: Turn, *, with_usage: bool, varied: bool) -> None:
        self._turn = turn
        self._with_usage = with_usage
        self._varied = varied
        self._around: dict[int, tuple[str, str]] = {}

    @abstractmethod
    def whole_choice(self, piece: Piece) -> Json:
        """A choice, all of whose pieces are joined in `piece`."""

    @abstractmethod
    def chunks(self, piece: Piece) -> list[Json]:
        """What a delivery says: its text, if there is any, and how its choice ended."""

    @abstractmethod
    def text_chunk(self, index: int, text: str) -> Json:
        """What a delivery to choice `index` says that is `text` and nothing else."""

    def events(self, piece: Piece) -> str:
        """`chunks` as server-sent events."""
        said = piece.events
        if len(said) != 1 or piece.finish or self._varied or type(said[0]) is not Text:
            return _events_of(self.chunks(piece))
        return self.text_event(piece.index, said[0].text)

    @property
    def varied(self) -> bool:
        """Whether a text alone does not make an event."""
        return self._varied

    def text_event(self, index: int, text: str) -> str:
        """The event of `text_chunk`, from its mould."""
        before, after = self.around(index)
        return before + quote(text) + after

    def around(self, index: int) -> tuple[str, str]:
        """What stands before and behind the text in such an event."""
        found = self._around.get(index)
        if found is None:
            before, after = mould(self.text_chunk(index, HOLE), HOLE).parts
            before, _, after = event_of(f"{before}{HOLE}{after}").partition(HOLE)
            found = self._around[index] = before, after
        return found

    def whole(self, pieces: list[Piece]) -> Json:
        """The body of an answer that is not streamed; `pieces` are its choices."""
        choices = [self.whole_choice(piece) for piece in pieces]
        return self._head(self.object_name, choices) | {"usage": usage_json(self._turn.usage())}

    def opening(self) -> list[Json]:
        """Chunks that go out as soon as the request is accepted."""
        return []

    def closing(self) -> list[Json]:
        """The chunk with the usage, if it was asked for."""
        if not self._with_usage:
            return []
        return [self._head(self.chunk_name, []) | {"usage": usage_json(self._turn.usage())}]

    def _chunk(self, choices: list[Json]) -> Json:
        made = self._head(self.chunk_name, choices)
        if self._with_usage:
            made["usage"] = None
        return made

    def _head(self, object_name: str, choices: list[Json]) -> Json:
        turn = self._turn
        made: Json = {
            "id": turn.id,
            "object": object_name,
            "created": turn.created_s,
            "model": turn.record.name,
            "service_tier": turn.service_tier,
            "system_fingerprint": turn.system_fingerprint,
            "choices": choices,
        }
        return made | {"cached": True} if turn.cached else made


async def answer(
    request: web.Request, turn: Turn, parsed: Choices, wish: Wish, make: Callable[[], TextReply]
) -> web.StreamResponse:
    """Hand the turn's jobs to the fleet and answer, streamed or whole.

    Until they are accepted an error is an HTTP status, then a stream carries it as an event. What
    a stream begins with is made while Redis is asked: the first token may come right behind Redis'
    answer. Raises what `Turn.submit` raises.
    """
    made: list[_Beginning] = []
    if not parsed.stream:
        await turn.submit(wish)
        return web.json_response(make().whole(await turn.collect()))

    def begin() -> None:
        made.append(_Beginning(request, turn, make()))

    await turn.submit(wish, begin)
    return await _stream(request, turn, made[0] if made else _Beginning(request, turn, make()))


class TextOutlet:
    """Writes a reply's texts as they come."""

    def __init__(self, reply: TextReply, events: EventStream, choices: int) -> None:
        self._around = [
            tuple(part.encode() for part in reply.around(index)) for index in range(choices)
        ]
        self._write = events.write_now
        self.ready = events.ready

    def tell(self, index: int, text: str) -> None:
        before, after = self._around[index]
        self._write(before + quote(text).encode() + after)


class _Beginning:
    """What a stream begins with, made for jobs that may still be refused; nothing is sent."""

    def __init__(self, request: web.Request, turn: Turn, reply: TextReply) -> None:
        self.reply = reply
        self.events = EventStream(request, _events_of(reply.opening()))
        self.outlet = None
        if not reply.varied:
            self.outlet = TextOutlet(reply, self.events, turn.choice_count)
        turn.find_meters()


async def _stream(request: web.Request, turn: Turn, begun: _Beginning) -> web.StreamResponse:
    reply = begun.reply
    async with begun.events as events:

        async def send(piece: Piece) -> None:
            if piece.finish is not None and turn.ended:
                events.hold(reply.events(piece))
            else:
                await events.write(reply.events(piece))

        async def tell(place: Place | None) -> None:
            if place is not None:
                await events.comment(_queued(place))

        try:
            await turn.run(send, tell, begun.outlet)
            last = _events_of(reply.closing())
        except ClientGoneError:
            raise
        except Exception as error:  # headers are out: the stream itself has to say it
            turn.note_error(error)
            last = _events_of([as_headrace_error(error, request.path).body()])
        await events.end(last + DONE)
    return events.response


def _events_of(chunks: list[Json]) -> str:
    return "".join([event_of(dump(chunk)) for chunk in chunks])


def _queued(place: Place) -> str:
    """The place as a comment, as these streams have no event for it."""
    start = "" if place.start_in_ms is None else f" predicted_start_ms={place.start_in_ms}"
    return f"queued position={place.position}{start}"
