"""One choice of a request: its generation's tokens, as text that stops where it should.

Invariant: `completion_tokens` counts every token of the generation up to its end or up to the one
that completed a stop string, or the last call that is wanted, whatever text they made; after that
the generation is cancelled and nothing more is taken from it. Stop strings count wherever they
stand, also within a call. A token's logprobs come with the text that the token completes: what
is held back for an unfinished character or a possible stop string holds them back too, and those
of tokens that made up nothing but a stop string that was cut off never come. So the logprobs of a
stream do not depend on how it was cut into pieces.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

from headrace.errors import JobFailedError
from headrace.types import Finish, FinishReason, TokenLogprobs
from headrace_gateway.generation import Chunk, Standing, Taker
from headrace_gateway.tokens import Detokenizer, StopChecker
from headrace_gateway.tools.events import Event, Text
from headrace_gateway.tools.events import joined as joined_events


class TokenSource(Protocol):
    async def next(self) -> Chunk: ...

    async def cancel(self) -> None: ...

    # one that gives plain tokens away as they come has `give_to(taker)`, as Generation does


class Outlet(Protocol):
    """Where text can be told at once."""

    def ready(self) -> bool:
        """Whether what is told now is written without waiting, behind all that was told before."""
        ...

    def tell(self, index: int, text: str) -> None:
        """`text` of choice `index`, never empty."""
        ...


class Speller(Protocol):
    """What a choice needs of its model's tokenizer."""

    def detokenizer(self) -> Detokenizer: ...

    def bytes_of(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TextRules:
    """Where a choice's text ends.

    `stops` end it and are cut off, unless `keep_stop`; one that is complete before `min_tokens`
    tokens does not count. `silent` are token ids that end the text without being part of it (the
    model's EOS); `score_end` says whether their logprobs are told nevertheless.
    """

    stops: tuple[str, ...] = ()
    keep_stop: bool = False
    min_tokens: int = 0
    silent: frozenset[int] = frozenset()
    score_end: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """A token of the output; `offset` is where its text begins in the choice's text."""

    token: int
    offset: int
    logprobs: TokenLogprobs


class Reader(Protocol):
    """Makes of a choice's text what its client gets of it; one object a choice.

    `ended`: nothing more is wanted, and nothing more will come out.
    """

    @property
    def ended(self) -> bool: ...

    def push(self, text: str) -> list[Event]:
        """What `text` adds; a reader may hold back what it does not understand yet."""
        ...

    def finish(self) -> list[Event]:
        """What is left when the text has ended."""
        ...


class PlainText:
    """The Reader for text that is nothing but text."""

    ended = False

    def push(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


_WHOLE = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE)
"""Ends that leave the text which there is an answer; whether one of DEADLINE is, its turn says."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delivery added to choice `index`.

    `finish` comes with the last one: STOP, LENGTH or DEADLINE. A piece with a `standing` tells of
    the queue and holds nothing else; none comes after tokens.
    """

    index: int
    events: tuple[Event, ...]
    tokens: int
    finish: FinishReason | None
    logprobs: tuple[Scored, ...] = ()
    standing: Standing | None = None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))


def joined(pieces: Sequence[Piece]) -> Piece:
    """All of a choice's pieces as one."""
    last = pieces[-1]
    return Piece(
        last.index,
        tuple(joined_events(event for piece in pieces for event in piece.events)),
        sum(piece.tokens for piece in pieces),
        last.finish,
        tuple(scored for piece in pieces for scored in piece.logprobs),
    )


class Choice:
    """`prompt_logprobs` (as in Delta) are there from the first piece on, where they were asked.

    `reason` says in words why it ended, where the fleet had something to say about that.
    """

    def __init__(
        self, index: int, source: TokenSource, speller: Speller, rules: TextRules, reader: Reader
    ) -> None:
        self.index = index
        self.finish: FinishReason | None = None
        self.reason = ""
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.cache_write_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.logprob_sum = 0.0
        self._source = source
        self._detokenizer = speller.detokenizer()
        self._text = _StoppedText(rules)
        self._scores = _Scores(speller.bytes_of)
        self._rules = rules
        self._reader = reader
        self._plain = not rules.stops and isinstance(reader, PlainText)
        """Whether all that the detokenizer gives is shown, as it is."""

    @property
    def mean_logprob(self) -> float:
        """Of all tokens that count; 0 while there are none or they came without."""
        return self.logprob_sum / max(1, self.completion_tokens)

    async def next(self) -> Piece:
        """The next delivery; it says nothing while a character or a stop string is unfinished.

        Raises JobFailedError, DependencyError.
        """
        assert self.finish is None, "a finished choice has nothing more to say"
        chunk = await self._source.next()
        if chunk.standing is not None:
            return Piece(self.index, (), 0, None, standing=chunk.standing)
        before = self.completion_tokens
        events = self._take(chunk)
        self.cached_tokens = chunk.cached_tokens
        self.cache_write_tokens = max(self.cache_write_tokens, chunk.cache_write_tokens)
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        if self._ended:
            self.finish = FinishReason.STOP
            await self._source.cancel()
        elif chunk.finish is not None:
            events += self._end(chunk.finish)
        if self._plain and self.finish is None and not chunk.logprobs:
            return Piece(self.index, tuple(events), self.completion_tokens - before, None)
        scores = self._scores.take(self._text.shown)
        if self.finish is not None:
            events += self._reader.finish()
            scores += self._scores.rest(self._text.shown, cut=self._text.ended)
        said, tokens = tuple(joined_events(events)), self.completion_tokens - before
        return Piece(self.index, said, tokens, self.finish, tuple(scores))

    def flow_to(self, outlet: Outlet, told: Callable[[int, int], None]) -> None:
        """Let plain text go to `outlet` as it comes while `next` waits, and then say so to `told`.

        That hears the index and of how many tokens the text was. What needs more than a look at a
        text (stop strings, calls, logprobs, ends) comes by `next` alone.
        """
        # a look at the protocol would cost more than a token
        give_to: Callable[[Taker], None] | None = getattr(self._source, "give_to", None)
        index = self.index
        if not self._plain or give_to is None:
            return

        def take(tokens: tuple[int, ...], cached: int, written: int) -> bool:
            if not outlet.ready():
                return False
            text = self._text_of(tokens)
            self.cached_tokens = cached
            if written > self.cache_write_tokens:
                self.cache_write_tokens = written
            if text:
                outlet.tell(index, text)
            told(index, len(tokens))
            return True

        give_to(take)

    async def cancel(self) -> None:
        """Give up what still runs; harmless after the end."""
        if self.finish is None:
            self.finish = FinishReason.CANCELLED
            await self._source.cancel()

    @property
    def _ended(self) -> bool:
        """Nothing more is wanted of the generation, whether or not it has ended itself."""
        return self._text.ended or self._reader.ended

    def _take(self, chunk: Chunk) -> list[Event]:
        if self._plain and not chunk.logprobs:
            return self._take_plain(chunk.tokens)
        events: list[Event] = []
        for token, logprobs in zip(chunk.tokens, chunk.logprobs or repeat(None), strict=False):
            self.completion_tokens += 1
            silent = token in self._rules.silent
            text = "" if silent else self._detokenizer.push(token)
            if logprobs is not None:
                self.logprob_sum += logprobs.logprob
                if not silent or self._rules.score_end:
                    self._scores.push(token, logprobs, text)
            events += self._reader.push(self._text.push(text, self.completion_tokens))
            if self._ended:
                break
        return events

    def _take_plain(self, tokens: tuple[int, ...]) -> list[Event]:
        """As `_take`, where nothing in the text can end it and nobody asks for logprobs."""
        shown = self._text_of(tokens)
        return [Text(shown)] if shown else []

    def _text_of(self, tokens: tuple[int, ...]) -> str:
        push, silent = self._detokenizer.push, self._rules.silent
        if len(tokens) == 1:  # as nearly always
            text = "" if tokens[0] in silent else push(tokens[0])
        else:
            text = "".join([push(token) for token in tokens if token not in silent])
        self.completion_tokens += len(tokens)
        self._text.shown += len(text)  # there are no stop strings to look for
        return text

    def _end(self, finish: Finish) -> list[Event]:
        self.reason = finish.error
        if finish.reason not in _WHOLE:
            raise JobFailedError(
                finish.error or f"the generation ended early: {finish.reason}", code="cancelled"
            )
        tail = self._text.push(self._detokenizer.flush(), self.completion_tokens)
        self.finish = FinishReason.STOP if self._text.ended else finish.reason
        return self._reader.push(tail + self._text.flush())


class _StoppedText:
    """A choice's text up to its stop string. `shown` counts the characters handed out."""

    def __init__(self, rules: TextRules) -> None:
        self._rules = rules
        self._stops = StopChecker(rules.stops)
        self._held = ""
        self.shown = 0

    @property
    def ended(self) -> bool:
        return self._stops.hit

    def push(self, text: str, tokens: int) -> str:
        """What can be shown now that `tokens` tokens have made `text` follow."""
        if not self._rules.stops:
            self.shown += len(text)
            return text
        self._held += text
        shown = self._stops.push(text)
        if self._stops.hit and tokens < self._rules.min_tokens:
            shown += self._forgive(len(shown))
        elif self._stops.hit and self._rules.keep_stop:
            shown += self._stop_at(len(shown))
        self._held = self._held[len(shown) :]
        self.shown += len(shown)
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held = self._stops.flush()
        self.shown += len(held)
        return held

    def _forgive(self, at: int) -> str:
        """Go on behind the first character of a stop string that came too early."""
        shown = ""
        while self._stops.hit:
            self._stops = StopChecker(self._rules.stops)
            shown += self._held[at + len(shown)]
            shown += self._stops.push(self._held[at + len(shown) :])
        return shown

    def _stop_at(self, at: int) -> str:
        # of those that stand here the shortest was complete first
        return min((stop for stop in self._rules.stops if self._held.startswith(stop, at)), key=len)


class _Scores:
    """Logprobs that wait for the text of their tokens to be shown.

    A token is `open` until the characters that it has begun are whole; then it waits with the
    length of the text that it completes. `made` counts the characters detokenized so far.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8: codecs.IncrementalDecoder | None = None
        self._open: list[Scored] = []
        self._whole: deque[tuple[int, Scored]] = deque()
        self._made = 0

    def push(self, token: int, logprobs: TokenLogprobs, text: str) -> None:
        """`text` is what came out of the detokenizer when `token` went in."""
        if self._utf8 is None:  # most choices have no logprobs
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        own = self._utf8.decode(self._bytes_of(token))
        # a detokenizer may give earlier tokens' text together with this one's
        behind = len(text) - len(own) if own and text.endswith(own) else 0
        self._open.append(Scored(token, self._made + behind, logprobs))
        self._made += len(text)
        unfinished, _ = self._utf8.getstate()
        if text and not unfinished:
            self._whole.extend((self._made, scored) for scored in self._open)
            self._open.clear()

    def take(self, shown: int) -> list[Scored]:
        """Those whose text is among the first `shown` characters."""
        taken: list[Scored] = []
        while self._whole and self._whole[0][0] <= shown:
            taken.append(self._whole.popleft()[1])
        return taken

    def rest(self, shown: int, *, cut: bool) -> list[Scored]:
        """At the end what is left; where the text was `cut`, only what begins before its end."""
        left = [*(scored for _, scored in self._whole), *self._open]
        return [scored for scored in left if scored.offset < shown] if cut else left
