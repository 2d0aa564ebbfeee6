"""Which sampling options can be carried out at all.

Invariant: what passes here never raises in a step, where it would cost other jobs their step too.
The gateway asks the same of requests, with narrower limits; this check is for whatever else writes
jobs.
"""

from __future__ import annotations

from collections.abc import Iterator

from headrace.types import LOGPROBS_MAX, NO_LOGPROBS, Sampling

TEMPERATURE_MAX = 100.0
"""Far above what any API allows; beyond, tokens are noise."""
PENALTY_MAX = 2.0
"""Presence and frequency penalties, as in OpenAI's API."""
REPETITION_PENALTY_MAX = 100.0
BIAS_MAX = 100.0
"""As in OpenAI's API: enough to ban or to force a token."""

LOGIT_BIAS_MAX = 1024
BAD_WORDS_MAX = 1024
BAD_WORD_TOKENS_MAX = 1024
STOP_TOKENS_MAX = 1024


def refuse(sampling: Sampling, vocab_size: int) -> str | None:
    """Why no job can run with `sampling` on a model of `vocab_size` tokens; None when one can."""
    for problems in (_lengths(sampling), _numbers(sampling), _tokens(sampling, vocab_size)):
        for problem in problems:
            return problem
    return None


def _lengths(s: Sampling) -> Iterator[str]:
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(s, name)
        if not (count == NO_LOGPROBS or 0 <= count <= LOGPROBS_MAX):
            yield f"{name} = {count} is not from 0 to {LOGPROBS_MAX}"
    if s.max_tokens < 0:
        yield f"max_tokens = {s.max_tokens} is negative"
    if s.max_tokens == 0 and s.prompt_logprobs == NO_LOGPROBS:
        yield "max_tokens = 0 needs prompt_logprobs"
    if s.min_tokens < 0:
        yield f"min_tokens = {s.min_tokens} is negative"
    if s.top_k < 0:
        yield f"top_k = {s.top_k} is negative"


def _numbers(s: Sampling) -> Iterator[str]:
    # NaN fails every comparison, so each is written to hold for good values
    if not 0 <= s.temperature <= TEMPERATURE_MAX:
        yield f"temperature = {s.temperature} is not from 0 to {TEMPERATURE_MAX}"
    for name in ("top_p", "typical_p"):
        if not 0 < getattr(s, name) <= 1:
            yield f"{name} = {getattr(s, name)} is not above 0 and at most 1"
    if not 0 <= s.min_p <= 1:
        yield f"min_p = {s.min_p} is not from 0 to 1"
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(s, name)) <= PENALTY_MAX:
            yield f"{name} = {getattr(s, name)} is not from -{PENALTY_MAX} to {PENALTY_MAX}"
    if not 0 < s.repetition_penalty <= REPETITION_PENALTY_MAX:
        yield (
            f"repetition_penalty = {s.repetition_penalty} is not above 0 and at most "
            f"{REPETITION_PENALTY_MAX}"
        )
    for token, bias in s.logit_bias:
        if not abs(bias) <= BIAS_MAX:
            yield f"logit_bias of token {token} = {bias} is not from -{BIAS_MAX} to {BIAS_MAX}"


def _tokens(s: Sampling, vocab_size: int) -> Iterator[str]:
    counts = (
        ("logit_bias", len(s.logit_bias), LOGIT_BIAS_MAX),
        ("bad_words", len(s.bad_words), BAD_WORDS_MAX),
        ("stop_token_ids", len(s.stop_token_ids), STOP_TOKENS_MAX),
        ("a sequence in bad_words", max(map(len, s.bad_words), default=0), BAD_WORD_TOKENS_MAX),
    )
    for name, count, most in counts:
        if count > most:
            yield f"{name} has {count} entries, at most {most} can be"
    biased = [token for token, _ in s.logit_bias]
    if len(set(biased)) < len(biased):
        yield "logit_bias names a token twice"
    if not all(s.bad_words):
        yield "bad_words has an empty sequence"
    named = (
        ("logit_bias", biased),
        ("stop_token_ids", s.stop_token_ids),
        ("bad_words", [token for word in s.bad_words for token in word]),
    )
    for name, tokens in named:
        for token in tokens:
            if not 0 <= token < vocab_size:
                yield f"{name}: token {token} is outside the vocabulary of {vocab_size} tokens"
