"""POST /v1/completions."""

from __future__ import annotations

from array import array
from dataclasses import replace

from aiohttp import web

from headrace.errors import CallerError
from headrace.types import TokenLogprobs, pack_tokens
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.logprobs import completion_logprobs, prompt_entries, text_offsets
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.schemas import CompletionRequest, parse_completion
from headrace_gateway.api.text_replies import Json, TextReply, answer
from headrace_gateway.api.turn import Turn
from headrace_gateway.api.wishes import make_wish
from headrace_gateway.choices import Piece


async def completions(request: web.Request) -> web.StreamResponse:
    """Continues one or more prompts, streamed or whole."""
    call = make_call(request, "text_completion")
    async with Turn(request.app[GATEWAY], call, "cmpl-") as turn:
        parsed = parse_completion(await read_object(request))
        turn.begin(parsed)
        prompts = await _encode_prompts(turn, parsed)
        # OpenAI tells the end's logprobs here, and evaluation harnesses count on a token for each
        wish = await make_wish(
            turn.gateway, turn.record, parsed, prompts, score_end=True, caching=parsed.caching
        )
        return await answer(request, turn, parsed, wish, lambda: CompletionReply(turn, parsed))


async def _encode_prompts(turn: Turn, parsed: CompletionRequest) -> list[array[int]]:
    prompts, limit = parsed.prompts, turn.gateway.settings.prompts_max
    if len(prompts) > limit:
        raise CallerError(
            f"prompt: {len(prompts)} prompts exceed {limit} in one request",
            param="prompt",
            code="too_many_prompts",
        )
    return [
        await turn.encode(prompt, add_bos=True) if isinstance(prompt, str) else pack_tokens(prompt)
        for prompt in prompts
    ]


class CompletionReply(TextReply):
    """`echo` puts the prompt before each choice's text and before its logprobs."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, turn: Turn, parsed: CompletionRequest) -> None:
        varied = parsed.logprobs is not None or bool(parsed.echo)
        super().__init__(turn, with_usage=parsed.wants_usage, varied=varied)
        self._parsed = parsed
        self._jobs_a_prompt, _ = parsed.jobs_a_prompt
        self._echoes = [self._echo(at) for at in range(len(turn.prompts))] if parsed.echo else []
        self._begun: set[int] = set()

    def whole(self, pieces: list[Piece]) -> Json:
        if self._parsed.chooses:
            pieces = self._best(pieces)
        made = super().whole(pieces)
        for index, choice in enumerate(made["choices"]):
            choice["index"] = index
        return made

    def whole_choice(self, piece: Piece) -> Json:
        made = self._choice(piece, first=True)
        if self._parsed.prompt_logprobs is not None:
            turn = self._turn
            made["prompt_logprobs"] = prompt_entries(
                turn.tokenizer,
                turn.prompts[piece.index // self._jobs_a_prompt],
                turn.choices[piece.index].prompt_logprobs,
                self._parsed.prompt_logprobs,
            )
        return made

    def chunks(self, piece: Piece) -> list[Json]:
        """The echo before everything else; text and the end of a choice in chunks of their own."""
        said = replace(piece, finish=None)
        silent = replace(piece, events=(), logprobs=())
        made: list[Json] = []
        if self._echoes and piece.index not in self._begun:
            self._begun.add(piece.index)
            made.append(self._choice(replace(silent, finish=None), first=True))
        if piece.text or piece.logprobs:
            made.append(self._choice(said, first=False))
        if piece.finish is not None:
            made.append(self._choice(silent, first=False))
        return [self._chunk([choice]) for choice in made]

    def text_chunk(self, index: int, text: str) -> Json:
        return self._chunk(
            [{"index": index, "text": text, "logprobs": None, "finish_reason": None}]
        )

    def _choice(self, piece: Piece, *, first: bool) -> Json:
        """A choice or a part of one; the `first` begins with the prompt where that is echoed."""
        echo = self._echoes[piece.index // self._jobs_a_prompt] if self._echoes else ""
        return {
            "index": piece.index,
            "text": echo + piece.text if first else piece.text,
            "logprobs": self._logprobs(piece, echo, first=first),
            "finish_reason": piece.finish,
        }

    def _logprobs(self, piece: Piece, echo: str, *, first: bool) -> Json | None:
        if self._parsed.logprobs is None or (piece.finish and not first):
            return None
        prompt = self._scored_prompt(piece.index, echo) if first and self._echoes else []
        return completion_logprobs(self._turn.tokenizer, prompt, piece.logprobs, len(echo))

    def _scored_prompt(self, index: int, echo: str) -> list[tuple[int, int, TokenLogprobs | None]]:
        turn = self._turn
        prompt = turn.prompts[index // self._jobs_a_prompt]
        offsets = text_offsets(turn.tokenizer, echo, prompt)
        # a larger `prompt_logprobs` beside them may have brought more than were asked for here
        found = [
            replace(each, top=each.top[: self._parsed.logprobs])
            for each in turn.choices[index].prompt_logprobs
        ]
        return list(zip(prompt, offsets, (None, *found), strict=True))

    def _echo(self, at: int) -> str:
        prompt = self._parsed.prompts[at]
        if isinstance(prompt, str):
            return prompt
        return self._turn.tokenizer.decode(prompt)

    def _best(self, pieces: list[Piece]) -> list[Piece]:
        """The `n` most probable of each prompt's choices, by the mean over their tokens.

        One that its deadline left without any is the last.
        """
        best: list[Piece] = []
        for at in range(0, len(pieces), self._jobs_a_prompt):
            ranked = sorted(
                pieces[at : at + self._jobs_a_prompt],
                key=lambda piece: (
                    not piece.tokens,
                    -self._turn.choices[piece.index].mean_logprob,
                ),
            )
            best += ranked[: self._parsed.n or 1]
        return best
