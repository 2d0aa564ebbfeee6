"""Logprobs as the endpoints word them.

Invariant: `token` is the token's text with U+FFFD for halves of characters, `bytes` are exact, and
every number is one that JSON has: what is less probable than e^-9999 is told as -9999.0, as OpenAI
does. Rejected: OpenAI's `bytes:\\xe2\\x80` spelling in completions, which no other server speaks.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from headrace.types import TokenLogprobs
from headrace_gateway.choices import Scored
from headrace_gateway.tokens import ModelTokenizer

Json = dict[str, Any]

LOWEST = -9999.0


def told(logprob: float) -> float:
    """`logprob` as a JSON number. Not a number, which no model should say, counts as lowest."""
    return logprob if logprob > LOWEST else LOWEST


def token_text(tokenizer: ModelTokenizer, token: int) -> str:
    return tokenizer.bytes_of(token).decode("utf-8", "replace")


def token_entries(tokenizer: ModelTokenizer, scored: Iterable[Scored]) -> list[Json]:
    """The entries of chat's `logprobs.content`, which are also those of the Responses API."""
    return [
        _entry(tokenizer, item.token, item.logprobs.logprob)
        | {"top_logprobs": [_entry(tokenizer, *pair) for pair in item.logprobs.top]}
        for item in scored
    ]


def _entry(tokenizer: ModelTokenizer, token: int, logprob: float) -> Json:
    return {
        "token": token_text(tokenizer, token),
        "logprob": told(logprob),
        "bytes": list(tokenizer.bytes_of(token)),
    }


def completion_logprobs(
    tokenizer: ModelTokenizer,
    prompt: Sequence[tuple[int, int, TokenLogprobs | None]],
    scored: Sequence[Scored],
    shift: int,
) -> Json:
    """`logprobs` of a completion.

    `prompt`: (token, offset, logprobs) of an echoed prompt's tokens, the first without logprobs.
    `shift`: how many characters stand before the completion's own text.
    """
    rows = [*prompt, *((item.token, item.offset + shift, item.logprobs) for item in scored)]
    return {
        "tokens": [token_text(tokenizer, token) for token, _, _ in rows],
        "token_logprobs": [None if each is None else told(each.logprob) for _, _, each in rows],
        "top_logprobs": [
            None if each is None else _by_text(tokenizer, token, each) for token, _, each in rows
        ],
        "text_offset": [offset for _, offset, _ in rows],
    }


def _by_text(tokenizer: ModelTokenizer, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
    """The most probable tokens and the one that stands here; of equal texts the more probable."""
    found: dict[str, float] = {}
    for each, logprob in (*logprobs.top, (token, logprobs.logprob)):
        found.setdefault(token_text(tokenizer, each), told(logprob))
    return found


def prompt_entries(
    tokenizer: ModelTokenizer, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: for each prompt token a map by token id; the first has none.

    It holds the `top` most probable tokens and the one that stands there, whose `rank` is null
    where it is not among them.
    """
    made: list[Json | None] = [None]
    for token, each in zip(prompt[1:], logprobs, strict=True):
        entries = {
            str(other): _ranked(tokenizer, other, logprob, rank)
            for rank, (other, logprob) in enumerate(each.top[:top], 1)
        }
        entries.setdefault(str(token), _ranked(tokenizer, token, each.logprob, None))
        made.append(entries)
    return made


def _ranked(tokenizer: ModelTokenizer, token: int, logprob: float, rank: int | None) -> Json:
    text = token_text(tokenizer, token)
    return {"logprob": told(logprob), "rank": rank, "decoded_token": text}


def text_offsets(tokenizer: ModelTokenizer, text: str, tokens: Sequence[int]) -> list[int]:
    """Where in `text` each of `tokens` begins.

    A token that `text` does not show (one that was put before it, or a special one that decoding
    leaves out) takes no room; a space that decoding drops at the start takes none either.
    """
    offsets: list[int] = []
    at, utf8 = 0, codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        offsets.append(at)
        own = utf8.decode(tokenizer.bytes_of(token))
        if at == 0 and own.startswith(" ") and not text.startswith(" "):
            own = own[1:]
        if text.startswith(own, at):
            at += len(own)
    return offsets
