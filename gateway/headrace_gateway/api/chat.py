"""POST /v1/chat/completions."""

from __future__ import annotations

from aiohttp import web

from headrace_gateway.api.caching import marked_caching
from headrace_gateway.api.context import GATEWAY
from headrace_gateway.api.logprobs import prompt_entries, token_entries
from headrace_gateway.api.requests import make_call, read_object
from headrace_gateway.api.schemas import ChatRequest, parse_chat
from headrace_gateway.api.text_replies import Json, TextReply, answer
from headrace_gateway.api.tool_plans import make_plan
from headrace_gateway.api.tool_replies import chunk_delta, finish_reason, whole_calls
from headrace_gateway.api.turn import Turn
from headrace_gateway.api.wishes import make_wish
from headrace_gateway.choices import Piece
from headrace_gateway.tools.events import CallBegins


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a chat, streamed or whole."""
    async with Turn(request.app[GATEWAY], make_call(request, "chat"), "chatcmpl-") as turn:
        parsed = parse_chat(await read_object(request))
        (messages, marks), offer = parsed.conversation(), parsed.offer()
        turn.begin(parsed)
        tools = await make_plan(turn.gateway, turn.record, offer)
        prompt = await turn.encode_chat(messages, tools)
        caching = await marked_caching(turn, parsed.caching, marks, messages, tools, prompt)
        wish = await make_wish(
            turn.gateway, turn.record, parsed, [prompt], tools=tools, caching=caching
        )
        return await answer(request, turn, parsed, wish, lambda: ChatReply(turn, parsed))


class ChatReply(TextReply):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, turn: Turn, parsed: ChatRequest) -> None:
        self._with_logprobs = bool(parsed.logprobs)
        super().__init__(turn, with_usage=parsed.wants_usage, varied=self._with_logprobs)
        self._prompt_logprobs = parsed.prompt_logprobs
        self._with_tools = bool(parsed.tools)
        self._calling: set[int] = set()

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
        calls = whole_calls(piece)
        message: Json = {
            "role": "assistant",
            "content": None if calls and not piece.text else piece.text,
            "refusal": None,
            "annotations": [],
        }
        if calls:
            message["tool_calls"] = calls
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": finish_reason(piece.finish, calling=bool(calls)),
        }

    def chunks(self, piece: Piece) -> list[Json]:
        """A chunk for each event; the delivery's logprobs come with the first of them."""
        index, logprobs = piece.index, self._logprobs(piece)
        deltas = [delta for event in piece.events if (delta := chunk_delta(event))]
        if piece.logprobs and not deltas:
            deltas.append({"content": ""})
        made = [
            self._delta(index, delta, None if at else logprobs) for at, delta in enumerate(deltas)
        ]
        if any(isinstance(event, CallBegins) for event in piece.events):
            self._calling.add(index)
        if piece.finish is not None:
            reason = finish_reason(piece.finish, calling=index in self._calling)
            made.append(self._delta(index, {}, None, reason))
        return [self._chunk([choice]) for choice in made]

    def text_chunk(self, index: int, text: str) -> Json:
        return self._chunk([self._delta(index, {"content": text})])

    def opening(self) -> list[Json]:
        # a message that only calls has no content at all, and it is too early to know
        content = None if self._with_tools else ""
        delta = {"role": "assistant", "content": content, "refusal": None}
        choices = range(self._turn.choice_count)
        return [self._chunk([self._delta(index, delta)]) for index in choices]

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"content": token_entries(self._turn.tokenizer, piece.logprobs), "refusal": None}

    def _delta(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None = None,
        finish: str | None = None,
    ) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
