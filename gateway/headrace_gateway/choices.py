"""One choice of a request: its generation's tokens, as text that stops where it should.

Invariant: `completion_tokens` counts every token of the generation up to its end or up to the one
that completed a stop string, whatever text they made; after that the generation is cancelled and
nothing more is taken from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from headrace.errors import JobFailedError
from headrace.types import Finish, FinishReason
from headrace_gateway.generation import Chunk
from headrace_gateway.tokens import Detokenizer, StopChecker


class TokenSource(Protocol):
    async def next(self) -> Chunk: ...

    async def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delivery added to choice `index`; `finish` with the last one (STOP or LENGTH)."""

    index: int
    text: str
    tokens: int
    finish: FinishReason | None


class Choice:
    """`silent` are token ids that end the text without being part of it (the model's EOS)."""

    def __init__(
        self,
        index: int,
        source: TokenSource,
        detokenizer: Detokenizer,
        stops: tuple[str, ...] = (),
        silent: frozenset[int] = frozenset(),
    ) -> None:
        self.index = index
        self.finish: FinishReason | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._source = source
        self._detokenizer = detokenizer
        self._stops = StopChecker(stops)
        self._silent = silent

    async def next(self) -> Piece:
        """The next delivery; its text is '' while a character or a stop string is unfinished.

        Raises JobFailedError, DependencyError.
        """
        assert self.finish is None, "a finished choice has nothing more to say"
        chunk = await self._source.next()
        before = self.completion_tokens
        text = self._take(chunk.tokens)
        self.cached_tokens = chunk.cached_tokens
        if self._stops.hit:
            self.finish = FinishReason.STOP
            await self._source.cancel()
        elif chunk.finish is not None:
            text += self._end(chunk.finish)
        return Piece(self.index, text, self.completion_tokens - before, self.finish)

    async def cancel(self) -> None:
        """Give up what still runs; harmless after the end."""
        if self.finish is None:
            self.finish = FinishReason.CANCELLED
            await self._source.cancel()

    def _take(self, tokens: tuple[int, ...]) -> str:
        shown: list[str] = []
        for token in tokens:
            self.completion_tokens += 1
            if token in self._silent:
                continue
            shown.append(self._stops.push(self._detokenizer.push(token)))
            if self._stops.hit:
                break
        return "".join(shown)

    def _end(self, finish: Finish) -> str:
        if finish.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise JobFailedError(
                finish.error or f"the generation ended early: {finish.reason}", code="cancelled"
            )
        tail = self._stops.push(self._detokenizer.flush())
        self.finish = FinishReason.STOP if self._stops.hit else finish.reason
        return tail + self._stops.flush()
