"""Chat messages → prompt text, by the model's own Jinja template.

Invariant: a template runs sandboxed, without access to anything but its arguments, and its output
is bounded while it is being made. The environment (trimming, `raise_exception`, `tojson`,
`strftime_now`, loop controls, the `generation` tag) is the one that templates are written for;
that convention is Hugging Face transformers'.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.clock import Clock
from headrace.errors import CallerError
from headrace.types import ModelRecord

TEMPLATES_MAX = 16
"""Compiled templates kept; the least recently used one goes."""
PROMPT_CHARS_MAX = 32 * 1024 * 1024
CODE = "chat_template_error"


class TemplateRefusedError(jinja2.TemplateError):
    """What a template says with `raise_exception`: these messages do not fit this model."""


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; for serving it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares a mutable set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own `tojson` escapes HTML, which would put escapes into the prompt
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplates:
    """Compiled templates by model fingerprint."""

    def __init__(self, clock: Clock, chars_max: int = PROMPT_CHARS_MAX) -> None:
        self._clock = clock
        self._chars_max = chars_max
        self._compiled: OrderedDict[str, jinja2.Template] = OrderedDict()
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = self._strftime_now

    def render(
        self,
        record: ModelRecord,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt; with `add_generation_prompt` up to where the assistant begins to speak.

        `tools` are {"type": "function", "function": {name, description, parameters}}; what messages
        say of calls is in transformers' form too (`headrace_gateway.tools.conversation`).
        Raises CallerError when the model has no template, when its template refuses the messages
        or fails on them, and when the text exceeds `chars_max`.
        """
        template = self._template(record)
        pieces: list[str] = []
        length = 0
        try:
            context = template.new_context(
                {
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "tools": tools,
                    "documents": None,
                    **record.template_tokens,
                }
            )
            # `generate` does no more than this and, after a failure, a nicer traceback
            for piece in template.root_render_func(context):
                pieces.append(piece)
                length += len(piece)
                if length > self._chars_max:
                    raise TemplateRefusedError(f"the prompt exceeds {self._chars_max} characters")
        except (
            jinja2.TemplateError,  # also SecurityError and TemplateRefusedError
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise CallerError(
                f"the chat template of {record.name} does not take these messages: {error}",
                param="messages",
                code=CODE,
            ) from error
        return "".join(pieces)

    def check(self, record: ModelRecord) -> None:
        """Raises CallerError when the model has no template, or one that cannot be read."""
        self._template(record)

    def _template(self, record: ModelRecord) -> jinja2.Template:
        found = self._compiled.get(record.fingerprint)
        if found is not None:
            self._compiled.move_to_end(record.fingerprint)
            return found
        if not record.chat_template:
            raise CallerError(
                f"the model {record.name} has no chat template; use /v1/completions",
                param="model",
                code="no_chat_template",
            )
        try:
            compiled = self._environment.from_string(record.chat_template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CallerError(
                f"the chat template of {record.name} cannot be read: {error}",
                param="model",
                code=CODE,
            ) from error
        # jinja's map of maps is gone through for each prompt; a plain one is copied at once
        compiled.globals = dict(compiled.globals)
        self._compiled[record.fingerprint] = compiled
        while len(self._compiled) > TEMPLATES_MAX:
            self._compiled.popitem(last=False)
        return compiled

    def _strftime_now(self, pattern: str) -> str:
        return datetime.fromtimestamp(self._clock.wall_ms() / 1000).strftime(pattern)
