"""The whole fleet as discrete events: gateways, dispatcher and workers around the real policies.

Invariant: events are taken in order of (time, number), so that a seed gives the same run; nothing
but events changes anything. Admission against the last board, intake, dispatch whenever something
changed, hand-off, steps, reports at the workers' interval, ends: what the services do with Redis in
between is a delay. Rejected: coroutines on a virtual clock, which run the services' own code but a
thousand times slower.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.policy.cost_model import CostModel
from headrace.types import Board, FinishReason, Job, JobDone, JobMoved, WorkerRole
from headrace_gateway.policy.dispatch import DispatchPolicy
from headrace_gateway.policy.fair_queue import Queued
from headrace_gateway.policy.workload import WorkerFacts
from headrace_sim.agenda import Agenda
from headrace_sim.alternatives import OURS, Alternative, Dispatch
from headrace_sim.gateway import EPOCH_MS, BlockNames, GatewayConfig, SimGateway
from headrace_sim.kv_cache import round_up
from headrace_sim.metrics import Gaps, Outcome, Records, Service
from headrace_sim.sequence import SimSequence, moved
from headrace_sim.worker import SimWorker, StreamTimes
from headrace_sim.workload import SimRequest, Stream

REFUSED_MS = 1_000.0
"""Until the next request of a client for whose last one no wait helps."""


@dataclass(frozen=True, slots=True)
class Delays:
    """Milliseconds between the services, and how often they tell."""

    intake_ms: float = 2.0
    hand_off_ms: float = 2.0
    reply_ms: float = 2.0
    done_ms: float = 1.0
    report_ms: float = 250.0
    board_ms: float = 250.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """What moving a job takes in ms: `move_ms`, and `per_1k_ms` for each 1,000 tokens of KV that
    are not under way before its first token is there, which are those of one step at most.

    Assumed: 131 KB a token (Llama-3-8B in bfloat16) at 25 GB/s; links have room for all at once.
    """

    move_ms: float = 4.0
    per_1k_ms: float = 5.2

    def takes_ms(self, prompt_tokens: int, step_tokens: int) -> float:
        return self.move_ms + self.per_1k_ms * min(prompt_tokens, step_tokens) / 1_000


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What is simulated. `check`: integrity after every event, slow.

    `roles`: how many of the workers, the first ones, compute prompts, and how many decode; the
    others do both. `adapts`: workers change sides as the dispatcher says.
    """

    workers: int
    cost: CostModel
    alternative: Alternative = OURS
    gateways: int = 1
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    delays: Delays = field(default_factory=Delays)
    transfer: Transfer = field(default_factory=Transfer)
    roles: tuple[int, int] = (0, 0)
    adapts: bool = False
    seed: int = 0
    check: bool = False

    def __post_init__(self) -> None:
        assert sum(self.roles) <= self.workers, "roles are given to workers"

    def role(self, number: int) -> WorkerRole:
        prefill, decode = self.roles
        if number < prefill:
            return WorkerRole.PREFILL
        return WorkerRole.DECODE if number < prefill + decode else WorkerRole.BOTH


COLLECTED_EACH = 1_000_000
"""Objects that come to be before the collector looks for circles of them."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """The garbage collector hardly runs: nothing here makes circles, and what lives is a lot."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECTED_EACH, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


STEP, DONE, REPORT, BOARD, ARRIVE, INTAKE, REACH, DEADLINE, MOVE = range(9)
"""Events; at the same instant the lower goes first."""


@dataclass(slots=True)
class Live:
    """A request under way."""

    request: SimRequest
    job: Job
    gateway: SimGateway
    worker: SimWorker | None = None
    sequence: SimSequence | None = None
    handed_ms: float = 0.0
    virtual: float = 0.0
    decode: SimWorker | None = None


class Fleet:
    """One run. `run()` it once, then read `records`, `service`, `gaps` and the workers."""

    def __init__(self, config: FleetConfig, stream: Stream) -> None:
        self.config = config
        self.records = Records()
        self.service = Service()
        self.gaps = Gaps()
        self.now_ms = 0.0
        self.wall_ms = EPOCH_MS
        self.events = 0
        self.moves = 0
        self.role_changes = 0
        alternative = config.alternative
        self.policy: Dispatch = alternative.make(config.seed)
        self._names = BlockNames()
        gateway = replace(
            config.gateway,
            refuses=config.gateway.refuses and alternative.refuses,
            deadlines=config.gateway.deadlines and alternative.deadlines,
            sessions=config.gateway.sessions or alternative.sessions,
        )
        self.gateways = [SimGateway(f"g{n}", gateway, self._names) for n in range(config.gateways)]
        times = StreamTimes(config.cost)
        self.workers = {
            name: SimWorker(
                name,
                config.cost,
                alternative.rules,
                on_gaps=self.gaps.add,
                on_served=self.service.add,
                times=times,
            )
            for name in (f"w{n}" for n in range(config.workers))
        }
        self._stream = stream
        self._source: Iterator[SimRequest] = iter(())
        self._agenda = Agenda()
        self._at = self._agenda.put
        self._live: dict[str, Live] = {}
        self._waiting = 0
        self._arriving = 0
        self._reserved = 0
        self._booked = dict.fromkeys(self.workers, 0)
        self._jobs_max = config.cost.max_jobs
        self._free_jobs = config.workers * self._jobs_max

    @property
    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def run(self) -> Fleet:
        """To the end of the last request."""
        self._roles = {name: self.config.role(n) for n, name in enumerate(self.workers)}
        self._set_workers()
        self._source = iter(self._stream.start())
        self._board(None)
        self._next_arrival()
        handlers: tuple[Callable[[Any], None], ...] = (
            self._step,
            self._done,
            self._report,
            self._board,
            self._arrive,
            self._intake,
            self._reach,
            self._deadline,
            self._move,
        )
        agenda, check = self._agenda, self.config.check
        with rarely_collected():
            for self.now_ms, kind, _, subject in agenda:
                self.wall_ms = EPOCH_MS + int(self.now_ms)
                self.events += 1
                handlers[kind](subject)
                if check:
                    self.check_integrity()
        return self

    def _set_workers(self) -> None:
        cost = self.config.cost
        facts = [
            WorkerFacts(name, cost.kv_tokens, cost.max_jobs, role)
            for name, role in self._roles.items()
        ]
        self.policy.set_workers(facts, self.wall_ms)

    # requests come

    def _next_arrival(self) -> None:
        request = next(self._source, None)
        if request is not None:
            self._arriving += 1
            self._at(request.at_ms, ARRIVE, (request, True))

    def _arrive(self, subject: tuple[SimRequest, bool]) -> None:
        request, from_source = subject
        self._arriving -= 1
        if from_source:
            self._next_arrival()
        if round_up(request.input_tokens + request.output_tokens) > self.config.cost.kv_tokens:
            self._turn_away(request, Outcome.TOO_LONG, REFUSED_MS)
            return
        gateway = self.gateways[request.gateway % len(self.gateways)]
        job = gateway.job(request)
        admission = gateway.admit(job)
        if not admission.admitted:
            # who does as told tries again when told to, or does something else for a while
            self._turn_away(request, Outcome.REFUSED, admission.retry_after_ms or REFUSED_MS)
            return
        live = self._live[request.id] = Live(request, job, gateway)
        self._at(self.now_ms + self.config.delays.intake_ms, INTAKE, live)

    def _turn_away(self, request: SimRequest, outcome: Outcome, pause_ms: float) -> None:
        """`request` did not get in; its client may send the next after `pause_ms`."""
        self.records.add(request, outcome, self.now_ms)
        self._follow_up(request, self.now_ms + pause_ms)

    def _follow_up(self, request: SimRequest, at_ms: float) -> None:
        """A closed loop's client may send the next request."""
        following = self._stream.ended(request, at_ms)
        if following is not None:
            self._arriving += 1
            self._at(following.at_ms, ARRIVE, (following, False))

    # the dispatcher

    def _intake(self, live: Live) -> None:
        job = live.job
        self.policy.push(Queued(job, "intake", job.id, int(self.now_ms * 1e6)))
        self._waiting += 1
        self.service.waits(job.tenant, job.weight, self.now_ms)
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand on whatever can go now."""
        now = self.wall_ms
        while self._waiting and (decision := self.policy.next(now)) is not None:
            self.policy.handed_off(decision, now)
            self._waiting -= 1
            live = self._live[decision.item.job.id]
            # the service writes it into the job
            live.virtual = decision.virtual
            live.worker = self.workers[decision.route.worker]
            live.decode = self.workers.get(decision.pairing.decode)
            live.handed_ms = self.now_ms
            self._reserved += live.job.cost_tokens
            self._book(live.worker.name, 1)
            self.service.goes(live.job.tenant, self.now_ms)
            self._at(self.now_ms + self.config.delays.hand_off_ms, REACH, live)

    def _board(self, _: None) -> None:
        """The dispatcher's round: drop what is late, publish the board."""
        now = self.wall_ms
        for item in self.policy.late(now):
            self.policy.cancel(item.job.id)
            self._waiting -= 1
            self.service.goes(item.job.tenant, self.now_ms)
            self._finish(self._live[item.job.id], Outcome.LATE)
        self._rebalance(now)
        outlook = self.policy.outlook(now)
        board = Board(
            leader="g0",
            published_ms=now,
            queued=outlook.queued,
            queued_work=outlook.queued_work,
            waits_ms=outlook.waits_ms,
            capacity_tokens=len(self.workers) * self.config.cost.kv_tokens,
            reserved_tokens=self._reserved,
            workers=len(self.workers),
            work_per_s=outlook.work_per_s,
            prefill_per_s=outlook.prefill_per_s,
            band_work_per_s=outlook.band_work_per_s,
            free_jobs=self._free_slots(),
        )
        for gateway in self.gateways:
            gateway.see(board)
        self._dispatch()
        if self._live or self._arriving or not self._agenda.number:
            self._at(self.now_ms + self.config.delays.board_ms, BOARD, None)

    def _free_slots(self) -> int:
        """As the dispatcher counts them: those of workers that get jobs from the queue."""
        if sum(self.config.roles) and isinstance(self.policy, DispatchPolicy):
            return self.policy.workload.free_jobs
        return self._free_jobs

    def _rebalance(self, now: int) -> None:
        """A worker changes sides; what it has it keeps."""
        if not self.config.adapts or not isinstance(self.policy, DispatchPolicy):
            return
        change = self.policy.rebalance(now)
        if change is not None:
            self._roles[change.worker] = change.role
            self.role_changes += 1
            self._set_workers()

    def _book(self, worker: str, jobs: int) -> None:
        """The dispatcher counts so many more jobs on `worker`."""
        before, jobs_max = self._booked[worker], self._jobs_max
        self._booked[worker] = after = before + jobs
        if before <= jobs_max >= after:
            self._free_jobs -= jobs
        else:
            self._free_jobs += max(0, jobs_max - after) - max(0, jobs_max - before)

    # the workers

    def _reach(self, live: Live) -> None:
        worker, job = live.worker, live.job
        assert worker is not None, "it was handed to somebody"
        sequence = SimSequence(job, live.request.output_tokens, live.request.blocks)
        sequence.virtual = live.virtual
        sequence.moves = live.decode is not None
        live.sequence = sequence
        before_ms = worker.next_ms
        worker.add(sequence, self.now_ms)
        self._follow(worker, before_ms)
        if job.ttft_by_ms or job.done_by_ms:
            for by_ms in {job.ttft_by_ms, job.done_by_ms} - {0}:
                self._at(max(self.now_ms, by_ms - EPOCH_MS), DEADLINE, (live, by_ms))

    def _follow(self, worker: SimWorker, before_ms: float) -> None:
        """Come back when the steps under way end, if that is another time than before."""
        next_ms = worker.next_ms
        if next_ms != before_ms and next_ms < math.inf:
            self._at(next_ms, STEP, worker)
            if not worker.is_reporting:
                worker.is_reporting = True
                self._at(self.now_ms + self.config.delays.report_ms, REPORT, worker)

    def _step(self, worker: SimWorker) -> None:
        now_ms = self.now_ms
        if worker.next_ms != now_ms:
            return  # its steps end earlier by now
        finished, dropped, handed = worker.advance(now_ms)
        for sequence in finished:
            self._leave(worker, sequence, FinishReason.STOP)
        for sequence in dropped:
            self._leave(worker, sequence, FinishReason.DEADLINE)
        for sequence in handed:
            config = self.config
            takes_ms = config.transfer.takes_ms(sequence.prompt_tokens, config.cost.step_tokens)
            self._at(now_ms + takes_ms, MOVE, self._live[sequence.job.id])
        self._follow(worker, now_ms)

    def _move(self, live: Live) -> None:
        """A job that has its first token comes to the worker that goes on with it."""
        before, worker, sequence = live.worker, live.decode, live.sequence
        assert before is not None and worker is not None and sequence is not None, "it had both"
        progress = before.last_progress(sequence, self.now_ms)
        there = moved(sequence, live.request.blocks)
        live.sequence, live.worker, live.decode = there, worker, None
        self.moves += 1
        self._book(before.name, -1)
        self._book(worker.name, 1)
        self.policy.moved(JobMoved(before.name, worker.name, progress), self.wall_ms)
        next_ms = worker.next_ms
        worker.add(there, self.now_ms)
        self._follow(worker, next_ms)
        if live.job.done_by_ms:  # it may have passed on the way
            by_ms = live.job.done_by_ms
            self._at(max(self.now_ms, by_ms - EPOCH_MS), DEADLINE, (live, by_ms))
        self._dispatch()

    def _leave(self, worker: SimWorker, sequence: SimSequence, reason: FinishReason) -> None:
        progress = worker.last_progress(sequence, self.now_ms)
        live = self._live[sequence.job.id]
        self._reserved -= sequence.job.cost_tokens
        done = JobDone(worker.name, progress, reason)
        self._at(self.now_ms + self.config.delays.done_ms, DONE, done)
        late = reason is FinishReason.DEADLINE
        self._finish(live, Outcome.LATE if late else Outcome.COMPLETE)

    def _finish(self, live: Live, outcome: Outcome) -> None:
        """The client has, or is told, everything."""
        request, sequence = live.request, live.sequence
        del self._live[request.id]
        live.gateway.live -= 1
        wait_ms = (live.handed_ms or self.now_ms) - request.at_ms
        ttft_ms, cached, output = math.inf, 0, 0
        if sequence is not None:
            cached, output = max(0, sequence.cached), sequence.output
            if sequence.first_ms >= 0:
                ttft_ms = sequence.first_ms + self.config.delays.reply_ms - request.at_ms
        if outcome is Outcome.COMPLETE and sequence is not None:
            decode_ms = self.now_ms - sequence.first_ms
            live.gateway.ended(live.job, output, cached, decode_ms)
        self.records.add(request, outcome, self.now_ms, wait_ms, ttft_ms, cached, output)
        self._follow_up(request, self.now_ms)

    def _done(self, done: JobDone) -> None:
        self._book(done.worker, -1)
        self.policy.done(done, self.wall_ms)
        self._dispatch()

    def _report(self, worker: SimWorker) -> None:
        report = worker.report(self.now_ms, self._names)
        if report is None and worker.next_ms == math.inf:
            worker.is_reporting = False
            return
        self._at(self.now_ms + self.config.delays.report_ms, REPORT, worker)
        if report is None:
            return
        self.policy.progress(report, self.wall_ms)
        self._dispatch()

    def _deadline(self, subject: tuple[Live, int]) -> None:
        """A job on a worker is due: drop it if it still owes what was due."""
        live, by_ms = subject
        sequence, worker = live.sequence, live.worker
        if live.request.id not in self._live or sequence is None or worker is None:
            return
        if sequence.moves and sequence.first_ms >= 0 and live.decode is not None:
            return  # under way: it is looked at again when it is there
        if by_ms == live.job.ttft_by_ms != live.job.done_by_ms and sequence.first_ms >= 0:
            return
        before_ms = worker.next_ms
        if worker.drop(sequence, self.now_ms):
            self._leave(worker, sequence, FinishReason.DEADLINE)
        self._follow(worker, before_ms)

    def check_integrity(self) -> None:
        self.policy.check_integrity()
        self._agenda.check_integrity()
        for worker in self.workers.values():
            worker.check_integrity()
        assert self._reserved == sum(
            live.job.cost_tokens for live in self._live.values() if live.worker is not None
        ), "what is reserved belongs to jobs under way"
        free = sum(max(0, self.config.cost.max_jobs - jobs) for jobs in self._booked.values())
        waiting = sum(live.worker is None for live in self._live.values())
        assert self._waiting <= waiting, "who waits has no worker; others are on their way"
        assert self._free_jobs == free, "free slots are those that no job has"
        if isinstance(self.policy, DispatchPolicy) and not sum(self.config.roles):
            assert self.policy.workload.free_jobs == free, "the board says what the policy books"
