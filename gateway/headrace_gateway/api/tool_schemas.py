"""What a client may say about tools: functions, and which of them are to be called.

Invariant: what comes out is an Offer that holds together: names differ, parameters are objects, a
named function is offered. Tools of other types, and the older `functions` and `function_call`, are
refused by name: nothing that was asked for is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from headrace.errors import CallerError
from headrace_gateway.api.caching import Marked
from headrace_gateway.api.validation import STRICT, bad_value
from headrace_gateway.tools.offer import NO_PARAMETERS, Freedom, Function, Offer

TOOLS_MAX = 128
DESCRIPTION_CHARS_MAX = 16_384
PARAMETERS_CHARS_MAX = 65_536
"""As JSON; the schemas of all functions together are held by the limits on prompt and grammar."""

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Mode = Literal["none", "auto", "required"]


class FunctionFields(Marked):
    """A function as both APIs describe it."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=DESCRIPTION_CHARS_MAX)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def function(self, param: str) -> Function:
        """Raises CallerError for parameters that are no object schema; `param` is where it is."""
        where = f"{param}.parameters"
        parameters = self.parameters or NO_PARAMETERS
        if parameters.get("type") != "object":
            raise bad_value(where, "must be a JSON schema with 'type': 'object'")
        if len(json.dumps(parameters)) > PARAMETERS_CHARS_MAX:
            raise bad_value(where, f"more than {PARAMETERS_CHARS_MAX} characters of JSON")
        described = self.description or ""
        return Function(self.name, described, parameters, bool(self.strict), where)


class ChatTool(Marked):
    """A tool of chat completions; the function's fields stand in `function`."""

    type: Literal["function"]
    function: FunctionFields


class ResponseTool(FunctionFields):
    """A tool of the Responses API; the function's fields stand beside `type`."""

    type: Literal["function"]
    async_: Literal[False] | None = Field(None, alias="async")
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def told(self) -> dict[str, Any]:
        """The tool as a response object repeats it."""
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }


class FunctionRef(BaseModel):
    model_config = STRICT

    name: FunctionName


class ChatToolChoice(BaseModel):
    """`tool_choice` of chat completions that names a function."""

    model_config = STRICT

    type: Literal["function"]
    function: FunctionRef


class ResponseToolChoice(FunctionRef):
    """`tool_choice` of the Responses API that names a function."""

    type: Literal["function"]


ChatTools = Annotated[list[ChatTool], Field(max_length=TOOLS_MAX)]
ResponseTools = Annotated[list[ResponseTool], Field(max_length=TOOLS_MAX)]


def make_offer(
    functions: Sequence[Function],
    choice: Mode | FunctionRef | None,
    *,
    parallel: bool,
) -> Offer | None:
    """What the model is offered; None for nothing. Raises CallerError naming the field."""
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            param = function.param.removesuffix("parameters") + "name"
            raise bad_value(param, f"two functions are called {function.name!r}")
        seen.add(function.name)
    if isinstance(choice, FunctionRef):
        if choice.name not in seen:
            raise bad_value("tool_choice", f"no function of 'tools' is called {choice.name!r}")
        # a named choice is one call, in OpenAI's API as well
        return Offer(tuple(functions), Freedom.REQUIRED, choice.name, parallel=False)
    if choice == "required" and not functions:
        raise bad_value("tool_choice", "'required' needs 'tools'")
    if choice == "none" or not functions:
        return None
    freedom = Freedom.REQUIRED if choice == "required" else Freedom.AUTO
    return Offer(tuple(functions), freedom, None, parallel)


def refuse_other_tools(body: Mapping[str, Any]) -> None:
    """Raises CallerError (`unsupported_parameter`) for the first tool that is no function."""
    tools = body.get("tools")
    named = [
        (f"tools[{at}]", tool) for at, tool in enumerate(tools if isinstance(tools, list) else ())
    ]
    for param, value in [*named, ("tool_choice", body.get("tool_choice"))]:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise CallerError(
                f"{param}.type: {kind[:100]!r} is not supported here, only 'function' is",
                param=f"{param}.type",
                code="unsupported_parameter",
            )
