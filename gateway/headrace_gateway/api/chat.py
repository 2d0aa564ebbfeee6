"""POST /v1/chat/completions."""

from __future__ import annotations

from aiohttp import web

from headrace.types import FinishReason
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.logprobs import prompt_entries, token_entries
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.schemas import ChatRequest, parse_chat
from headrace_gateway.api.text_replies import Json, TextReply, reply_to
from headrace_gateway.api.turn import Turn
from headrace_gateway.api.wishes import make_wish
from headrace_gateway.choices import Piece


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a chat, streamed or whole."""
    async with Turn(request.app[GATEWAY], make_call(request, "chat"), "chatcmpl-") as turn:
        parsed = parse_chat(await read_object(request))
        turn.begin(parsed)
        prompt = await turn.encode_chat([message.for_template() for message in parsed.messages])
        await turn.submit(await make_wish(turn.gateway, turn.record, parsed, [prompt]))
        return await reply_to(request, turn, parsed, ChatReply(turn, parsed))


class ChatReply(TextReply):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, turn: Turn, parsed: ChatRequest) -> None:
        super().__init__(turn, with_usage=parsed.wants_usage)
        self._with_logprobs = bool(parsed.logprobs)
        self._prompt_logprobs = parsed.prompt_logprobs

    def whole(self, pieces: list[Piece]) -> Json:
        made = super().whole(pieces)
        if self._prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_entries(
                self._turn.tokenizer,
                self._turn.prompts[0],
                self._turn.choices[0].prompt_logprobs,
                self._prompt_logprobs,
            )
        return made

    def whole_choice(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "message": {
                "role": "assistant",
                "content": piece.text,
                "refusal": None,
                "annotations": [],
            },
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }

    def chunk_choice(self, piece: Piece) -> Json:
        if piece.finish is not None:
            return self._delta(piece.index, {}, None, piece.finish)
        return self._delta(piece.index, {"content": piece.text}, self._logprobs(piece))

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([self._delta(c.index, delta)]) for c in self._turn.choices]

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"content": token_entries(self._turn.tokenizer, piece.logprobs), "refusal": None}

    def _delta(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None = None,
        finish: FinishReason | None = None,
    ) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
