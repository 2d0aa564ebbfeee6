"""The sampling options of a request body, and the Sampling that they make.

Invariant: a value that is let through here is one that the engine takes, but for token ids, which
are held against the vocabulary once the model is known. Names are OpenAI's where it has one, else
those that open servers share.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from headrace.types import Sampling
from headrace_gateway.api.validation import STRICT, bad_value

STOPS_MAX = 4
STOP_CHARS_MAX = 256
STOP_TOKENS_MAX = 64
BAD_WORDS_MAX = 128
BIASES_MAX = 1_024
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Stop = Annotated[str, StringConstraints(min_length=1, max_length=STOP_CHARS_MAX)]
BadWord = Annotated[str, StringConstraints(min_length=1, max_length=STOP_CHARS_MAX)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
SpelledTokenId = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class SamplingFields(BaseModel):
    """What chooses tokens and ends the text, the same at every endpoint."""

    model_config = STRICT

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    typical_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=2, allow_inf_nan=False)
    logit_bias: dict[SpelledTokenId, Bias] | None = Field(None, max_length=BIASES_MAX)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS_MAX)] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=STOP_TOKENS_MAX)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    bad_words: list[BadWord] | None = Field(None, max_length=BAD_WORDS_MAX)

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, vocab_size: int) -> Sampling:
        """The options as the engine takes them.

        What depends on the job (`max_tokens`, `seed`), on the tokenizer (`bad_words`) or on the
        endpoint (logprobs, grammar) has its default. Raises CallerError for token ids that are not
        below `vocab_size`.
        """
        if _CHOSEN.isdisjoint(self.model_fields_set):
            return AS_USUAL
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        _check_ids("logit_bias", list(biases), vocab_size)
        _check_ids("stop_token_ids", self.stop_token_ids or [], vocab_size)
        return Sampling(
            max_tokens=0,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_or(self.min_p, 0.0),
            typical_p=_or(self.typical_p, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=tuple((token, float(bias)) for token, bias in biases.items()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
        )


_CHOSEN = frozenset(SamplingFields.model_fields) - {"seed", "stop", "bad_words"}
"""What `sampling` looks at, and a little more."""
AS_USUAL = Sampling(max_tokens=0)
"""What it says where nothing was chosen."""


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _check_ids(param: str, tokens: list[int], vocab_size: int) -> None:
    highest = max(tokens, default=0)
    if highest >= vocab_size:
        raise bad_value(
            param, f"token id {highest} is outside the vocabulary of {vocab_size} tokens"
        )
