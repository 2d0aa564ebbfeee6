"""How a model is told of functions, and how it calls them: found out by asking its chat template.

Invariant: a template's own way is used only when it passes our examination: given a function, a
call and a result, it writes all three, and one of our parsers finds that call in what it wrote.
Every other model, whether its template knows no functions or writes calls in a way that we do not
read, gets ours: Hermes' format, described in a system message (`own_way`).

Rejected: looking for words in the template's source. They show neither that it does anything with
them nor in what form it wants arguments, and a new template would silently be misread.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from headrace.errors import CallerError
from headrace.types import ModelRecord
from headrace_gateway.templates import TEMPLATES_MAX, ChatTemplates
from headrace_gateway.tools.events import Arguments, CallBegins
from headrace_gateway.tools.formats import Format, parser_for
from headrace_gateway.tools.mistral import ARGS, MARKER

Message = dict[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None, bool], str]
"""(messages, tools, add_generation_prompt) → text; raises CallerError when the template does."""

_NAME = "headrace_example"
_VALUE = "headrace_value"
_RESULT = "headrace_result"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "An example.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A key."}},
            "required": ["key"],
        },
    },
}
_USER = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """`own`: functions, calls and results are written by us, not by the template.

    What a template of its own wants: `text_arguments`: arguments as JSON text instead of an object;
    `one_call`: a message holds at most one call; `short_ids`: call ids of nine letters and digits.
    What templates without functions have: `system_role`.
    """

    format: Format
    own: bool = False
    text_arguments: bool = False
    one_call: bool = False
    short_ids: bool = False
    system_role: bool = True


class Dialects:
    """The dialect of each model, examined once; the least recently used one goes."""

    def __init__(self, templates: ChatTemplates) -> None:
        self._templates = templates
        self._known: OrderedDict[str, Dialect] = OrderedDict()

    def of(self, record: ModelRecord) -> Dialect:
        """Raises CallerError when the model has no chat template, or one that cannot be read."""
        found = self._known.get(record.fingerprint)
        if found is None:
            self._templates.check(record)
            found = self._known[record.fingerprint] = examine(self._render_for(record))
            while len(self._known) > TEMPLATES_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(record.fingerprint)
        return found

    def _render_for(self, record: ModelRecord) -> Render:
        return lambda messages, tools, prompt: self._templates.render(
            record, messages, tools, add_generation_prompt=prompt
        )


def examine(render: Render) -> Dialect:
    """The dialect of the template behind `render`."""
    for text_arguments, short_ids in product((False, True), repeat=2):
        form = Dialect(Format.HERMES, text_arguments=text_arguments, short_ids=short_ids)
        try:
            found = _format_of(render, form)
        except CallerError:
            continue
        if found is not None:
            return Dialect(
                found,
                text_arguments=text_arguments,
                short_ids=short_ids,
                one_call=not _takes_two_calls(render, form, found),
            )
    return Dialect(Format.HERMES, own=True, system_role=_knows_system(render))


def _example_call(form: Dialect, which: int) -> Message:
    arguments = {"key": f"{_VALUE}{which}"}
    return {
        "id": f"call0000{which}" if form.short_ids else f"call_headrace_{which}",
        "type": "function",
        "function": {
            "name": _NAME,
            "arguments": json.dumps(arguments) if form.text_arguments else arguments,
        },
    }


def _assistant(form: Dialect, calls: int) -> Message:
    made = [_example_call(form, which) for which in range(calls)]
    return {"role": "assistant", "content": "", "tool_calls": made}


def _result(form: Dialect) -> Message:
    call_id = _example_call(form, 0)["id"]
    return {"role": "tool", "tool_call_id": call_id, "name": _NAME, "content": _RESULT}


def _format_of(render: Render, form: Dialect) -> Format | None:
    """The format in which the template writes a call given in `form`; None: in none of ours."""
    opening = render([_USER], [_TOOL], True)
    if _NAME not in opening:
        return None
    conversation = [_USER, _assistant(form, 1)]
    if _RESULT not in render([*conversation, _result(form)], [_TOOL], True):
        return None
    whole = render(conversation, [_TOOL], False)
    # what the assistant said, for a format whose calls are only calls where a message begins
    said = whole.removeprefix(opening) if whole.startswith(opening) else ""
    if _calls_in(Format.HERMES, whole) == 1:
        return Format.HERMES
    if _calls_in(Format.LLAMA, said) == 1:
        return Format.LLAMA
    if _calls_in(Format.MISTRAL_LIST, whole) == 1:
        named = f"{MARKER}{_NAME}{ARGS}" in whole
        return Format.MISTRAL_NAMED if named else Format.MISTRAL_LIST
    return None


def _takes_two_calls(render: Render, form: Dialect, format: Format) -> bool:
    try:
        whole = render([_USER, _assistant(form, 2)], [_TOOL], False)
        opening = render([_USER], [_TOOL], True)
    except CallerError:
        return False
    said = whole.removeprefix(opening) if format is Format.LLAMA else whole
    return _calls_in(format, said) == 2


def _calls_in(format: Format, text: str) -> int:
    """How many of our example calls, in order, the format's parser finds in `text`."""
    parser = parser_for(format, frozenset({_NAME}))
    events = [*parser.push(text), *parser.finish()]
    if not any(isinstance(event, CallBegins) for event in events):
        return 0
    found = [event.delta for event in events if isinstance(event, Arguments)]
    wanted = [{"key": f"{_VALUE}{which}"} for which in range(len(found))]
    try:
        return len(found) if [json.loads(text) for text in found] == wanted else 0
    except ValueError:
        return 0


def _knows_system(render: Render) -> bool:
    try:
        return _VALUE in render([{"role": "system", "content": _VALUE}, _USER], None, True)
    except CallerError:
        return False
