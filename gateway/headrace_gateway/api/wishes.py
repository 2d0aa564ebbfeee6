"""From a checked request to what the fleet shall do, held against the model that will do it.

Invariant: a job made from a Wish is one that a worker takes: its token ids are in the vocabulary,
its tokens fit the context, its grammar compiles, and what it reports stays within the limits of a
reply stream. So nothing that can be known here fails later, when a stream has begun.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.errors import CallerError
from headrace.types import NO_LOGPROBS, ModelRecord, Sampling
from headrace_gateway.api.caching import AS_USUAL, OPTIONS_PARAM, Caching
from headrace_gateway.api.context import Gateway
from headrace_gateway.api.formats import checked_grammar
from headrace_gateway.api.sampling_fields import INT64_MAX, INT64_MIN
from headrace_gateway.api.schemas import Common
from headrace_gateway.api.tool_plans import ToolPlan
from headrace_gateway.api.validation import bad_value
from headrace_gateway.choices import PlainText, Reader, Speller, TextRules
from headrace_gateway.tokens import ModelTokenizer, output_room

BAD_WORD_TOKENS_MAX = 1_024
PROMPT_LOGPROBS_MAX = 2**19
"""Numbers that one job may report of its prompt (12 bytes each, in one entry of a reply stream)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What to generate: each of `prompts` `n` times.

    `rooms` are the output tokens at most for each prompt. `sampling` is what all jobs share; its
    `max_tokens` and `seed` are settled job by job, from the room and from `seed` and the job's
    index. `tools` says what the choices may call, `caching` what the cache does with the prompts.
    """

    prompts: Sequence[array[int]]
    rooms: Sequence[int]
    sampling: Sampling
    rules: TextRules
    n: int = 1
    seed: int | None = None
    tools: ToolPlan | None = None
    caching: Caching = AS_USUAL

    def reader(self) -> Reader:
        """A new one for each choice."""
        return PlainText() if self.tools is None else self.tools.reader()

    def speller(self, tokenizer: ModelTokenizer) -> Speller:
        return tokenizer if self.tools is None else self.tools.speller(tokenizer)


async def make_wish(
    gateway: Gateway,
    record: ModelRecord,
    request: Common,
    prompts: Sequence[array[int]],
    *,
    tools: ToolPlan | None = None,
    score_end: bool = False,
    caching: Caching = AS_USUAL,
) -> Wish:
    """The Wish of `request` for `prompts`. `score_end` as in TextRules.

    Raises CallerError naming the field.
    """
    n, n_param = request.jobs_a_prompt
    if len(prompts) * n > gateway.settings.jobs_max:
        raise CallerError(
            f"{len(prompts)} prompts times {n_param}={n} exceed {gateway.settings.jobs_max} "
            "choices a request",
            param=n_param,
            code="too_many_choices",
        )
    rooms = [_room(prompt, request, record) for prompt in prompts]
    if caching.prewarm:
        return _prewarming(request, record, prompts, caching)
    tokenizer = await gateway.tokenizers.get(record)
    prompt_logprobs, logprobs_param = request.prompt_alternatives
    wanted = request.format()
    form = tools.hold(wanted) if tools else wanted
    bad_words, alternatives = request.bad_words, request.alternatives
    sampling = request.sampling(record.vocab_size)
    if bad_words or form or alternatives != NO_LOGPROBS or prompt_logprobs != NO_LOGPROBS:
        sampling = replace(
            sampling,
            bad_words=await _bad_words(tokenizer, bad_words or []),
            logprobs=alternatives,
            prompt_logprobs=prompt_logprobs,
            grammar=await checked_grammar(gateway, record, form),
        )
    _check_sizes(prompts, rooms, sampling, logprobs_param)
    rules = TextRules(
        stops=request.stops,
        keep_stop=bool(request.include_stop_str_in_output),
        min_tokens=sampling.min_tokens,
        silent=frozenset() if sampling.ignore_eos else frozenset(record.eos_token_ids),
        score_end=score_end,
    )
    return Wish(prompts, rooms, sampling, rules, n, request.seed, tools, caching)


def _prewarming(
    request: Common, record: ModelRecord, prompts: Sequence[array[int]], caching: Caching
) -> Wish:
    """The Wish that computes prompts and nothing else.

    A worker samples a token when it has computed a prompt: one is asked for, and never told.
    """
    told = max(request.alternatives, request.prompt_alternatives[0])
    if request.jobs_a_prompt[0] != 1 or told != NO_LOGPROBS:
        raise bad_value(OPTIONS_PARAM, "prewarming has no choices and no logprobs to tell")
    for prompt in prompts:
        output_room(len(prompt), 1, record.context_tokens, request.prompt_param)
    sampling = Sampling(max_tokens=1, temperature=0.0)
    return Wish(prompts, [1] * len(prompts), sampling, TextRules(), caching=caching)


def _room(prompt: array[int], request: Common, record: ModelRecord) -> int:
    """Output tokens at most after `prompt`."""
    if not prompt:
        raise CallerError(
            "the prompt has no tokens", param=request.prompt_param, code="invalid_value"
        )
    if max(prompt) >= record.vocab_size:
        raise CallerError(
            f"token id {max(prompt)} is outside the vocabulary of {record.vocab_size}",
            param=request.prompt_param,
            code="invalid_value",
        )
    asked, asked_param = request.asked_tokens
    if asked == 0 and len(prompt) <= record.context_tokens:
        return 0
    param = request.prompt_param if asked is None else asked_param
    room = output_room(len(prompt), asked, record.context_tokens, param)
    if asked is None and request.default_tokens is not None:
        return min(room, request.default_tokens)
    return room


async def _bad_words(tokenizer: ModelTokenizer, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as the model writes it at the start of a text and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for at, word in enumerate(words):
        for text in (word, " " + word.lstrip()):
            tokens = tuple(await tokenizer.encode(text, add_bos=False))
            if not 0 < len(tokens) <= BAD_WORD_TOKENS_MAX:
                raise bad_value(f"bad_words[{at}]", f"it makes {len(tokens)} tokens")
            found[tokens] = None
    return tuple(found)


def _check_sizes(
    prompts: Sequence[array[int]], rooms: Sequence[int], sampling: Sampling, param: str
) -> None:
    room = min(rooms)
    if sampling.min_tokens > room:
        raise bad_value(
            "min_tokens", f"{sampling.min_tokens} exceeds the {room} tokens of the output"
        )
    numbers = max(map(len, prompts)) * (sampling.prompt_logprobs + 1)
    if numbers > PROMPT_LOGPROBS_MAX:
        raise bad_value(param, f"{numbers} logprobs of one prompt exceed {PROMPT_LOGPROBS_MAX}")


def job_sampling(wish: Wish, prompt: int, index: int, seed: int) -> Sampling:
    """The Sampling of the request's job `index`, which continues prompt number `prompt`."""
    return wish.sampling.of_job(wish.rooms[prompt], _wrap_int64(seed + index))


def _wrap_int64(value: int) -> int:
    return (value - INT64_MIN) % (INT64_MAX - INT64_MIN + 1) + INT64_MIN
