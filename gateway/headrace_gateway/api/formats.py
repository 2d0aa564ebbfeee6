"""What the output has to match: JSON, a schema, a regular expression, a choice or a grammar.

Invariant: a request asks for one form at most, and whatever way it was asked for it becomes one
grammar, which is compiled under limits before any job is made. OpenAI's `response_format` and
`text.format`, vLLM's `structured_outputs` and its older `guided_…` fields, and plain `regex`,
`choice` and `grammar` mean the same here. `strict` changes nothing: a schema always holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from headrace import grammars
from headrace.errors import CallerError
from headrace.types import ModelRecord
from headrace_gateway.api.bodies import parse_object
from headrace_gateway.api.context import Gateway
from headrace_gateway.api.validation import STRICT, bad_value, missing

CHOICE_TEXTS_MAX = 4_096

SchemaName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Schema = dict[str, Any]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
ChoiceTexts = Annotated[list[NonEmpty], Field(min_length=1, max_length=CHOICE_TEXTS_MAX)]

Build = Callable[[], str]


@dataclass(frozen=True, slots=True)
class Format:
    """One wanted form: the field that asked for it, and how to make its grammar ('': none).

    `schema` makes the schema of a form that is JSON.
    """

    param: str
    build: Build
    schema: Callable[[], Schema] | None = None


def _json_format(param: str, schema: Callable[[], Schema]) -> Format:
    return Format(param, lambda: grammars.json_schema(schema()), schema)


def _any_object() -> Schema:
    return {"type": "object"}


class JsonSchema(BaseModel):
    """OpenAI's named schema, as `response_format.json_schema` holds it."""

    model_config = STRICT

    name: SchemaName
    schema_: Schema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format` of chat and completions."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def format(self, param: str) -> Format | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return _json_format(param, _any_object)
        if self.json_schema is None:
            raise missing(f"{param}.json_schema")
        schema = self.json_schema.schema_
        return _json_format(param, lambda: schema)


class TextFormat(BaseModel):
    """`text.format` of the Responses API: the named schema's fields stand beside `type`."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName | None = None
    schema_: Schema | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    def format(self, param: str) -> Format | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return _json_format(param, _any_object)
        if self.name is None or self.schema_ is None:
            raise missing(f"{param}.{'name' if self.name is None else 'schema'}")
        schema = self.schema_
        return _json_format(param, lambda: schema)

    def told(self) -> dict[str, Any]:
        """The format as a response object repeats it."""
        fields = self.model_dump(by_alias=True)
        return {name: value for name, value in fields.items() if value is not None}


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: one of its fields says what is wanted."""

    model_config = STRICT

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: None = None
    structural_tag: None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None

    def formats(self) -> Iterator[Format]:
        param = "structured_outputs"
        yield from _formats(param, self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            yield _json_format(param, _any_object)


class FormatFields(BaseModel):
    """The open servers' fields for a form, the same at every endpoint."""

    model_config = STRICT

    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: str | None = None

    def openai_format(self) -> Format | None:
        """What OpenAI's own field asks for; which field that is depends on the endpoint."""
        return None

    def format(self) -> Format | None:
        """The one form that is wanted, if any.

        Raises CallerError when there are several, and when half of one is missing.
        """
        if _FORM_FIELDS.isdisjoint(self.model_fields_set):
            return None
        found = list(self._formats())
        if len(found) > 1:
            first, second = found[0].param, found[1].param
            raise bad_value(
                second,
                "only one field may say what the output has to match"
                if first == second
                else f"only one field may say what the output has to match, and {first!r} does",
            )
        return found[0] if found else None

    def _formats(self) -> Iterator[Format]:
        own = self.openai_format()
        if own is not None:
            yield own
        if self.structured_outputs is not None:
            yield from self.structured_outputs.formats()
        yield from _formats("regex", regex=self.regex)
        yield from _formats("choice", choice=self.choice)
        yield from _formats("grammar", grammar=self.grammar)
        yield from _formats("guided_json", json=self.guided_json)
        yield from _formats("guided_regex", regex=self.guided_regex)
        yield from _formats("guided_choice", choice=self.guided_choice)
        yield from _formats("guided_grammar", grammar=self.guided_grammar)


_FORM_FIELDS = frozenset({*FormatFields.model_fields, "response_format", "text"})
"""None of them, and no form is wanted."""


def _formats(
    param: str,
    json: Schema | str | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> Iterator[Format]:
    """A Format for each of the four that is given, all of them asked for by `param`."""
    if json is not None:
        yield _json_format(param, lambda: _schema_in(json))
    if regex is not None:
        yield Format(param, lambda: grammars.regex(regex))
    if choice is not None:
        yield Format(param, lambda: grammars.choice(choice))
    if grammar is not None:
        yield Format(param, lambda: grammars.lark(grammar))


def _schema_in(value: Schema | str) -> Schema:
    return parse_object(value) if isinstance(value, str) else value


async def checked_grammar(gateway: Gateway, record: ModelRecord, wanted: Format | None) -> str:
    """The grammar of `wanted`, compiled once within the limits; '' where nothing is wanted.

    Raises CallerError naming the field, for what is no schema, expression or grammar and for what
    is too complex.
    """
    if wanted is None:
        return ""
    try:
        # schemas are read in Python, for a third of a second at the worst
        grammar = await asyncio.to_thread(wanted.build)
        if grammar:
            await gateway.grammars.check(record, grammar)
    except CallerError as error:
        if error.param is not None:
            raise
        raise CallerError(
            f"{wanted.param}: {error.message}",
            status=error.status,
            param=wanted.param,
            code=error.code or "invalid_grammar",
        ) from error
    return grammar
