"""What an Offer means for one model: what it reads, what it may say, and how that is read.

Invariant: prompt, grammar and parser of a request follow from the same Dialect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace import grammars
from headrace.errors import CallerError
from headrace.types import ModelRecord
from headrace_gateway.api.context import Gateway
from headrace_gateway.api.formats import Format
from headrace_gateway.choices import Reader, Speller
from headrace_gateway.tokens import ModelTokenizer
from headrace_gateway.tools.dialects import Dialect
from headrace_gateway.tools.enforcing import grammar_for
from headrace_gateway.tools.formats import parser_for
from headrace_gateway.tools.markers import MarkedSpeller, marker_tokens
from headrace_gateway.tools.offer import Freedom, Function, Offer
from headrace_gateway.tools.reading import CALLS_MAX, ToolReader


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """An Offer to a model that speaks `dialect`; `markers` are its tokens for marking calls."""

    offer: Offer
    dialect: Dialect
    markers: dict[str, int]

    def offering(self, functions: tuple[Function, ...]) -> ToolPlan:
        """The same with other functions."""
        return replace(self, offer=replace(self.offer, functions=functions))

    def reader(self) -> Reader:
        """A new one for each choice."""
        parser = parser_for(self.dialect.format, self.offer.names)
        return ToolReader(parser, CALLS_MAX if self.offer.parallel else 1)

    def speller(self, tokenizer: ModelTokenizer) -> Speller:
        return MarkedSpeller(tokenizer, self.markers) if self.markers else tokenizer

    def hold(self, wanted: Format | None) -> Format | None:
        """The form that calls, and an answer that is `wanted` in a form of its own, have to have.

        Raises CallerError where the two cannot be had together.
        """
        if wanted is None or self.offer.freedom is Freedom.REQUIRED:
            return Format("tools", lambda: self._grammar(None))
        if wanted.schema is None:
            raise CallerError(
                f"{wanted.param}: only JSON can be wanted together with 'tools'",
                param=wanted.param,
                code="unsupported_parameter",
            )
        answer = wanted.schema
        return replace(wanted, build=lambda: self._grammar(grammars.json_in_lark(answer())))

    def _grammar(self, answer: str | None) -> str:
        return grammar_for(self.dialect.format, self.markers, self.offer, answer) or ""


async def make_plan(gateway: Gateway, record: ModelRecord, offer: Offer | None) -> ToolPlan | None:
    """The plan for `offer`, None where nothing is offered. Raises CallerError."""
    if offer is None:
        return None
    dialect = gateway.dialects.of(record)
    tokenizer = await gateway.tokenizers.get(record)
    return ToolPlan(offer, dialect, marker_tokens(tokenizer, dialect.format))
