"""POST /v1/chat/completions and POST /v1/completions.

Invariant: an error before the fleet has accepted is an HTTP status; after that a stream has begun
and carries the error as an event.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from headrace.errors import CallerError
from headrace.types import pack_tokens
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.errors import as_headrace_error
from headrace_gateway.api.replies import ChatReply, CompletionReply, TextReply
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.schemas import (
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    ChatRequest,
    Choices,
    CompletionRequest,
    refuse_tool_calls,
    refuse_unsupported,
    validate,
)
from headrace_gateway.api.sse import EventStream
from headrace_gateway.api.turn import ClientGoneError, Turn, Wish
from headrace_gateway.choices import Piece

COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` of the completions endpoint; chat defaults to what fits."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a chat, streamed or whole."""
    async with Turn(request.app[GATEWAY], make_call(request, "chat"), "chatcmpl-") as turn:
        parsed = parse_chat(await read_object(request))
        turn.begin(parsed)
        prompt = await turn.encode_chat([message.for_template() for message in parsed.messages])
        asked, asked_param = parsed.asked_tokens
        wish = Wish([prompt], parsed.n or 1, parsed.stops, asked, asked_param)
        await turn.submit(parsed, wish)
        return await _reply(request, turn, parsed, ChatReply(turn, with_usage=parsed.wants_usage))


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
        return await _reply(request, turn, parsed, reply)


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """`body` as a ChatRequest. Raises CallerError naming the field."""
    refuse_unsupported(body, NEUTRAL_CHAT)
    refuse_tool_calls(body)
    return validate(ChatRequest, body)


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


async def _reply(
    request: web.Request, turn: Turn, parsed: Choices, reply: TextReply
) -> web.StreamResponse:
    if parsed.stream:
        return await _stream(request, turn, reply)
    return web.json_response(reply.whole(await turn.collect()))


async def _stream(request: web.Request, turn: Turn, reply: TextReply) -> web.StreamResponse:
    async with EventStream(request) as events:

        async def send(piece: Piece) -> None:
            for chunk in reply.chunks(piece):
                await events.send(chunk)

        try:
            for chunk in reply.opening():
                await events.send(chunk)
            await turn.run(send)
            for chunk in reply.closing():
                await events.send(chunk)
        except ClientGoneError:
            raise
        except Exception as error:  # headers are out: the stream itself has to say it
            turn.note_error(error)
            await events.send(as_headrace_error(error, request.path).body())
        await events.done()
    return events.response
