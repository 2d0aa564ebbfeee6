"""One job's live output inside the gateway that streams it.

Invariant: the reader task only appends, the one consumer only moves its own cursor; what a slow
client leaves unread is bounded by the job's `max_tokens` token ids, so the reader never waits for
anybody. News of the queue is one value that newer news replaces, and tokens go before it: telling
places costs a token nothing.
A consumer that waits may have left a taker, to whom the reader gives plain tokens as they come:
where a client can take its next event at once, no task has to be woken to write it. The taker says
no where it cannot, and the consumer is woken as ever; what it takes counts as read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from headrace.errors import DependencyError, HeadraceError, JobFailedError
from headrace.policy.reply_log import ReplyLog
from headrace.types import Delta, Finish, FinishReason, Job, TokenLogprobs, pack_tokens
from headrace.wire import Plain, as_delta

logger = structlog.get_logger()

Taker = Callable[[tuple[int, ...], int, int], bool]
"""Takes new tokens, with the counts of cached and of written ones as in Chunk, or says that it does
not now; it never waits."""

PLACE_EVERY_MS = 500
"""No client is told its place more often."""
START_MOVED_MS = 500
"""A predicted start that moved less is no news."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands in the queue, as known here at `at_ms` (this process's monotonic clock).

    `place` counts from 1; 0: it has left the queue for a worker. `start_ms` is the predicted start
    in wall-clock ms, 0 where nothing can be predicted.
    """

    place: int
    start_ms: int
    at_ms: int

    def is_news_after(self, told: Standing) -> bool:
        """Whether a client that knows `told` has something to learn."""
        moved_ms = abs(self.start_ms - told.start_ms)
        return self.place != told.place or moved_ms >= START_MOVED_MS


@dataclass(frozen=True, slots=True)
class Chunk:
    """New output tokens, and the finish once the job has ended.

    `cached_tokens`: prompt tokens that came from a cache; `cache_write_tokens`: those written into
    one. `logprobs`: one for each of `tokens` where the job asked for them, else none.
    `prompt_logprobs` as in Delta, with the first chunk.
    A chunk with a `standing` tells of the queue and holds nothing else; none comes after tokens.
    """

    tokens: tuple[int, ...]
    finish: Finish | None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    standing: Standing | None = None
    cache_write_tokens: int = 0


class Generation:
    """What a request handler holds of a job. `accepted_id` is its entry in the intake stream.

    Tokens that the job has from the start (`Job.logged`) count as read.
    """

    def __init__(self, job: Job, drop: Callable[[Generation], Awaitable[None]]) -> None:
        self.job = job
        self.accepted_id = ""
        self._drop = drop
        self._log = ReplyLog(job.attempt, job.logged)
        self._cursor = len(job.logged)
        self._fresh: tuple[int, ...] = ()
        """Accepted, and nobody has been told of it yet."""
        self._failure: HeadraceError | None = None
        self._news: asyncio.Future[None] | None = None
        """What the one consumer waits for while it does."""
        self._taker: Taker | None = None
        self._told: Standing | None = None
        self._untold: Standing | None = None

    @property
    def ended(self) -> bool:
        return self._log.finish is not None or self._failure is not None

    @property
    def unread_tokens(self) -> int:
        return len(self._log.tokens) - self._cursor

    @property
    def attempt(self) -> int:
        return self._log.attempt

    @property
    def waits(self) -> bool:
        """Whether this job may still be in the queue, for all that is known here."""
        left = self._told is not None and self._told.place == 0
        return not left and not self._log.tokens and not self.ended

    def note_place(self, standing: Standing) -> None:
        """Take what the dispatcher says of this job; it is told as far as it is news."""
        told = self._told
        if not self.waits:
            return
        if told is not None and standing.place:
            too_soon = standing.at_ms - told.at_ms < PLACE_EVERY_MS
            if too_soon or not standing.is_news_after(told):
                return
        self._told = self._untold = standing
        self._ring()

    def offer(self, delta: Delta) -> None:
        """Take what the reply stream says; called by the reader task only."""
        self.note(delta)
        self.tell()

    def note(self, row: Delta | Plain) -> None:
        """As `offer`, for a reader that has more and says with `tell` that this was all."""
        if self.ended:
            return
        if isinstance(row, tuple):
            _, attempt, first, tokens, cached = row
            if self._log.extend(attempt, first, tokens, cached):
                self._fresh += tokens
                return
            delta = as_delta(row)
        else:
            delta = row
        if self._log.is_gap(delta):
            self.fail(
                DependencyError(
                    "the token log lost entries; send the request again", code="stream_lost"
                )
            )
            return
        self._fresh += self._log.accept(delta)

    def tell(self) -> None:
        """Hand on what was noted: to the taker if it can have it, else the consumer is woken."""
        fresh, self._fresh = self._fresh, ()
        if self._log.finish is not None or (fresh and not self._give(fresh)):
            self._ring()

    def give_to(self, taker: Taker) -> None:
        """Let `taker` have plain tokens that come while the consumer waits in `next`."""
        self._taker = taker

    def _give(self, fresh: tuple[int, ...]) -> bool:
        """Whether the taker has taken what has just come, which is all that is unread."""
        log, news = self._log, self._news
        if self._taker is None or news is None or news.done() or log.logprobs:
            return False
        if log.prompt_logprobs and not self._cursor:
            return False
        try:
            taken = self._taker(fresh, log.cached_tokens, log.cache_write_tokens)
        except Exception as error:  # one client's trouble must not end the reader of all streams
            logger.error("tokens could not be told", job=self.job.id, exc_info=error)
            self.fail(HeadraceError("an unexpected error of this gateway", code="internal_error"))
            return True
        if taken:
            self._cursor = len(log.tokens)
        return taken

    def next_attempt(self) -> Job:
        """The job as it has to be accepted again when Redis has lost it.

        It continues after what has arrived here; from now on nothing counts that an earlier
        attempt still writes.
        """
        self._log.attempt += 1
        return replace(self.job, attempt=self._log.attempt, logged=pack_tokens(self._log.tokens))

    def fail(self, error: HeadraceError) -> None:
        """End with `error`; the tokens received so far are still handed out first."""
        if not self.ended:
            self._failure = error
            self._ring()

    async def next(self) -> Chunk:
        """The tokens since the last call, or news of the queue while there are none.

        Waits until there is something to say.

        Raises JobFailedError when the job ended in an error, DependencyError when the log was lost.
        """
        while True:
            finish = self._log.finish
            failed = finish is not None and finish.reason is FinishReason.ERROR
            chunk = self._unread(None if failed else finish)
            if chunk.finish is not None or chunk.tokens:
                return chunk
            if finish is not None:
                raise JobFailedError(finish.error or "the worker could not run this job")
            if self._failure is not None:
                raise self._failure
            if self._untold is not None:
                standing, self._untold = self._untold, None
                return Chunk((), None, standing=standing)
            assert self._news is None, "one consumer reads a generation"
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None

    def _ring(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _unread(self, finish: Finish | None) -> Chunk:
        """What has come since the last call, with `finish`; from now on it counts as read."""
        log, first = self._log, self._cursor
        self._cursor = len(log.tokens)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if log.logprobs:
            here = range(first, self._cursor)
            logprobs = tuple(log.logprobs.pop(at) for at in here if at in log.logprobs)
        return Chunk(
            tuple(log.tokens[first:]),
            finish,
            log.cached_tokens,
            logprobs,
            () if first else log.prompt_logprobs,
            cache_write_tokens=log.cache_write_tokens,
        )

    async def cancel(self) -> None:
        """Stop the job wherever it is; harmless when it has ended. Never raises."""
        if not self.ended:
            await self._drop(self)
