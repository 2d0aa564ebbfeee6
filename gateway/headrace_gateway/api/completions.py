"""POST /v1/completions."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from headrace.errors import CallerError
from headrace.types import FinishReason, pack_tokens
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.schemas import (
    NEUTRAL_COMPLETION,
    CompletionRequest,
    refuse_unsupported,
    validate,
)
from headrace_gateway.api.text_replies import Json, TextReply, reply_to
from headrace_gateway.api.turn import Turn, Wish

COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` of the completions endpoint; chat defaults to what fits."""


async def completions(request: web.Request) -> web.StreamResponse:
    """Continues one or more prompts, streamed or whole."""
    call = make_call(request, "text_completion")
    async with Turn(request.app[GATEWAY], call, "cmpl-") as turn:
        parsed = parse_completion(await read_object(request))
        turn.begin(parsed)
        wish = Wish(
            await _encode_prompts(turn, parsed),
            parsed.n or 1,
            parsed.stops,
            parsed.max_tokens,
            prompt_param="prompt",
            default_tokens=COMPLETION_TOKENS,
        )
        await turn.submit(parsed, wish)
        reply = CompletionReply(turn, with_usage=parsed.wants_usage)
        return await reply_to(request, turn, parsed, reply)


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """`body` as a CompletionRequest. Raises CallerError naming the field."""
    refuse_unsupported(body, NEUTRAL_COMPLETION)
    return validate(CompletionRequest, body)


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
    object_name = "text_completion"
    chunk_name = "text_completion"

    def whole_choice(self, index: int, text: str, finish: FinishReason | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    chunk_choice = whole_choice
