"""Runs plans: numbers in, one forward pass each, tokens out.

Invariant: plans end in the order in which they began; whoever computes them sees numbers only (see
step_inputs.py), and tokens are chosen here, from the job's own options. Only rows that somebody
wants to see go through the output head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headrace.types import TokenLogprobs
from headrace_worker import native
from headrace_worker.executor import Steps
from headrace_worker.native.abi import Library
from headrace_worker.native.program import Scored
from headrace_worker.parallel.vocabulary import OPEN, Verdict
from headrace_worker.parallel.wishes import wishes_of
from headrace_worker.policy.plan import PlanItem
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.logprobs import position_logprobs
from headrace_worker.sampling.ranking import Floats
from headrace_worker.sampling.sampler import Chosen, Row, draws_of, sample
from headrace_worker.step_inputs import inputs_of

Mask = NDArray[np.int32]
"""Which tokens a grammar allows: a bit for each, [ceil(vocab / 32)]."""


@dataclass(frozen=True, slots=True)
class Ask:
    """How one sequence of a plan wants its rows to be read.

    `masks`: for the rows that sample, none where all tokens are allowed. `prompt_top`: how many
    most probable tokens to report for prompt positions that are scored.
    """

    choosing: Choosing
    masks: Sequence[Mask] = ()
    prompt_top: int = 0


@dataclass(slots=True)
class Ran:
    """What a step gave one plan item.

    `chosen`: for its last known token and each guessed one, None where no logit is a finite
    number; empty where it does not sample. `scored`: for its `scored_rows`, None likewise.
    """

    chosen: list[Chosen | None] = field(default_factory=list)
    scored: list[TokenLogprobs | None] = field(default_factory=list)

    def tokens(self) -> list[int]:
        """Those chosen before the first row that has none."""
        found: list[int] = []
        for choice in self.chosen:
            if choice is None:
                break
            found.append(choice.token)
        return found


@dataclass(frozen=True, slots=True)
class _Begun:
    """A plan that is being computed. `rows`: for each item those that sample."""

    items: Sequence[PlanItem]
    asks: Mapping[str, Ask]
    rows: Sequence[Sequence[Row]]

    def wanted(self) -> list[Row | None]:
        """For each wanted row of the step; None for those that are scored."""
        found: list[Row | None] = []
        for item, rows in zip(self.items, self.rows, strict=True):
            found += [None] * len(item.scored_rows)
            found += rows
        return found


class Runner:
    """Plans over whoever computes their steps."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._library = native.library()
        self._begun: deque[_Begun] = deque()

    @property
    def depth(self) -> int:
        """How many plans may be under way at a time."""
        return self._steps.depth

    def begin(self, items: Sequence[PlanItem], asks: Mapping[str, Ask]) -> None:
        """Submits a plan's items; `asks` by sequence id. What it raises has begun nothing."""
        begun = _Begun(items, asks, [_rows(item, asks[item.sequence.id]) for item in items])
        inputs = inputs_of(items)
        if self._steps.choosing_vocab:
            wishes = wishes_of(begun.wanted(), self._steps.choosing_vocab)
            inputs = inputs.wishing(wishes)
        elif self._library is not None and self._steps.draws:
            inputs = inputs.drawing(draws_of(begun.wanted()))
        self._steps.submit(inputs)
        self._begun.append(begun)

    def finish(self) -> list[Ran]:
        """What came of the oldest plan: one entry for each item, in their order."""
        begun = self._begun.popleft()
        answer = self._steps.collect()
        return (
            [Ran() for _ in begun.items] if answer is None else _read(answer, begun, self._library)
        )


def _read(answer: Tensor | Scored | Verdict, begun: _Begun, library: Library | None) -> list[Ran]:
    """Scores and tokens of a plan's wanted rows."""
    settled = tops = None
    drawn: Mapping[int, int] = {}
    logits: Tensor | Floats
    if isinstance(answer, Scored):  # no torch from here on: its code is cold after a step
        logits, tops, drawn = answer.logits, answer.tops.tolist(), answer.drawn
    elif isinstance(answer, Verdict):
        logits, settled = answer.whole, answer.tokens.tolist()
    else:
        logits = answer
    ran = [Ran() for _ in begun.items]
    at, place = 0, 0  # among all wanted rows, and among those whose logits are here
    left: list[tuple[Ran, int, int, Row]] = []
    for got, item, rows in zip(ran, begun.items, begun.rows, strict=True):
        scored = len(item.scored_rows)
        if scored:
            ask = begun.asks[item.sequence.id]
            got.scored = _score(item, logits[place : place + scored], ask)
        at, place = at + scored, place + scored
        for row in rows:
            token = OPEN if settled is None else settled[at]
            got.chosen.append(Chosen(token) if token >= 0 else None)
            if token == OPEN:
                left.append((got, len(got.chosen) - 1, place, row))
                place += 1
            at += 1
    if 0 < len(left) < len(logits):
        places = [place for _, _, place, _ in left]
        logits = logits[places]
        tops = None if tops is None else [tops[place] for place in places]
        drawn = {at: drawn[place] for at, place in enumerate(places) if place in drawn}
    chosen = sample(logits, [row for *_, row in left], tops, library, drawn) if left else []
    for (got, index, _, _), choice in zip(left, chosen, strict=True):
        got.chosen[index] = choice
    return ran


def _score(item: PlanItem, logits: Tensor | Floats, ask: Ask) -> list[TokenLogprobs | None]:
    span = item.scored_rows
    following = item.sequence.tokens[span.start + 1 : span.stop + 1]
    return position_logprobs(logits, following, ask.prompt_top)


def _rows(item: PlanItem, ask: Ask) -> list[Row]:
    """The rows of an item that sample: after its known tokens, and after each guessed one."""
    if not item.samples:
        return []
    return [
        Row(ask.choosing, item.guess[:place], ask.masks[place] if ask.masks else None)
        for place in range(1 + len(item.guess))
    ]
