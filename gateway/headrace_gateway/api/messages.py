"""Messages and items as clients send them, as a conversation in transformers' form.

Invariant: what comes out holds together: calls stand in messages of the assistant, with their
arguments as objects, and every result answers a call before it and says which function that was of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from headrace.errors import CallerError
from headrace_gateway.api.bodies import parse_object
from headrace_gateway.api.caching import Mark, Marked, MarkedPart, marks_in
from headrace_gateway.api.tool_schemas import FunctionName
from headrace_gateway.api.validation import STRICT, bad_value, missing
from headrace_gateway.tools.reading import CALLS_MAX

PARTS_MAX = 4_096

ShortText = Annotated[str, StringConstraints(max_length=512)]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Conversation = list[dict[str, Any]]


class TextPart(MarkedPart):
    type: Literal["text"]


class CalledFunction(BaseModel):
    model_config = STRICT

    name: FunctionName
    arguments: str


class AssistantCall(BaseModel):
    """A call in an assistant's message."""

    model_config = STRICT

    id: CallId
    type: Literal["function"]
    function: CalledFunction


class Message(Marked):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=PARTS_MAX)] | None = (
        None
    )
    name: ShortText | None = None
    tool_call_id: CallId | None = None
    tool_calls: Annotated[list[AssistantCall], Field(max_length=CALLS_MAX)] | None = None


class InputPart(MarkedPart):
    type: Literal["input_text", "output_text", "text"]


InputContent = str | Annotated[list[InputPart], Field(min_length=1, max_length=PARTS_MAX)]


class InputMessage(Marked):
    """A message among the items of `input`; what a response put out goes in again as it is."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent


class CallItem(BaseModel):
    """A call among the items of `input`."""

    model_config = STRICT

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str


class ResultItem(Marked):
    """The result of a call among the items of `input`."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent


def chat_conversation(
    messages: Sequence[Message], earlier: int = 0
) -> tuple[Conversation, list[Mark]]:
    """The conversation, and its cache breakpoints; there were some `earlier`.

    Raises CallerError for what a message cannot have or lacks.
    """
    calls: dict[str, str] = {}
    made: Conversation = []
    marks: list[Mark] = []
    for at, message in enumerate(messages):
        param = f"messages[{at}]"
        made.append(_chat_message(message, param, calls))
        marks += marks_in(message.content, at, f"{param}.content", earlier + len(marks), message)
    return made, marks


def _chat_message(message: Message, param: str, calls: dict[str, str]) -> dict[str, Any]:
    """`calls` are the functions called so far by call id; those of this message join them."""
    if message.content is None and not message.tool_calls:
        raise missing(f"{param}.content")
    made = {"role": template_role(message.role), "content": text_of(message.content or "")}
    if message.role == "tool":
        if message.tool_call_id is None:
            raise missing(f"{param}.tool_call_id")
        return made | _answer(message.tool_call_id, f"{param}.tool_call_id", calls)
    if message.name is not None:
        made["name"] = message.name
    if not message.tool_calls:
        return made
    if message.role != "assistant":
        raise bad_value(f"{param}.tool_calls", "only the assistant calls tools")
    if len({call.id for call in message.tool_calls}) < len(message.tool_calls):
        raise bad_value(f"{param}.tool_calls", "two calls have the same id")
    listed = []
    for at, call in enumerate(message.tool_calls):
        where = f"{param}.tool_calls[{at}].function.arguments"
        listed.append(_call(call.id, call.function.name, call.function.arguments, where))
        calls[call.id] = call.function.name
    return made | {"tool_calls": listed}


def input_conversation(
    items: Sequence[InputMessage | CallItem | ResultItem], earlier: int = 0
) -> tuple[Conversation, list[Mark]]:
    """The conversation, and its cache breakpoints; there were some `earlier`.

    Raises CallerError. Calls join what the assistant said just before them in one message.
    """
    calls: dict[str, str] = {}
    made: Conversation = []
    marks: list[Mark] = []
    for at, item in enumerate(items):
        param = f"input[{at}]"
        if isinstance(item, InputMessage):
            made.append({"role": template_role(item.role), "content": text_of(item.content)})
            where = f"{param}.content"
            marks += marks_in(item.content, len(made) - 1, where, earlier + len(marks), item)
        elif isinstance(item, ResultItem):
            answer = _answer(item.call_id, f"{param}.call_id", calls)
            made.append({"role": "tool", "content": text_of(item.output)} | answer)
            where = f"{param}.output"
            marks += marks_in(item.output, len(made) - 1, where, earlier + len(marks), item)
        else:
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": ""})
            listed = made[-1].setdefault("tool_calls", [])
            if any(call["id"] == item.call_id for call in listed):
                raise bad_value(f"{param}.call_id", "two calls have the same id")
            where = f"{param}.arguments"
            listed.append(_call(item.call_id, item.name, item.arguments, where))
            calls[item.call_id] = item.name
    return made, marks


def _call(call_id: str, name: str, arguments: str, param: str) -> dict[str, Any]:
    """A call in transformers' form; arguments of '' are none."""
    try:
        parsed = parse_object(arguments) if arguments.strip() else {}
    except CallerError as error:
        raise bad_value(param, f"must be a JSON object as text: {error.message}") from error
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": parsed}}


def _answer(call_id: str, param: str, calls: dict[str, str]) -> dict[str, Any]:
    if call_id not in calls:
        raise bad_value(param, f"answers no call before it: {call_id!r}")
    return {"tool_call_id": call_id, "name": calls[call_id]}


def text_of(content: str | Sequence[TextPart | InputPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def template_role(role: str) -> str:
    # `developer` is OpenAI's newer name for `system`; open models' templates know only the latter
    return "system" if role == "developer" else role
