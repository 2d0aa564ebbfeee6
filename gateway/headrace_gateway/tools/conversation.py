"""A conversation with calls, in the form that a model's chat template wants it.

Messages come in transformers' form: content is a text; an assistant's `tool_calls` are `{id, type,
function: {name, arguments}}` with the arguments as an object; a `tool` message has `tool_call_id`,
`name` and `content`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from headrace_gateway.tools.dialects import Dialect
from headrace_gateway.tools.offer import Function
from headrace_gateway.tools.own_way import introduce, spell_out

Message = dict[str, Any]

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether `messages` need a Dialect although no function is offered."""
    return any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def prepared(
    messages: Sequence[Message], functions: Sequence[Function], dialect: Dialect
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The arguments `messages` and `tools` of the template."""
    if dialect.own:
        spelled = spell_out(messages)
        if functions:
            spelled = introduce(spelled, functions, system_role=dialect.system_role)
        return spelled, None
    made = list(_one_call_each(messages)) if dialect.one_call else list(messages)
    tools = [function.for_template() for function in functions] or None
    return [_in_form(message, dialect) for message in made], tools


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """Each assistant message with several calls as several, each with its result behind it."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        results: dict[str, list[Message]] = {call["id"]: [] for call in calls}
        others: list[Message] = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.get(messages[at]["tool_call_id"], others).append(messages[at])
            at += 1
        for which, call in enumerate(calls):
            content = message["content"] if which == 0 else ""
            yield message | {"content": content, "tool_calls": [call]}
            yield from results.pop(call["id"], ())
        yield from others


def _in_form(message: Message, dialect: Dialect) -> Message:
    made = dict(message)
    if dialect.short_ids and "tool_call_id" in made:
        made["tool_call_id"] = _short_id(made["tool_call_id"])
    if "tool_calls" in made:
        made["tool_calls"] = [_call_in_form(call, dialect) for call in made["tool_calls"]]
    return made


def _call_in_form(call: Message, dialect: Dialect) -> Message:
    function = dict(call["function"])
    if dialect.text_arguments:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    made = call | {"function": function}
    return made | {"id": _short_id(call["id"])} if dialect.short_ids else made


def _short_id(call_id: str) -> str:
    """Nine letters and digits: `call_id` itself if it is that, else always the same ones for it."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    value = int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:16], "big")
    return "".join(_DIGITS[value // 62**place % 62] for place in range(9))
