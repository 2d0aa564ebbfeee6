"""Markers that are tokens of their own in a model's vocabulary, made visible to its parser.

A detokenizer leaves special tokens out, as nobody wants to read them. `<|python_tag|>` and
`[TOOL_CALLS]` are such tokens in the models that use them, and `<tool_call>` is one in some. Here
they are put back, between what the detokenizer makes of the tokens before and behind them.
Rejected: showing all special tokens, which would put those into the text that mean nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace_gateway.tokens import Detokenizer, ModelTokenizer
from headrace_gateway.tools.formats import MARKERS, Format


def marker_tokens(tokenizer: ModelTokenizer, format: Format) -> dict[str, int]:
    """Those of the format's markers that are tokens added to the vocabulary, with their ids."""
    found = {marker: tokenizer.added_id(marker) for marker in MARKERS[format]}
    return {marker: token for marker, token in found.items() if token is not None}


class MarkerDetokenizer:
    """`inner` for all tokens but `markers`, given with their ids, which stand for themselves."""

    def __init__(self, inner: Detokenizer, markers: Mapping[str, int]) -> None:
        self._inner = inner
        self._markers = {token: marker for marker, token in markers.items()}

    def push(self, token: int) -> str:
        marker = self._markers.get(token)
        if marker is None:
            return self._inner.push(token)
        return self._inner.flush() + marker

    def flush(self) -> str:
        return self._inner.flush()


class MarkedSpeller:
    """`tokenizer` for a choice whose reader needs `markers` in the text."""

    def __init__(self, tokenizer: ModelTokenizer, markers: Mapping[str, int]) -> None:
        self._markers = markers
        self._tokenizer = tokenizer

    def detokenizer(self) -> Detokenizer:
        return MarkerDetokenizer(self._tokenizer.detokenizer(), self._markers)

    def bytes_of(self, token: int) -> bytes:
        return self._tokenizer.bytes_of(token)
