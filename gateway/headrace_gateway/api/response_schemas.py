"""What a client may send to the Responses API, over HTTP and as WebSocket frames."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from headrace.errors import CallerError
from headrace.types import NO_LOGPROBS
from headrace_gateway.api.caching import Caching, Mark, marks_in, plain_caching, tool_marks
from headrace_gateway.api.formats import Format, TextFormat
from headrace_gateway.api.messages import (
    CallItem,
    Conversation,
    InputContent,
    InputMessage,
    ResultItem,
    ShortText,
    input_conversation,
    text_of,
)
from headrace_gateway.api.schemas import (
    MESSAGES_MAX,
    Alternatives,
    Common,
    MaxTokens,
    StreamOptions,
)
from headrace_gateway.api.tool_schemas import (
    Mode,
    ResponseToolChoice,
    ResponseTools,
    make_offer,
    refuse_other_tools,
)
from headrace_gateway.api.unsupported import (
    NEUTRAL_RESPONSE,
    refuse_other_items,
    refuse_unsupported,
)
from headrace_gateway.api.validation import STRICT, bad_value, validate
from headrace_gateway.tools.offer import Offer

CREATE = "response.create"
CANCEL = "response.cancel"
LOGPROBS = "message.output_text.logprobs"
INCLUDES_MAX = 32
STREAM_ID = re.compile(r"[A-Za-z0-9_.-]{1,256}")


_KINDS = {"function_call": "call", "function_call_output": "result"}


def _kind_of(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return _KINDS.get(kind, "message") if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[CallItem, Tag("call")]
    | Annotated[ResultItem, Tag("result")],
    Discriminator(_kind_of),
]


class TextConfig(BaseModel):
    """`text` of a request: the form of the output."""

    model_config = STRICT

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(Common):
    prompt_param = "input"

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MESSAGES_MAX)]
    instructions: InputContent | None = None
    max_output_tokens: MaxTokens | None = None
    stream_options: StreamOptions | None = None
    safety_identifier: ShortText | None = None
    tools: ResponseTools | None = None
    tool_choice: Mode | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[ShortText] | None = Field(None, max_length=INCLUDES_MAX)
    top_logprobs: Alternatives | None = None
    generate: bool | None = None

    @property
    def caching(self) -> Caching:
        # on OpenAI's WebSockets `generate: false` makes ready for what comes next
        return plain_caching(self.prompt_cache_options, prewarm=self.generate is False)

    @property
    def asked_tokens(self) -> tuple[int | None, str]:
        return self.max_output_tokens, "max_output_tokens"

    @property
    def with_logprobs(self) -> bool:
        # the other includables belong to tools and reasoning, of which there are none to include
        return LOGPROBS in (self.include or ())

    @property
    def alternatives(self) -> int:
        return (self.top_logprobs or 0) if self.with_logprobs else NO_LOGPROBS

    def openai_format(self) -> Format | None:
        wanted = None if self.text is None else self.text.format
        return None if wanted is None else wanted.format("text.format")

    def offer(self) -> Offer | None:
        """The functions that may be called. Raises CallerError."""
        functions = [tool.function(f"tools[{at}]") for at, tool in enumerate(self.tools or ())]
        parallel = self.parallel_tool_calls is not False
        return make_offer(functions, self.tool_choice, parallel=parallel)

    def conversation(self) -> tuple[Conversation, list[Mark]]:
        """`instructions` and `input` as chat messages, and breakpoints. Raises CallerError."""
        made: Conversation = []
        marks = tool_marks([(tool,) for tool in self.tools or ()])
        if self.instructions:
            made.append({"role": "system", "content": self.told_instructions})
            marks += marks_in(self.instructions, 0, "instructions", len(marks))
        if isinstance(self.input, str):
            return [*made, {"role": "user", "content": self.input}], marks
        items, found = input_conversation(self.input, len(marks))
        marks += [replace(mark, message=mark.message + len(made)) for mark in found]
        return made + items, marks

    @property
    def told_instructions(self) -> str | None:
        """`instructions` as a response repeats them."""
        return None if self.instructions is None else text_of(self.instructions)


def parse_response(body: Mapping[str, Any]) -> ResponseRequest:
    """`body` as a ResponseRequest. Raises CallerError naming the field."""
    if body.get("previous_response_id") is not None:
        raise CallerError(
            "no earlier response is kept here: send the whole conversation in 'input'",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    refuse_unsupported(body, NEUTRAL_RESPONSE)
    refuse_other_tools(body)
    refuse_other_items(body)
    parsed = validate(ResponseRequest, body)
    if parsed.top_logprobs and not parsed.with_logprobs:
        raise bad_value("top_logprobs", f"needs {LOGPROBS!r} in 'include'")
    return parsed


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
