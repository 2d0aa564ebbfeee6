"""The decision where a job goes, and what it was chosen among.

Invariant: a route says who got the job and why; its candidates and answers are kept as they were
found, and become scores with verdicts only where somebody reads them (a trace, a pair of workers).
Rejected: making a Score for each candidate at once, of which a gateway without traces reads none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from headrace_gateway.policy.bookings import NO_SLOT, Room
from headrace_gateway.policy.fetching import NOTHING as NOTHING_SPARED
from headrace_gateway.policy.fetching import Spared

COSTS_MORE = "costs more"
"""The verdict where nobody had to ask for one."""


class Score(NamedTuple):
    """A candidate; the smaller is the better one.

    `price` is what decides, in prompt tokens: `cost`, which is of `uncached_tokens` that it would
    compute and of `work` that waits and decodes there, and what new blocks cost where more than
    the mean was given lately (`share`, in parts of it). It holds `blocks` leading blocks of the
    prompt and has `jobs`. `verdict` says why it did (not) win.
    """

    price: float
    order: int
    worker: str
    blocks: int
    uncached_tokens: int
    work: float
    cost: float
    share: float
    jobs: int
    verdict: str = COSTS_MORE


Facts = tuple[float, int, str, int, int, float, float, float, int]
"""A Score before it is read, without its verdict: plain tuples are made and taken apart faster."""


class Answer(NamedTuple):
    """What room a worker has, whether its turn has to be waited for, and why."""

    room: Room
    patient: bool
    words: str


NO_SCORES: Mapping[str, Facts] = MappingProxyType({})
NO_ANSWERS: Mapping[str, Answer] = MappingProxyType({})
FULL = Answer(NO_SLOT.room, False, NO_SLOT.reason)


class Route(NamedTuple):
    """The decision: a worker, or '' when the job has to wait; the reason; who was considered.

    The worker holds `cached_blocks` leading blocks of the prompt. What no worker holds and the
    cache services do was `spared` everywhere. `candidates` and what those `answers` that were asked
    are read together, as `scores`, where somebody wants to know.
    """

    worker: str
    reason: str
    cached_blocks: int = 0
    room: Room = Room.NONE
    candidates: Mapping[str, Facts] = NO_SCORES
    answers: Mapping[str, Answer] = NO_ANSWERS
    spared: Spared = NOTHING_SPARED

    @property
    def scores(self) -> tuple[Score, ...]:
        """The candidates in the order in which they were looked at, with their verdicts."""
        return tuple(map(self._score, self.candidates))

    @property
    def score(self) -> Score | None:
        """The worker's own."""
        return self._score(self.worker) if self.worker in self.candidates else None

    def _score(self, worker: str) -> Score:
        answer = self.answers.get(worker)
        return Score(*self.candidates[worker], COSTS_MORE if answer is None else answer.words)
