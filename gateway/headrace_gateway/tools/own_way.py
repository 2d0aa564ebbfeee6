"""Functions for models whose chat template knows none that we can read: described by us.

The words are ours, the format is Hermes': `<tools>`, `<tool_call>` and `<tool_response>` are what
most models have seen in training, whatever they were trained for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace_gateway.tools.hermes import CLOSE, OPEN
from headrace_gateway.tools.offer import Function

Message = dict[str, Any]

_INTRODUCTION = """\
You can call functions. Each line between <tools> and </tools> describes one function, with a JSON \
schema of its parameters:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments as JSON between {open} and {close}, like this:
{open}
{{"name": "function_name", "arguments": {{"parameter": "value"}}}}
{close}
Call several functions by writing several of these. Each result comes back between <tool_response> \
and </tool_response>. Answer in plain words when no function is needed."""


def introduce(
    messages: Sequence[Message], functions: Sequence[Function], *, system_role: bool
) -> list[Message]:
    """`messages` beginning with a description of `functions`.

    It follows the caller's system message in the same message, as many templates take only one;
    without a system role it stands before the first user message.
    """
    text = _INTRODUCTION.format(
        tools="\n".join(json.dumps(f.for_template(), ensure_ascii=False) for f in functions),
        open=OPEN,
        close=CLOSE,
    )
    first, rest = (messages[:1], messages[1:]) if messages else ([], [])
    if first and first[0]["role"] == "system":
        text = f"{first[0]['content']}\n\n{text}"
    else:
        rest = messages
    if system_role:
        return [{"role": "system", "content": text}, *rest]
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": text}, *rest]


def spell_out(messages: Sequence[Message]) -> list[Message]:
    """`messages` with calls and results as plain text of the assistant and the user.

    Neighbouring results, and what the user says after them, become one message: many templates
    insist that user and assistant take turns.
    """
    made: list[Message] = []
    answered = False
    for message in messages:
        spelled = _spelled(message)
        if answered and spelled["role"] == "user":
            made[-1] = made[-1] | {"content": f"{made[-1]['content']}\n{spelled['content']}"}
        else:
            made.append(spelled)
        answered = message["role"] == "tool"
    return made


def _spelled(message: Message) -> Message:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    if "tool_calls" not in message:
        return message
    calls = [_written(call["function"]) for call in message["tool_calls"]]
    content = "\n".join([*filter(None, [message["content"]]), *calls])
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": content
    }


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}"
