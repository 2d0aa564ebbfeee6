"""What a client may send to the Responses API, over HTTP and as WebSocket frames."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from headrace.errors import CallerError
from headrace_gateway.api.schemas import (
    MESSAGES_MAX,
    NEUTRAL_ANY,
    PARTS_MAX,
    STRICT,
    Common,
    MaxTokens,
    Neutral,
    ShortText,
    StreamOptions,
    only,
    refuse_unsupported,
    template_role,
    text_format,
    validate,
)

CREATE = "response.create"
CANCEL = "response.cancel"
_LOGPROBS = "message.output_text.logprobs"
STREAM_ID = re.compile(r"[A-Za-z0-9_.-]{1,256}")


class InputPart(BaseModel):
    model_config = STRICT

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(BaseModel):
    """One item of `input`; what a response put out goes in again as it is."""

    model_config = STRICT

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(min_length=1, max_length=PARTS_MAX)]

    def for_template(self) -> dict[str, Any]:
        text = (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content)
        )
        return {"role": template_role(self.role), "content": text}


class ResponseRequest(Common):
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MESSAGES_MAX)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: ShortText | None = None
    safety_identifier: ShortText | None = None
    parallel_tool_calls: bool | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """`instructions` and `input` as chat messages."""
        made: list[dict[str, Any]] = []
        if self.instructions:
            made.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            made.append({"role": "user", "content": self.input})
        else:
            made.extend(item.for_template() for item in self.input)
        return made


def _empty_options(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(item in (None, "none") for item in value.values())
    )


def _plain_text(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and text_format(value.get("format"))
        and value.get("verbosity") in (None, "medium")
    )


def _no_prewarm(value: Any) -> bool:
    return not (isinstance(value, dict) and value.get("prewarm"))


def _no_logprobs(value: Any) -> bool:
    # the other includables belong to tools and reasoning, of which there are none to include
    return value is None or (isinstance(value, list) and _LOGPROBS not in value)


NEUTRAL_RESPONSE: dict[str, Neutral] = NEUTRAL_ANY | {
    "reasoning": _empty_options,
    "text": _plain_text,
    "truncation": only("disabled"),
    "conversation": only(),
    "prompt": only(),
    "include": _no_logprobs,
    "context_management": only([]),
    "prompt_cache_options": _no_prewarm,
    "generate": only(True),
    "n": only(1),
    "stop": only(),
    "max_tokens": only(),
    "max_completion_tokens": only(),
}


def parse_response(body: Mapping[str, Any]) -> ResponseRequest:
    """`body` as a ResponseRequest. Raises CallerError naming the field."""
    if body.get("previous_response_id") is not None:
        raise CallerError(
            "no earlier response is kept here: send the whole conversation in 'input'",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    refuse_unsupported(body, NEUTRAL_RESPONSE)
    return validate(ResponseRequest, body)


@dataclass(frozen=True, slots=True)
class Frame:
    """A WebSocket frame from a client. `lane` is its `stream_id`, None for the nameless lane."""

    type: str
    lane: str | None
    body: dict[str, Any]

    @property
    def response_id(self) -> str | None:
        """Which response a `response.cancel` means. Raises CallerError."""
        value = self.body.get("response_id")
        if value is None or isinstance(value, str):
            return value
        raise CallerError(
            "response_id: Input should be a string", param="response_id", code="invalid_value"
        )


def parse_frame(value: Mapping[str, Any]) -> Frame:
    """The envelope of a frame; its body is checked when its turn comes. Raises CallerError."""
    lane = read_lane(value)
    if lane is None and value.get("stream_id") is not None:
        raise CallerError(
            "stream_id: 1 to 256 letters, digits or _ . -", param="stream_id", code="invalid_value"
        )
    kind = value.get("type")
    if kind not in (CREATE, CANCEL):
        shown = ascii(kind)[:100]
        raise CallerError(
            f"type: {shown} is not an event that is understood here; send {CREATE} or {CANCEL}",
            param="type",
            code="unknown_event_type",
        )
    body = {key: item for key, item in value.items() if key not in ("type", "stream_id")}
    return Frame(kind, lane, body)


def read_lane(value: Mapping[str, Any]) -> str | None:
    """The valid `stream_id` of a frame, if it has one; answers to bad frames echo it."""
    lane = value.get("stream_id")
    return lane if isinstance(lane, str) and STREAM_ID.fullmatch(lane) else None
