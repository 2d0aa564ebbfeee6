"""The Responses API's objects and event sequence, made from what a turn delivers.

Invariant: events are numbered from 0 without gaps, and every response that was created ends in
exactly one of `completed`, `incomplete` or `failed`, with all its items closed before: one at a
time is open, and there is at least one in a response that was in progress. `queued` may come any
number of times, then `in_progress` once, then items. There is no I/O here: HTTP and WebSocket send
the same events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace.errors import HeadraceError
from headrace.types import FinishReason
from headrace_gateway.api.logprobs import token_entries
from headrace_gateway.api.response_items import CallItem, MessageItem
from headrace_gateway.api.response_schemas import ResponseRequest
from headrace_gateway.api.sse import Mould, dump, mould, quote
from headrace_gateway.api.tool_schemas import FunctionRef
from headrace_gateway.api.turn import CODE_EXPIRED, Usage
from headrace_gateway.api.waiting import Place
from headrace_gateway.choices import Piece
from headrace_gateway.tokens import ModelTokenizer
from headrace_gateway.tools.events import Arguments, CallBegins, CallEnds, Event, Text

Json = dict[str, Any]

HOLE, NUMBER_HOLE = "\0text\0", "\0number\0"
"""Stand for a text and a sequence number in an event's mould."""


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """What a response says of itself from its first event to its last."""

    id: str
    created_s: int
    model: str
    service_tier: str
    request: ResponseRequest
    cached: bool = False


def usage_json(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


class Line(NamedTuple):
    """An event as it is sent: its type, and all of it as JSON."""

    type: str
    json: str


def lines_of(events: Iterable[Json]) -> list[Line]:
    return [Line(event["type"], dump(event)) for event in events]


class ResponseEvents:
    """Builds one response: `opening`, `place`s, `piece` after `piece`, then one of the endings."""

    def __init__(self, facts: ResponseFacts, tokenizer: ModelTokenizer) -> None:
        self._facts = facts
        self._tokenizer = tokenizer
        self._sequence = 0
        self._in_progress = False
        self._closed: list[Json] = []
        self._item: MessageItem | CallItem | None = None
        self._logprobs: list[Json] = []
        self._moulded: tuple[MessageItem, str, Mould] | None = None

    def opening(self) -> list[Json]:
        """What goes out when the request is accepted."""
        response = self._response("in_progress", [])
        return self._number({"type": "response.created", "response": response})

    def place(self, place: Place | None) -> list[Json]:
        """News of the queue; None: the response has left it."""
        if self._in_progress:
            return []
        if place is None:
            return self._number(*self._begin())
        queue = {"position": place.position, "predicted_start_ms": place.start_in_ms}
        response = self._response("queued", [])
        return self._number({"type": "response.queued", "response": response, "queue": queue})

    def _begin(self) -> list[Json]:
        self._in_progress = True
        response = self._response("in_progress", [])
        return [{"type": "response.in_progress", "response": response}]

    def piece(self, piece: Piece) -> list[Json]:
        """What the delivery adds; where only text can come, the item begins with the first token.

        Logprobs are told with text; a call's tokens have none.
        """
        made = [] if self._in_progress else self._begin()
        self._logprobs += token_entries(self._tokenizer, piece.logprobs)
        if piece.tokens and not self._facts.request.tools:
            made += self._message()[1]
        for event in piece.events:
            made += self._event(event)
        if self._logprobs and isinstance(self._item, MessageItem):
            made += self._text("")
        return self._number(*made)

    @property
    def text_goes_on(self) -> bool:
        """Whether text that comes now is one event, which differs from the last in little else."""
        return self._in_progress and isinstance(self._item, MessageItem) and not self._logprobs

    def lines(self, piece: Piece) -> list[Line]:
        """As `piece`, written already; text that goes on is written around nothing but itself."""
        said = piece.events
        plain = len(said) == 1 and type(said[0]) is Text and not piece.logprobs
        if not plain or not self.text_goes_on:
            return lines_of(self.piece(piece))
        assert isinstance(said[0], Text), "plain text"
        return [self.text_line(said[0].text)]

    def text_line(self, text: str) -> Line:
        """The event of a text where it `text_goes_on`."""
        item = self._item
        assert isinstance(item, MessageItem), "text goes on in a message"
        if self._moulded is None or self._moulded[0] is not item:
            event = {**item.delta_event(HOLE, []), "sequence_number": NUMBER_HOLE}
            self._moulded = item, event["type"], mould(event, HOLE, NUMBER_HOLE)
        _, kind, around = self._moulded
        item.add(text)
        self._sequence += 1
        return Line(kind, around.fill(quote(text), str(self._sequence - 1)))

    def _event(self, event: Event) -> list[Json]:
        match event:
            case Text(text):
                return self._text(text)
            case CallBegins(_, name):
                closing = self._close("completed")
                self._logprobs.clear()
                self._item = CallItem(*self._next_place(), name)
                return closing + self._item.opening()
            case Arguments(_, delta):
                assert isinstance(self._item, CallItem), "arguments belong to a call"
                return [self._item.delta(delta)]
            case CallEnds(_, complete):
                self._logprobs.clear()
                return self._close("completed" if complete else "incomplete")

    def _text(self, text: str) -> list[Json]:
        message, opening = self._message()
        logprobs, self._logprobs = self._logprobs, []
        return [*opening, message.delta(text, logprobs)]

    def _message(self) -> tuple[MessageItem, list[Json]]:
        """The open message, with the events that open it if it was not."""
        if isinstance(self._item, MessageItem):
            return self._item, []
        assert self._item is None, "a call ends before text goes on"
        self._item = message = MessageItem(*self._next_place())
        return message, message.opening()

    def _next_place(self) -> tuple[str, int]:
        """Suffix of the next item's id, and its place in the output."""
        at = len(self._closed)
        suffix = self._facts.id.partition("_")[2]
        return (f"{suffix}{at:x}" if at else suffix), at

    def _close(self, status: str) -> list[Json]:
        if self._item is None:
            return []
        closing = self._item.closing(status)
        self._closed.append(self._item.told(status))
        self._item = None
        return closing

    def finished(self, finish: FinishReason | None, usage: Usage, now_s: int) -> list[Json]:
        """The end of a generation that came to one: STOP is completed, others are incomplete."""
        if finish is FinishReason.STOP:
            return self._end("completed", "completed", usage, completed_at=now_s)
        # OpenAI has no word of its own for a deadline
        reason = "deadline" if finish is FinishReason.DEADLINE else "max_output_tokens"
        return self._end("incomplete", "incomplete", usage, incomplete_details={"reason": reason})

    def cancelled(self, usage: Usage) -> list[Json]:
        """The end after `response.cancel`: the event is `incomplete`, the status `cancelled`.

        OpenAI's streams have no event of their own for this; clients wait for one of the three.
        """
        return self._end(
            "incomplete", "cancelled", usage, incomplete_details={"reason": "cancelled"}
        )

    def failed(self, error: HeadraceError, usage: Usage) -> list[Json]:
        """The end of a generation that broke."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        if error.code == CODE_EXPIRED:
            code = CODE_EXPIRED
        return self._end("failed", "failed", usage, error={"code": code, "message": error.message})

    def whole(self, piece: Piece, usage: Usage, now_s: int) -> Json:
        """The response object of an answer that is not streamed; `piece` is all of it."""
        self.piece(piece)
        last: Json = self.finished(piece.finish, usage, now_s)[-1]["response"]
        return last

    def _end(self, event: str, status: str, usage: Usage, **fields: Any) -> list[Json]:
        empty = self._in_progress and self._item is None and not self._closed
        made = self._message()[1] if empty else []
        made += self._close("completed" if status == "completed" else "incomplete")
        response = self._response(status, self._closed) | {"usage": usage_json(usage)} | fields
        return self._number(*made, {"type": f"response.{event}", "response": response})

    def _number(self, *events: Json) -> list[Json]:
        numbered = [
            {**event, "sequence_number": self._sequence + at} for at, event in enumerate(events)
        ]
        self._sequence += len(events)
        return numbered

    def _response(self, status: str, output: list[Json]) -> Json:
        facts, request = self._facts, self._facts.request
        made = {
            "id": facts.id,
            "object": "response",
            "created_at": facts.created_s,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.told_instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": facts.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": facts.service_tier,
            "store": False,  # whatever was asked: responses are not kept yet, and clients read this
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": self._format(), "verbosity": "medium"},
            "tool_choice": self._tool_choice(),
            "tools": [tool.told() for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }
        return made | {"cached": True} if facts.cached else made

    def _format(self) -> Json:
        text = self._facts.request.text
        return text.format.told() if text and text.format else {"type": "text"}

    def _tool_choice(self) -> str | Json:
        choice = self._facts.request.tool_choice
        if isinstance(choice, FunctionRef):
            return {"type": "function", "name": choice.name}
        return choice or "auto"
