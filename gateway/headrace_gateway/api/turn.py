"""One turn: from an understood request to its choices' text, with its span and its figures.

Invariant: whatever way a turn ends (done, failed, client gone, shut down), none of its generations
runs on, its span is ended once, and `gateway.turns` no longer holds it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import structlog
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, format_trace_id

from headrace import telemetry
from headrace.errors import DependencyError, HeadraceError, OverloadError
from headrace.types import Band, FinishReason, Job, ModelRecord
from headrace_gateway.api.accounts import Account
from headrace_gateway.api.context import Call, Gateway
from headrace_gateway.api.deadlines import deadline_of
from headrace_gateway.api.schemas import Common, band_of, tier_of
from headrace_gateway.api.sessions import PromptNames, name_prompts, session_of
from headrace_gateway.api.sourcing import Sources
from headrace_gateway.api.tool_plans import ToolPlan
from headrace_gateway.api.waiting import Place, Waiting
from headrace_gateway.api.wishes import Wish, job_sampling
from headrace_gateway.choices import Choice, Outlet, Piece, joined
from headrace_gateway.metrics import Buckets
from headrace_gateway.policy.admission import Ask, ask_of
from headrace_gateway.tokens import ModelTokenizer
from headrace_gateway.tools.conversation import has_calls, prepared

log = structlog.get_logger()

STATUS_OK = 200
STATUS_CLIENT_GONE = 499
STATUS_BUG = 500
STATUS_EXPIRED = 504
CODE_EXPIRED = "deadline_exceeded"

Sink = Callable[[Piece], Awaitable[None]]
Tell = Callable[[Place | None], Awaitable[None]]
"""Takes news of the queue: a place there, None when the turn has left it."""


class ClientGoneError(Exception):
    """The client no longer takes what we send."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole turn; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Turn:
    """`async with Turn(...) as turn:` begin → encode → (make_wish) → submit → run."""

    def __init__(self, gateway: Gateway, call: Call, id_prefix: str) -> None:
        self.id = f"{id_prefix}{os.urandom(16).hex()}"
        self.created_s = gateway.clock.wall_ms() // 1000
        self.gateway = gateway
        self.choices: list[Choice] = []
        self.band = Band.STANDARD
        self.status = STATUS_OK
        self._call = call
        self._account = Account(gateway, call)
        self._arrived_ms = gateway.clock.wall_ms() - (gateway.clock.now_ms() - call.arrived_ms)
        self._ttft_by_ms = self._done_by_ms = 0
        self._priority = 0
        self._may_be_kept = False
        self._session = ""
        self._record: ModelRecord | None = None
        self._prompts: Sequence[array[int]] = ()
        self._n = 1
        self._tokenizer: ModelTokenizer | None = None
        self._last_ms: dict[int, int] = {}
        self._expired: list[Piece] = []
        self._meters: tuple[Buckets, Buckets] | None = None
        self._span = self._open_span() if telemetry.enabled() else INVALID_SPAN
        self._sources = Sources(gateway, call.tenant, self._span)

    def _open_span(self) -> Span:
        call = self._call
        own = {
            "gen_ai.operation.name": call.operation,
            "gen_ai.provider.name": "headrace",
            "gen_ai.response.id": self.id,
            "headrace.tenant": call.tenant.name,
        }
        return telemetry.tracer().start_span(
            call.operation, telemetry.extract(call.trace), SpanKind.SERVER, call.attributes | own
        )

    @property
    def record(self) -> ModelRecord:
        assert self._record is not None, "begin() comes first"
        return self._record

    @property
    def tokenizer(self) -> ModelTokenizer:
        assert self._tokenizer is not None, "submit() comes first"
        return self._tokenizer

    @property
    def prompts(self) -> Sequence[array[int]]:
        """The prompts of the jobs; choice number i continues prompt i // jobs a prompt."""
        return self._prompts

    @property
    def choice_count(self) -> int:
        """How many choices there will be, from `submit` on."""
        return len(self._prompts) * self._n

    @property
    def cached(self) -> bool:
        """Whether all of it is what the same request was answered before."""
        return self._sources.cached

    @property
    def ended(self) -> bool:
        """Whether every choice has come to its end."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def service_tier(self) -> str:
        return tier_of(self.band)

    @property
    def system_fingerprint(self) -> str:
        return f"fp_{self.record.fingerprint[:12]}"

    async def __aenter__(self) -> Turn:
        if telemetry.enabled():
            trace_id = format_trace_id(self._span.get_span_context().trace_id)
            self._call.reply_headers["x-headrace-trace-id"] = trace_id
        self.gateway.turns.add(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self.note_error(error)
            await self.stop()
        finally:
            self.gateway.turns.discard(self)
            usage = self.usage()
            self._account.close(usage.total_tokens, accepted=bool(self.choices))
            self._tell(usage)
            self._span.end()

    def begin(self, request: Common) -> None:
        """Look the model up, settle Band and deadlines, and refuse at once what will be refused.

        Raises NotFoundError, CallerError, OverloadError, DependencyError.
        """
        self.gateway.check_open()
        if self._span is not INVALID_SPAN:
            self._describe(request)
        self._record = self.gateway.fleet.model(request.model)
        self.band = self._call.tenant.grant(band_of(request.service_tier))
        if self._span is not INVALID_SPAN:
            self._span.set_attribute("headrace.band", self.band.label)
        self._priority = request.priority or 0
        self._session = session_of(request.prompt_cache_key, self._call.session)
        deadline = deadline_of(request.deadline_ms, self._call.deadline)
        self._ttft_by_ms, self._done_by_ms = deadline.instants(self._arrived_ms)
        self._account.open(request.model)
        greedy = request.temperature == 0 or request.seed is not None
        self._may_be_kept = self._call.tenant.prompt_entries and greedy
        if self.gateway.fleet.calm(request.model):
            return  # `submit` asks once it is known for how much: nobody is refused before, or few
        now_ms = self.gateway.clock.wall_ms()
        self._check_admission(
            Ask(self.band, now_ms, ttft_by_ms=self._ttft_by_ms, done_by_ms=self._done_by_ms)
        )

    def _describe(self, request: Common) -> None:
        self._span.update_name(f"{self._call.operation} {request.model}")
        self._span.set_attribute("gen_ai.request.model", request.model)
        self._span.set_attribute("gen_ai.request.stream", bool(request.stream))

    def _check_admission(self, ask: Ask) -> None:
        """Raises what the fleet would refuse `ask` with; nothing is sent or taken for it."""
        if self._may_be_kept:
            return  # what was answered before is answered whatever waits; else `submit` refuses
        admission = self.gateway.fleet.admit(self.record.name, ask)
        if not admission.admitted:
            self._span.set_attribute("headrace.admission.reason", admission.reason)
            raise admission.refusal()

    async def encode(self, text: str, *, add_bos: bool) -> array[int]:
        """Token ids of a prompt's text."""
        tokenizer = await self.gateway.tokenizers.get(self.record)
        return await tokenizer.encode(text, add_bos=add_bos)

    async def encode_chat(
        self, messages: list[dict[str, Any]], tools: ToolPlan | None = None
    ) -> array[int]:
        """Token ids of chat messages; the model's template writes its own first token."""
        return await self.encode(self.render(messages, tools), add_bos=False)

    def render(self, messages: list[dict[str, Any]], tools: ToolPlan | None = None) -> str:
        """Chat messages as the prompt's text."""
        offered = None
        if tools is not None or has_calls(messages):
            functions = () if tools is None else tools.offer.functions
            dialect = self.gateway.dialects.of(self.record)
            messages, offered = prepared(messages, functions, dialect)
        return self.gateway.templates.render(self.record, messages, offered)

    async def submit(self, wish: Wish, meanwhile: Callable[[], None] | None = None) -> None:
        """Make the jobs and hand them to the fleet, all or none.

        `meanwhile` is called as Redis is asked for them, if at all: never where it is still open
        whether the same request was answered before. Raises OverloadError, DependencyError.
        """
        self._tokenizer = await self.gateway.tokenizers.get(self.record)
        self._prompts, self._n = wish.prompts, wish.n
        self._span.set_attributes(wish.caching.attributes(len(wish.prompts[0])))
        seed = secrets.randbits(63) if wish.seed is None else wish.seed
        names = await name_prompts(
            self.record.fingerprint, self._call.tenant.salt, wish.prompts, self._session
        )
        jobs = [
            self._make_job(wish, index, seed, names[index // wish.n])
            for index in range(len(wish.prompts) * wish.n)
        ]
        await self._take_limits(jobs)
        soon = None
        if meanwhile is not None and not self._may_be_kept:
            soon = asyncio.get_running_loop().call_soon(meanwhile)
        try:
            for index, job in enumerate(jobs):
                generation = await self._sources.open(index, job, self.record, wish)
                speller = wish.speller(self._tokenizer)
                self.choices.append(Choice(index, generation, speller, wish.rules, wish.reader()))
        finally:
            if soon is not None:
                soon.cancel()

    async def _take_limits(self, jobs: list[Job]) -> None:
        """Of the key's limits. What would not be admitted takes nothing."""
        if self._account.limited:
            self._check_admission(ask_of(jobs[0], self.gateway.clock.wall_ms()))
            prompts = sum(len(prompt) for prompt in self._prompts)
            await self._account.take(self.id, prompts + sum(job.expected_output for job in jobs))

    @property
    def _labels(self) -> tuple[str, str]:
        return self.record.name, self.band.label

    def find_meters(self) -> None:
        """Look up what `run` measures with, unless that has been done."""
        if self._meters is None:
            metrics, labels = self.gateway.metrics, self._labels
            self._meters = metrics.itl.labels(*labels), metrics.queue_wait.labels(*labels)

    async def run(self, sink: Sink, tell: Tell | None = None, outlet: Outlet | None = None) -> None:
        """Feed `sink` until every choice has finished; several choices do not wait for each other.

        `tell` hears of the queue until the first token. Text that `outlet` can tell at once goes
        there instead. Raises what the generations raise, or `sink`, or `tell`; and HeadraceError
        (504) when the deadline left no choice a token.
        """
        self.find_meters()
        assert self._meters is not None, "they were found"
        self._itl, queue_wait = self._meters
        self._waiting = Waiting(self._span, self.gateway.clock, queue_wait.observe)
        if outlet is not None:
            for choice in self.choices:
                choice.flow_to(outlet, self._time)
        if len(self.choices) == 1:
            await self._pump(self.choices[0], sink, tell)
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    for choice in self.choices:
                        group.create_task(self._pump(choice, sink, tell))
            except BaseExceptionGroup as several:
                raise _first_of(several) from None
        await self._account.settle(self.usage().total_tokens)
        await self._end_expired(sink)

    async def collect(self) -> list[Piece]:
        """Each choice whole, as one Piece."""
        pieces: list[list[Piece]] = [[] for _ in self.choices]

        async def keep(piece: Piece) -> None:
            pieces[piece.index].append(piece)

        await self.run(keep)
        return [joined(each) for each in pieces]

    async def stop(self) -> None:
        """Give up what still runs; harmless after the end."""
        for choice in self.choices:
            await choice.cancel()

    def usage(self) -> Usage:
        """The counts so far. A prompt token counts as cached when no choice computed it."""
        cached = written = 0
        for at in range(len(self._prompts)):
            choices = self.choices[at * self._n : (at + 1) * self._n]
            cached += min((choice.cached_tokens for choice in choices), default=0)
            written += max((choice.cache_write_tokens for choice in choices), default=0)
        return Usage(
            sum(len(prompt) for prompt in self._prompts),
            sum(choice.completion_tokens for choice in self.choices),
            cached,
            written,
        )

    def note_error(self, error: BaseException) -> None:
        """Record how the turn failed; by OpenTelemetry's HTTP rules 4xx is no server error."""
        if isinstance(error, asyncio.CancelledError | ClientGoneError):
            self.status = STATUS_CLIENT_GONE
            self._span.set_attribute("error.type", "client_gone")
            return
        self.status = error.status if isinstance(error, HeadraceError) else STATUS_BUG
        code = error.code if isinstance(error, HeadraceError) else None
        self._span.set_attribute("error.type", code or type(error).__name__)
        if isinstance(error, OverloadError | DependencyError) and not self.choices:
            self.gateway.metrics.refusals.labels(error.code, self.band.label).inc()
        if self.status >= STATUS_BUG:
            self._span.set_status(Status(StatusCode.ERROR, str(error)[:500]))
            self._span.record_exception(error)

    def _make_job(self, wish: Wish, index: int, seed: int, names: PromptNames) -> Job:
        at, tenant = index // wish.n, self._call.tenant
        sampling = job_sampling(wish, at, index, seed)
        return Job(
            id=f"{self.id}-{index}",
            model=self.record.name,
            tenant=tenant.name,
            band=self.band,
            arrived_ms=self._arrived_ms,
            gateway=self.gateway.fleet.gateway_id,
            prompt=wish.prompts[at],
            salt=tenant.salt,
            affinity=names.affinity,
            sampling=sampling,
            priority=self._priority,
            weight=tenant.weight,
            ttft_by_ms=self._ttft_by_ms,
            done_by_ms=self._done_by_ms,
            expected_tokens=self._account.expect(sampling),
            cached_tokens=self._account.expect_cached(wish.prompts[at], names.blocks),
            blocks=names.blocks,
            cache_until_tokens=wish.caching.until_tokens(len(wish.prompts[at])),
            cache_ttl_ms=wish.caching.ttl_ms,
            cache_mode=wish.caching.mode,
        )

    async def _pump(self, choice: Choice, sink: Sink, tell: Tell | None) -> None:
        while choice.finish is None:
            piece = await choice.next()
            if piece.tokens:
                self._time(piece.index, piece.tokens)
            elif piece.standing is not None:
                place = self._waiting.note(piece.index, piece.standing)
                if tell is not None and (place is not None or self._waiting.over):
                    await tell(place)
                continue
            elif choice.finish is FinishReason.DEADLINE and not choice.completion_tokens:
                self._expired.append(piece)
                break
            await sink(piece)
        self._sources.ended(choice)
        self._waiting.leave(choice.index, self.gateway.clock.now_ms())

    async def _end_expired(self, sink: Sink) -> None:
        """Choices without a token are an answer only beside others that have some."""
        if self._expired and not any(choice.completion_tokens for choice in self.choices):
            # the time is up, whatever a client's own patience with errors is
            self._call.reply_headers["x-should-retry"] = "false"
            reason = self.choices[self._expired[0].index].reason
            raise HeadraceError(
                reason or "the deadline passed before the first token",
                status=STATUS_EXPIRED,
                code=CODE_EXPIRED,
            )
        for piece in self._expired:
            await sink(piece)

    def _time(self, index: int, tokens: int) -> None:
        """A delivery of `tokens` to choice `index` is there."""
        now_ms = self.gateway.clock.now_ms()
        last_ms = self._last_ms.get(index)
        if last_ms is not None:
            self._itl.observe((now_ms - last_ms) / 1000 / tokens)
        else:
            self._waiting.leave(index, now_ms)
            self._account.time(index, tokens, now_ms)
            if not self._last_ms:
                waited_s = (now_ms - self._call.arrived_ms) / 1000
                self.gateway.metrics.ttft.labels(*self._labels).observe(waited_s)
                self._span.set_attribute("gen_ai.response.time_to_first_chunk", waited_s)
        self._last_ms[index] = now_ms

    def _tell_deadline(self) -> None:
        """Count what the deadline ended, and say on the span how far the turn had come."""
        ended = [choice for choice in self.choices if choice.finish is FinishReason.DEADLINE]
        for choice in ended:
            stage = "decoding" if choice.completion_tokens else "waiting"
            self.gateway.metrics.deadline_ends.labels(*self._labels, stage).inc()
        if ended:
            begun = any(choice.completion_tokens for choice in self.choices)
            outcome = "expired_decoding" if begun else "expired_waiting"
            self._span.set_attribute("headrace.deadline", outcome)

    def _tell(self, usage: Usage) -> None:
        """The figures of the ended turn: span, metrics, one line of log."""
        took_ms = self.gateway.clock.now_ms() - self._call.arrived_ms
        self._span.set_attribute("http.response.status_code", self.status)
        if self._record is None or not self.choices:
            return
        self._tell_deadline()
        telling = [each for each in self.choices if self._sources.teaches(each.index)]
        self._account.learn(telling, self._prompts, self._n, self._last_ms)
        finishes = [str(choice.finish) for choice in self.choices]
        self._span.set_attribute("gen_ai.response.model", self._record.name)
        self._span.set_attribute("gen_ai.response.finish_reasons", finishes)
        self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
        self._span.set_attribute("gen_ai.usage.cache_write.input_tokens", usage.cache_write_tokens)
        metrics, model = self.gateway.metrics, self._record.name
        metrics.duration.labels(*self._labels).observe(took_ms / 1000)
        metrics.tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        metrics.tokens.labels(model, "cached").inc(usage.cached_tokens)
        metrics.tokens.labels(model, "completion").inc(usage.completion_tokens)
        log.info(
            "turn ended",
            id=self.id,
            model=model,
            tenant=self._call.tenant.name,
            band=self.band.label,
            status=self.status,
            finish=",".join(finishes),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            took_ms=took_ms,
        )


def _first_of(several: BaseExceptionGroup[BaseException]) -> BaseException:
    first = several.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
