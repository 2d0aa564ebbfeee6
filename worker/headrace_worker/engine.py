"""The engine: jobs in, tokens out, one step at a time.

Invariant: `step()` = schedule → run → apply, and each job known here has exactly one sequence in
the scheduler or one end waiting to be reported. One thread calls everything but `missing_blocks`.
A step that raises ends the jobs of its plan with an error and no other job; the engine stays
usable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import structlog

from headrace.clock import Clock
from headrace.errors import CallerError
from headrace.grammars import Matcher
from headrace.policy.hashing import MODEL_TAG_BYTES, block_hashes, model_tag, root_hash
from headrace.types import BLOCK_TOKENS, Band, Finish, FinishReason, Job
from headrace_worker import grammar_link
from headrace_worker.device import free_bytes
from headrace_worker.engine_config import EngineConfig
from headrace_worker.entry import Entry, refusal, sequence_of
from headrace_worker.flights import Flights
from headrace_worker.grammar_link import GrammarFailure
from headrace_worker.kv.pool import KvPool
from headrace_worker.kv.traffic import Traffic
from headrace_worker.loading import LoadedModel, memory
from headrace_worker.loading.fingerprint import block_fingerprint
from headrace_worker.machine import machine_of
from headrace_worker.parallel.ranks import RankError, Ranks
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.keeping import When, keeping
from headrace_worker.policy.pace import Pace
from headrace_worker.policy.plan import Outcome, Plan, PlanItem
from headrace_worker.policy.scheduler import Scheduler
from headrace_worker.policy.sequence import Sequence as TokenSequence
from headrace_worker.policy.speculation import Economy
from headrace_worker.results import BlockPayload, MissingRun, Outlook, StepResult, StepWork
from headrace_worker.runner import Ask, Mask, Ran, Runner

_log = structlog.get_logger()


_NO_PLAN = Plan((), (), (), ())
T = TypeVar("T")


class Engine:
    """Continuous batching of one model over one paged KV pool."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        clock: Clock,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks`: who computes together with this process, which is the first of them.

        Raises ModelError when the KV pool does not fit into memory.
        """
        blocks = config.kv_tokens // BLOCK_TOKENS
        block_bytes = (
            KvPool.block_bytes(loaded.config, loaded.dtype, config.kv_dtype)
            if ranks is None
            else ranks.block_bytes(loaded, config.kv_dtype)
        )
        memory.require(
            (blocks + 1) * block_bytes,
            f"a KV cache of {config.kv_tokens} tokens",
            "lower HEADRACE_KV_TOKENS",
            free=free_bytes(loaded.device),
        )
        self.record = replace(
            loaded.record,
            fingerprint=block_fingerprint(loaded.record.fingerprint, config.kv_dtype),
            # gateways refuse what would not fit here, with both numbers, instead of letting it fail
            context_tokens=min(loaded.record.context_tokens, blocks * BLOCK_TOKENS),
        )
        """The model as it is served here."""
        self._config = config
        self._clock = clock
        self._pool = BlockPool(blocks)
        self._kv, steps = machine_of(loaded, blocks, config, ranks)
        self._traffic = Traffic(self._pool, self._kv, offers=config.offer_blocks)
        self._runner = Runner(steps)
        self._pace = Pace(config.step_stretch)
        self._scheduler = Scheduler(
            self._pool,
            running_max=config.max_running,
            step_tokens_max=config.step_tokens_max,
            calm_ms=config.calm_ms,
            pace=self._pace,
        )
        self._entries: dict[str, Entry] = {}
        self._economy = Economy()
        self._masks: dict[str, list[Mask]] = {}
        self._arrivals = 0
        self._flights = Flights()
        self._result = StepResult([], [], [])

    @property
    def has_work(self) -> bool:
        return bool(self._entries or self._result.deltas)

    def counts(self) -> tuple[int, int, int]:
        """(running, waiting, tokens that fit into free blocks, cached ones included)."""
        free_tokens = self._pool.free_count * BLOCK_TOKENS
        return len(self._scheduler.running), len(self._scheduler.waiting), free_tokens

    def refuse(self, job: Job) -> str | None:
        """Why `job` can never run here; None when it can."""
        return refusal(job, self.record)

    @property
    def layout(self) -> bytes:
        """Names the model, and how the numbers of its KV blocks are arranged."""
        return model_tag(self.record.fingerprint) + self._kv.layout[MODEL_TAG_BYTES:]

    @property
    def block_bytes(self) -> int:
        return self._kv.payload_bytes

    def outlook(self) -> Outlook:
        return Outlook(self._pace.token_ms, self._scheduler.prompts_ahead())

    def missing_blocks(self, job: Job) -> MissingRun:
        """The job's leading full blocks from the first one that is not in the pool.

        Safe to call from another thread: it only asks a dict what it contains.
        """
        tokens = job.prompt + job.logged
        root = root_hash(self.record.fingerprint, job.salt)
        hashes = block_hashes(root, tokens, (len(tokens) - 1) // BLOCK_TOKENS)
        first = next((i for i, h in enumerate(hashes) if not self._pool.contains(h)), len(hashes))
        return MissingRun(hashes[first:], hashes[first - 1] if first else root, first)

    def holds(self, block_hash: bytes) -> bool:
        """Whether a block is in the pool. Safe to call from another thread."""
        return self._pool.contains(block_hash)

    def take_in(self, payloads: Iterable[BlockPayload], band: Band, tenant: str) -> None:
        """KV of a job that will move here."""
        self._traffic.take_in(payloads, band, tenant, cost_ms=self._block_ms)

    def add(
        self, job: Job, imported: Iterable[BlockPayload] = (), matcher: Matcher | None = None
    ) -> None:
        """Takes the job in.

        `imported`: KV from the cache service, of any usefulness. `matcher`: its compiled grammar,
        at the start, for a job that has one. Raises CallerError for a job that `refuse` refuses.
        """
        reason = self.refuse(job)
        if reason is not None:
            raise CallerError(reason)
        assert job.id not in self._entries, "a job is added once"
        assert bool(job.sampling.grammar) == (matcher is not None), "a grammar comes compiled"
        self._arrivals += 1
        sequence = sequence_of(job, self.record, self._clock, self._arrivals)
        entry = Entry(job, sequence, matcher, self.record.vocab_size, self._clock.wall_ns())
        self._entries[job.id] = entry
        ending = sequence.ending()
        if ending is not None and not sequence.scoring:
            self._end(
                entry, Finish(ending)
            )  # an earlier attempt made the last token, its end got lost
            return
        entry.imported = self._traffic.load(sequence, imported, cost_ms=self._block_ms)
        self._scheduler.add(sequence)
        try:
            ending = self._follow_grammar(entry, job.logged)
        except GrammarFailure as failure:
            self._fail(sequence, [], str(failure))
            return
        if ending is not None:
            self._scheduler.remove(sequence)
            self._end(entry, Finish(ending))

    def cancel(self, job_id: str) -> bool:
        """Ends a job before the next step, or after the one that computes it now.

        The step's result reports it. False when it is not here.
        """
        entry = self._entries.get(job_id)
        if entry is None:
            return False
        self._end_now_or_landed(entry, Finish(FinishReason.CANCELLED))
        return True

    def _end_now_or_landed(self, entry: Entry, finish: Finish) -> None:
        """What other ranks are writing to must not be handed out before they are done."""
        if entry.job.id in self._flights.under_way():
            self._flights.end_later(entry.job.id, finish)
        else:
            self._scheduler.remove(entry.sequence)
            self._end(entry, finish)

    def abort_all(self) -> None:
        """Drops all jobs and all that was to be reported. Cached KV stays."""
        while self._flights:
            self._flights.land()
            self._runner.finish()
        for entry in self._entries.values():
            self._scheduler.remove(entry.sequence)
        self._entries.clear()
        self._flights.forget_endings()
        self._result = StepResult([], [], [])

    def step(self) -> StepResult:
        """Begins a step for who is here, takes in one that is over, reports what ended.

        Where one process computes, those are the same step. Where stages do, one after another,
        as many are under way as there are stages, each with sequences of its own.
        """
        now = self._clock.now_ms()
        for sequence in self._scheduler.late(now):
            # before anything more is computed for it
            entry = self._entries[sequence.id]
            self._end_now_or_landed(entry, Finish(FinishReason.DEADLINE))
        began = self._begin(now)
        landed, busy_ns = _NO_PLAN, 0
        if self._flights and (not began or len(self._flights) == self._runner.depth):
            landed, busy_ns = self._land()
        made, self._result = self._result, StepResult([], [], [])
        made.blocks.extend(self._traffic.take())
        made.lent.extend(self._traffic.take_lent())
        work = self._work(landed, made, busy_ns)
        return StepResult(made.deltas, made.blocks, made.stories, work, made.lent, made.handed)

    def _begin(self, now: int) -> bool:
        """Plans a step and begins it; whether there was anything to plan."""
        lower = self._pace.tokens_within(self._config.lower_prefill_ms)
        under_way = self._flights.under_way()
        plan = self._scheduler.schedule(
            now,
            self._guesses(under_way),
            lower_prefill_tokens=lower,
            under_way=under_way,
            leaving=self._flights.leaving,
            plans=self._runner.depth,
        )
        # before the step overwrites them
        self._traffic.note_evicted(plan.evicted, cost_ms=self._block_ms)
        plan = self._with_masks(plan)
        start_ns = self._clock.wall_ns()
        if plan.items and self._guarded(plan, partial(self._submit, plan)) is not None:
            self._flights.begin(plan, start_ns)
        self._masks.clear()
        return bool(plan.items)

    def _submit(self, plan: Plan) -> bool:
        asks = {item.sequence.id: self._ask(item) for item in plan.items}
        self._runner.begin(plan.items, asks)
        return True

    def _land(self) -> tuple[Plan, int]:
        """Takes in the oldest step; its plan, and the nanoseconds that went into it alone."""
        flight = self._flights.land()
        plan = flight.plan
        ran = self._guarded(plan, self._runner.finish)
        end_ns = self._clock.wall_ns()
        self._flights.note_landed(end_ns)
        for job, finish in self._flights.take_ending(plan).items():
            entry = self._entries.get(job)
            if entry is not None:
                self._scheduler.remove(entry.sequence)
                self._end(entry, finish)
        if ran is not None:
            self._apply(plan, ran, flight.start_ns, end_ns)
        return plan, end_ns - flight.start_ns

    def _work(self, plan: Plan, result: StepResult, busy_ns: int) -> StepWork:
        here = [self._entries.get(item.sequence.id) for item in plan.items]
        shape = plan.shape
        return StepWork(
            moved=tuple(entry.progress() for entry in here if entry is not None),
            news=self._pool.take_news(),
            busy_ns=max(0, busy_ns),  # wall clocks are set back now and then
            prefill_tokens=shape.prefill_tokens,
            output_tokens=sum(len(delta.tokens) for delta in result.deltas),
            shape=shape,
        )

    def check_integrity(self) -> None:
        """Blocks are free or owned, once; each sequence has its job and each job its sequence."""
        self._scheduler.check_integrity()
        self._traffic.check_integrity()
        sequences = {s.id for s in (*self._scheduler.running, *self._scheduler.waiting)}
        assert sequences == self._entries.keys(), "jobs and sequences disagree"
        self._flights.check_integrity(sequences)
        if not sequences:
            assert self._pool.free_count == self._pool.total, "blocks held without a job"

    def _guesses(self, under_way: Collection[str]) -> dict[str, tuple[int, ...]]:
        """What may follow, for each sequence where trying is expected to pay.

        Only when all here are decoding: beside a prompt's chunk there is no time to win.
        """
        if not self._config.speculation or self._scheduler.waiting:
            return {}
        running = [s for s in self._scheduler.running if s.id not in under_way]
        if not running:
            return {}
        if any(sequence.pending > 1 for sequence in running):
            return {}
        price = self._economy.price(len(running))
        if price is None:
            return {}
        guesses = {}
        for sequence in running:
            entry = self._entries[sequence.id]
            limit = sequence.tokens_max - sequence.known - 1
            guess = entry.guesser.guess(sequence.tokens, price, limit)
            if guess and entry.matcher is not None:
                guess = self._held_guess(entry, entry.matcher, guess)
            if guess:
                guesses[sequence.id] = guess
        return guesses

    def _held_guess(
        self, entry: Entry, matcher: Matcher, guess: tuple[int, ...]
    ) -> tuple[int, ...]:
        """As much of `guess` as the grammar allows; its masks are kept for the step."""
        try:
            masks = grammar_link.masks(matcher, guess)
        except GrammarFailure as failure:
            self._fail_grammar(entry, failure)
            return ()
        self._masks[entry.job.id] = masks
        return guess[: len(masks) - 1]

    def _with_masks(self, plan: Plan) -> Plan:
        """The plan without those whose grammar broke; the masks of the others are ready."""
        for item in plan.items:
            entry = self._entries[item.sequence.id]
            if entry.matcher is None or not item.samples or entry.job.id in self._masks:
                continue
            try:
                self._masks[entry.job.id] = grammar_link.masks(entry.matcher)
            except GrammarFailure as failure:
                self._fail_grammar(entry, failure)
        going = self._entries.keys() - set(self._flights.leaving)
        items = tuple(i for i in plan.items if i.sequence.id in going)
        return plan if len(items) == len(plan.items) else replace(plan, items=items)

    def _fail_grammar(self, entry: Entry, failure: GrammarFailure) -> None:
        cause = failure.__cause__
        _log.error("grammar failed", job=entry.job.id, error=repr(cause), exc_info=cause)
        self._end_now_or_landed(entry, Finish(FinishReason.ERROR, str(failure)))

    def _ask(self, item: PlanItem) -> Ask:
        entry = self._entries[item.sequence.id]
        masks = self._masks.get(item.sequence.id) if item.samples else None
        return replace(entry.ask, masks=masks) if masks else entry.ask

    def _guarded(self, plan: Plan, call: Callable[[], T]) -> T | None:
        """What `call` gives; None when it raised, and the plan's jobs have been failed."""
        try:
            return call()
        except RankError:
            raise  # this engine is at its end
        except Exception as error:  # whatever it is, it must not end jobs outside the plan
            _log.exception("step failed", jobs=[item.sequence.id for item in plan.items])
            for item in plan.items:
                sequence = item.sequence
                suspects = sequence.blocks[sequence.registered :]
                self._fail(sequence, suspects, f"the step failed: {type(error).__name__}: {error}")
            return None

    def _apply(self, plan: Plan, ran: list[Ran], start_ns: int, end_ns: int) -> None:
        (prompts, streams, guessed), took_ms = plan.row_counts(), (end_ns - start_ns) / 1e6
        self._pace.note(prompts, streams, took_ms)
        if not prompts:
            self._economy.note(len(plan.items), guessed, took_ms)
        drawn: list[list[int]] = []
        for item, got in zip(plan.items, ran, strict=True):
            entry = self._entries.get(item.sequence.id)
            if entry is None:
                drawn.append([])  # it was cancelled meanwhile
                continue
            entry.note_step(item.start, item.count, start_ns, end_ns)
            scored = [logprobs for logprobs in got.scored if logprobs is not None]
            entry.prompt_logprobs += scored
            tokens = got.tokens()
            drawn.append(tokens)
            if (item.samples and not tokens) or len(scored) < len(got.scored):
                self._fail_choice(entry)
        items = {item.sequence.id: (item, got) for item, got in zip(plan.items, ran, strict=True)}
        outcomes = self._scheduler.apply(plan, drawn)
        for sequence in (item.sequence for item in plan.items):
            entry = self._entries.get(sequence.id)
            if entry is not None and sequence.registered > entry.looked_at:
                entry.looked_at = sequence.registered
                self._offer(entry, sequence.blocks[: sequence.registered], ended=False)
                if entry.job.move_to:
                    entry.lent = self._traffic.lend(sequence, entry.lent)
        for outcome in outcomes:
            item, got = items[outcome.sequence.id]
            entry = self._entries[outcome.sequence.id]
            entry.note_output(len(outcome.tokens), got.chosen, len(item.guess))
            self._report(outcome, end_ns)

    def _fail_choice(self, entry: Entry) -> None:
        """Ends a job for which no token could be chosen."""
        if entry.matcher is not None and entry.matcher.failure:
            self._fail(entry.sequence, [], f"the grammar gave up: {entry.matcher.failure}")
        else:
            blocks = list(entry.sequence.blocks)
            self._fail(entry.sequence, blocks, "the model's output is not a finite number")

    def _report(self, outcome: Outcome, now_ns: int) -> None:
        entry = self._entries[outcome.sequence.id]
        if not entry.first_token_ns:
            entry.first_token_ns = now_ns
        ending, blocks = outcome.ending, outcome.blocks
        if ending is None:
            try:
                ending = self._follow_grammar(entry, outcome.tokens)
            except GrammarFailure as failure:
                self._fail(entry.sequence, [], str(failure))
                return
            if ending is not None:
                blocks = self._scheduler.remove(entry.sequence)
        if ending is None:
            self._result.deltas.append(entry.delta())
            if entry.job.move_to:
                self._hand_over(entry, now_ns)
            return
        self._offer(entry, blocks, ended=True)
        self._end(entry, Finish(ending))

    def _hand_over(self, entry: Entry, now_ns: int) -> None:
        """Another worker goes on with it; if none does, it comes back as a job with output."""
        self._offer(entry, self._scheduler.remove(entry.sequence), ended=True)
        del self._entries[entry.job.id]
        self._result.handed.append(entry.story(None, now_ns))

    @property
    def _block_ms(self) -> float:
        """What computing a block takes; 0 where nothing was measured yet."""
        return BLOCK_TOKENS * self._pace.token_ms

    def _offer(self, entry: Entry, blocks: Sequence[int], *, ended: bool) -> None:
        """Offers the cache service what it has not been of a sequence's full `blocks`."""
        theirs = len(entry.sequence.cached_blocks or ())  # found, so others' to offer
        for index in range(entry.offered, len(blocks)):
            keep = keeping(entry.job, index, ended=ended)
            if keep.when is When.LATER:
                return
            entry.offered = index + 1
            # another block may hold the same, and then that one can be found
            found = self._pool.match_prefix([entry.sequence.block_hash(index)])
            cached = self._pool.cached(found[0]) if found else None
            if cached is None:
                continue
            if keep.when is When.NEVER:
                cached.offered = cached.offered or index >= theirs
            elif keep.pin_ms or not cached.offered:
                of_prompt = (index + 1) * BLOCK_TOKENS <= len(entry.job.prompt)
                job = entry.job.id if of_prompt else ""
                self._traffic.offer(cached, job=job, pin_ms=keep.pin_ms, cost_ms=self._block_ms)

    def _follow_grammar(self, entry: Entry, tokens: Iterable[int]) -> FinishReason | None:
        """Tells the grammar of `tokens`, and adds those that it leaves no choice about.

        Why the job is complete, if it is. With logprobs each token is chosen, so that it has one.
        Raises GrammarFailure.
        """
        matcher = entry.matcher
        if matcher is None:
            return None
        for token in tokens:
            grammar_link.accept(matcher, token)
        certain = [] if entry.wants_logprobs or matcher.ended else grammar_link.forced(matcher)
        for token in certain:
            grammar_link.accept(matcher, token)
            entry.forced += 1
            ending = self._scheduler.extend(entry.sequence, token)
            if ending is not None:
                return ending
        return FinishReason.STOP if matcher.ended else None

    def _fail(self, sequence: TokenSequence, suspects: list[int], error: str) -> None:
        """Ends a job in an error; nobody finds or reads what `suspects` hold again."""
        self._traffic.forget(suspects)
        self._scheduler.remove(sequence)
        self._kv.zero_blocks(block for block in suspects if self._pool.is_free(block))
        self._end(self._entries[sequence.id], Finish(FinishReason.ERROR, error))

    def _end(self, entry: Entry, finish: Finish) -> None:
        """Reports the end of a job whose sequence has left the scheduler."""
        del self._entries[entry.job.id]
        self._result.deltas.append(entry.delta(finish))
        self._result.stories.append(entry.story(finish.reason, self._clock.wall_ns()))
