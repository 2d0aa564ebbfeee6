"""The Responses API's objects and event sequence, made from what a turn delivers.

Invariant: events are numbered from 0 without gaps, and every response that was created ends in
exactly one of `completed`, `incomplete` or `failed`, with its item and part closed before. There is
no I/O here: HTTP and WebSocket send the same events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from headrace.errors import HeadraceError
from headrace.types import FinishReason
from headrace_gateway.api.logprobs import token_entries
from headrace_gateway.api.response_schemas import ResponseRequest
from headrace_gateway.api.turn import Usage
from headrace_gateway.choices import Piece
from headrace_gateway.tokens import ModelTokenizer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """What a response says of itself from its first event to its last."""

    id: str
    created_s: int
    model: str
    service_tier: str
    request: ResponseRequest


def usage_json(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


class ResponseEvents:
    """Builds one response: `opening`, then `piece` after `piece`, then one of the endings."""

    def __init__(self, facts: ResponseFacts, tokenizer: ModelTokenizer) -> None:
        self._facts = facts
        self._tokenizer = tokenizer
        self._item_id = f"msg_{facts.id.partition('_')[2]}"
        self._sequence = 0
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._item_open = False

    def opening(self) -> list[Json]:
        """What goes out when the request is accepted."""
        response = self._response("in_progress", [])
        return self._number(
            {"type": "response.created", "response": response},
            {"type": "response.in_progress", "response": response},
        )

    def piece(self, piece: Piece) -> list[Json]:
        """The new text, if there is any; the item begins with the first token."""
        events: list[Json] = []
        if piece.tokens or piece.text:
            events += self._open_item()
        if piece.text or piece.logprobs:
            events += self._number(
                {
                    "type": "response.output_text.delta",
                    **self._at_part(),
                    "delta": piece.text,
                    "logprobs": self._keep(piece),
                }
            )
        return events

    def _keep(self, piece: Piece) -> list[Json]:
        """Adds `piece` to the text so far; its logprobs as they are told."""
        self._text.append(piece.text)
        entries = token_entries(self._tokenizer, piece.logprobs)
        self._logprobs += entries
        return entries

    def finished(self, finish: FinishReason | None, usage: Usage, now_s: int) -> list[Json]:
        """The end of a generation that came to one: STOP is completed, LENGTH incomplete."""
        if finish is FinishReason.STOP:
            return self._end("completed", "completed", usage, completed_at=now_s)
        return self._end(
            "incomplete", "incomplete", usage, incomplete_details={"reason": "max_output_tokens"}
        )

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
        return self._end("failed", "failed", usage, error={"code": code, "message": error.message})

    def whole(self, piece: Piece, usage: Usage, now_s: int) -> Json:
        """The response object of an answer that is not streamed; `piece` is all of it."""
        self._keep(piece)
        last: Json = self.finished(piece.finish, usage, now_s)[-1]["response"]
        return last

    def _end(self, event: str, status: str, usage: Usage, **fields: Any) -> list[Json]:
        item_status = "completed" if status == "completed" else "incomplete"
        item = self._item(item_status, [self._part()])
        response = self._response(status, [item]) | {"usage": usage_json(usage)} | fields
        return [
            *self._open_item(),
            *self._number(
                {
                    "type": "response.output_text.done",
                    **self._at_part(),
                    "text": "".join(self._text),
                    "logprobs": self._logprobs,
                },
                {"type": "response.content_part.done", **self._at_part(), "part": self._part()},
                {"type": "response.output_item.done", "output_index": 0, "item": item},
                {"type": f"response.{event}", "response": response},
            ),
        ]

    def _open_item(self) -> list[Json]:
        if self._item_open:
            return []
        self._item_open = True
        return self._number(
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": self._item("in_progress", []),
            },
            {
                "type": "response.content_part.added",
                **self._at_part(),
                "part": self._part(),
            },
        )

    def _number(self, *events: Json) -> list[Json]:
        numbered = [
            {**event, "sequence_number": self._sequence + at} for at, event in enumerate(events)
        ]
        self._sequence += len(events)
        return numbered

    def _at_part(self) -> Json:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": "".join(self._text),
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def _item(self, status: str, content: Iterable[Json]) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    def _response(self, status: str, output: list[Json]) -> Json:
        facts, request = self._facts, self._facts.request
        return {
            "id": facts.id,
            "object": "response",
            "created_at": facts.created_s,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
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
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    def _format(self) -> Json:
        text = self._facts.request.text
        return text.format.told() if text and text.format else {"type": "text"}
