"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from headrace.types import FinishReason
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.schemas import (
    NEUTRAL_CHAT,
    ChatRequest,
    refuse_tool_calls,
    refuse_unsupported,
    validate,
)
from headrace_gateway.api.text_replies import Json, TextReply, reply_to
from headrace_gateway.api.turn import Turn, Wish


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a chat, streamed or whole."""
    async with Turn(request.app[GATEWAY], make_call(request, "chat"), "chatcmpl-") as turn:
        parsed = parse_chat(await read_object(request))
        turn.begin(parsed)
        prompt = await turn.encode_chat([message.for_template() for message in parsed.messages])
        asked, asked_param = parsed.asked_tokens
        wish = Wish([prompt], parsed.n or 1, parsed.stops, asked, asked_param)
        await turn.submit(parsed, wish)
        return await reply_to(request, turn, parsed, ChatReply(turn, with_usage=parsed.wants_usage))


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """`body` as a ChatRequest. Raises CallerError naming the field."""
    refuse_unsupported(body, NEUTRAL_CHAT)
    refuse_tool_calls(body)
    return validate(ChatRequest, body)


class ChatReply(TextReply):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def whole_choice(self, index: int, text: str, finish: FinishReason | None) -> Json:
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": [],
            },
            "logprobs": None,
            "finish_reason": finish,
        }

    def chunk_choice(self, index: int, text: str, finish: FinishReason | None) -> Json:
        delta = {"content": text} if finish is None else {}
        return self._delta(index, delta, finish)

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([self._delta(c.index, delta, None)]) for c in self._turn.choices]

    def _delta(self, index: int, delta: Json, finish: FinishReason | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
