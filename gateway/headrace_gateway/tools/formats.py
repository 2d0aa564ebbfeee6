"""The ways of writing calls that we read, with their markers and parsers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from headrace_gateway.tools import hermes, llama, mistral
from headrace_gateway.tools.events import ToolParser


class Format(StrEnum):
    """How a model writes calls; the modules named alike show what that looks like."""

    HERMES = "hermes"
    LLAMA = "llama"
    MISTRAL_LIST = "mistral list"
    MISTRAL_NAMED = "mistral named"


MARKERS: Mapping[Format, tuple[str, ...]] = {
    Format.HERMES: (hermes.OPEN, hermes.CLOSE),
    Format.LLAMA: (llama.MARKER,),
    Format.MISTRAL_LIST: (mistral.MARKER,),
    Format.MISTRAL_NAMED: (mistral.MARKER, mistral.ARGS, mistral.CALL_ID),
}
"""What a parser needs to see of the text, also where a vocabulary has it as special tokens."""

_PARSERS: Mapping[Format, Callable[[frozenset[str]], ToolParser]] = {
    Format.HERMES: hermes.HermesParser,
    Format.LLAMA: llama.LlamaParser,
    Format.MISTRAL_LIST: mistral.MistralParser,
    Format.MISTRAL_NAMED: mistral.MistralParser,
}


def parser_for(format: Format, names: frozenset[str]) -> ToolParser:
    """A parser of one message, for calls of the functions `names`."""
    return _PARSERS[format](names)
