"""Who computes a job's prompt and who goes on with it: a pair of workers, or one for both.

Invariant: costs are prompt tokens, as in routing.py, so that pairs and single workers are one
ranking. A pair costs the prompt where it is computed, moving its KV, what is there to decode, and
the step from one to the other. A single worker costs the prompt, and that all who decode there wait
for it: a token-time of somebody else's counts as one of one's own. So a short prompt goes to one
worker and a long one to a pair, where there is a choice. Where no decoding worker has room, the
worker of the prompt goes on by itself: work is never left lying for want of the better place.

What a pair's decoding worker will get is booked there from the start, as a promise, so that no two
prompts count on the same room; it ends when the job moves, ends, or stays where it began.
Source: DistServe (OSDI 2024) and NVIDIA Dynamo, whose conditional disaggregation compares lengths;
Rejected: a limit on the prompt's length, which is right for one load of one machine.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from headrace.types import Job, JobMoved, JobProgress
from headrace_gateway.policy.bookings import Demand, Room
from headrace_gateway.policy.route import Route
from headrace_gateway.policy.workload import Workload

LOOKED_AT_MAX = 8
"""Decoding workers, least loaded first, that are asked for room."""


@dataclass(frozen=True, slots=True)
class PairingConfig:
    """What can be tuned, in parts of computing a prompt token, and in tokens.

    `transfer_part`: a token's KV to another worker, estimated; `bench disaggregation --transfer`.
    `handover_tokens`: the step itself, and the end of the prompt that is computed again.
    `stall_weight`: what a token-time of each stream that waits counts.
    """

    transfer_part: float = 0.02
    handover_tokens: int = 48
    stall_weight: float = 1.0


class PairScore(NamedTuple):
    """One way to do a job; the cheaper is the better one. `decode` is '' for a single worker."""

    price: float
    prefill: str
    decode: str
    words: str


class Pairing(NamedTuple):
    """The decision: who goes on after the first token ('': who began), why, and what else was
    considered."""

    decode: str = ""
    reason: str = ""
    scores: tuple[PairScore, ...] = ()


ALONE = Pairing()


def first_part(job: Job) -> Job:
    """`job` as whoever computes its prompt has it: one token, then it goes."""
    return replace(job, sampling=replace(job.sampling, max_tokens=len(job.logged) + 1))


class Pairs:
    """Chooses, and remembers what has been promised. `decoding`: the workers that only decode."""

    def __init__(self, decoding: Workload, config: PairingConfig | None = None) -> None:
        self._decoding = decoding
        self._config = config or PairingConfig()
        self._promises: dict[str, Promise] = {}
        self._promised: dict[str, dict[str, None]] = {}

    def decoder(self, demand: Demand, allows: Callable[[str], bool]) -> tuple[str, float, str]:
        """The decoding worker with least to do that has room for `demand`, what is to decode there
        in tokens, and why; '' if there is none."""
        if not self._decoding.open_workers:
            return "", 0.0, "no worker only decodes"
        for worker in self._decoding.by_load(LOOKED_AT_MAX):
            if self._decoding.room_for(worker, demand).room is Room.FREE and allows(worker):
                return worker, float(self._decoding.load(worker)), "least to decode"
        return "", 0.0, "no decoding worker has room"

    def pair_score(self, job: Job, route: Route, decode: str, load: float) -> PairScore:
        """The cost of `route`'s worker for the prompt and `decode` for what follows."""
        config = self._config
        moved = config.transfer_part * (len(job.prompt) + len(job.logged))
        own = price_of(route)
        words = (
            f"{route.worker} and {decode}: prompt {own:.0f}, transfer {moved:.0f}, "
            f"decode {load:.0f}, step {config.handover_tokens}"
        )
        return PairScore(own + moved + load + config.handover_tokens, route.worker, decode, words)

    def single_score(self, job: Job, route: Route, streams: int) -> PairScore:
        """The cost of `route`'s worker for all of it, with `streams` that wait for the prompt."""
        known = len(job.prompt) + len(job.logged)
        score = route.score
        uncached = score.uncached_tokens if score is not None else known
        stall = self._config.stall_weight * uncached * streams
        own = price_of(route)
        words = f"{route.worker} alone: prompt {own:.0f}, {streams} streams wait {stall:.0f}"
        return PairScore(own + stall, route.worker, "", words)

    # what has been promised

    def promise(self, job: Job, prefill: str, decode: str, now_ms: int) -> None:
        """`job` will move from one to the other."""
        self.end(job.id)
        self._promises[job.id] = Promise(prefill, decode, job)
        self._promised.setdefault(decode, {})[job.id] = None
        self._decoding.book(decode, job, 1, now_ms)

    def get(self, job_id: str) -> Promise | None:
        return self._promises.get(job_id)

    def promised_to(self, worker: str) -> Collection[str]:
        """Jobs that are booked on `worker` and not there yet."""
        return self._promised.get(worker, {}).keys()

    def end(self, job_id: str) -> Promise | None:
        """The promise ends, and with it what was booked for it."""
        promise = self._promises.pop(job_id, None)
        if promise is not None:
            self._decoding.cancel(promise.decode, job_id)
            left = self._promised[promise.decode]
            del left[job_id]
            if not left:
                del self._promised[promise.decode]
        return promise

    def kept(self, worker: str, told: JobProgress) -> Promise | None:
        """The promise, if `told` shows that the job stays: its first worker goes on with it."""
        promise = self._promises.get(told.job)
        if promise is None or promise.prefill != worker:
            return None
        if told.output <= len(promise.job.logged):
            return None
        return self.end(told.job)

    def moved(self, moved: JobMoved, now_ms: int) -> Promise | None:
        """The job is there now, with the output it has."""
        promise = self.end(moved.progress.job)
        if promise is None:
            return None
        logged = array("I", bytes(4 * moved.progress.output))  # how many is all that counts
        there = replace(promise.job, attempt=promise.job.attempt + 1, logged=logged)
        self._decoding.book(moved.to, there, 1, now_ms)
        return promise

    def forget(self, worker: str) -> list[Promise]:
        """`worker` is gone: what it was to decode stays where it is, what it had is nobody's."""
        gone = [job for job, p in self._promises.items() if worker in (p.prefill, p.decode)]
        return [promise for job in gone if (promise := self.end(job)) is not None]

    def check_integrity(self) -> None:
        for job_id, promise in self._promises.items():
            assert self._decoding.booked(promise.decode, job_id), "a promise is booked"
            assert promise.prefill != promise.decode, "two workers"
            assert job_id in self._promised[promise.decode], "it is known to whom"
        assert sum(map(len, self._promised.values())) == len(self._promises), "and to nobody else"


class Promise(NamedTuple):
    """`job` is on `prefill` and will move to `decode`."""

    prefill: str
    decode: str
    job: Job


def price_of(route: Route) -> float:
    """What `route`'s worker costs, in prompt tokens."""
    score = route.score
    return 0.0 if score is None else score.price
