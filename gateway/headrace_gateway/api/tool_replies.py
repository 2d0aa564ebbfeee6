"""Calls as chat completions word them, whole and in chunks.

Invariant: a call has its id, type and name in the first delta that mentions it and only there; its
arguments are the joined deltas. Call ids are unique for ever: clients keep them in conversations
that are continued elsewhere.
"""

from __future__ import annotations

import secrets
from typing import Any

from headrace.types import FinishReason
from headrace_gateway.choices import Piece
from headrace_gateway.tools.events import Arguments, CallBegins, CallEnds, Event, Text

Json = dict[str, Any]

CALL_ID_BYTES = 12


def new_call_id() -> str:
    return f"call_{secrets.token_hex(CALL_ID_BYTES)}"


def finish_reason(finish: FinishReason | None, *, calling: bool) -> str | None:
    """OpenAI's word for how a choice ended; one that was cut off says so, calls or not."""
    return "tool_calls" if calling and finish is FinishReason.STOP else finish


def whole_calls(piece: Piece) -> list[Json]:
    """`tool_calls` of a message, all of whose events are in `piece`."""
    calls: list[Json] = []
    for event in piece.events:
        if isinstance(event, CallBegins):
            calls.append(_function(event.name))
        elif isinstance(event, Arguments):
            calls[-1]["function"]["arguments"] += event.delta
    return calls


def chunk_delta(event: Event) -> Json | None:
    """The delta that tells of `event`; None for what a stream does not tell."""
    match event:
        case Text(text):
            return {"content": text}
        case CallBegins(index, name):
            return {"tool_calls": [{"index": index, **_function(name)}]}
        case Arguments(index, delta):
            return {"tool_calls": [{"index": index, "function": {"arguments": delta}}]}
        case CallEnds():
            return None


def _function(name: str) -> Json:
    return {
        "id": new_call_id(),
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }
