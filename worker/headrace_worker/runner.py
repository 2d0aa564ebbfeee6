"""Runs plans: numbers in, one forward pass each, tokens out.

Invariant: plans end in the order in which they began; whoever computes them sees numbers only (see
step_inputs.py), and tokens are chosen here, from the job's own options. Only rows that somebody
wants to see go through the output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.types import TokenLogprobs
from headrace_worker.executor import Steps
from headrace_worker.policy.plan import PlanItem
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.logprobs import position_logprobs
from headrace_worker.sampling.sampler import Chosen, Row, sample
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


class Runner:
    """Plans over whoever computes their steps."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    @property
    def depth(self) -> int:
        """How many plans may be under way at a time."""
        return self._steps.depth

    def begin(self, items: Sequence[PlanItem]) -> None:
        """Submits a plan's items; `finish` with the same ones follows, in the same order."""
        with torch.inference_mode():
            self._steps.submit(inputs_of(items))

    def finish(self, items: Sequence[PlanItem], asks: Mapping[str, Ask]) -> list[Ran]:
        """What came of `items`: one entry for each, in their order.

        `asks` by sequence id.
        """
        with torch.inference_mode():
            return _read(self._steps.collect(), items, asks)


def _read(
    logits: torch.Tensor | None, items: Sequence[PlanItem], asks: Mapping[str, Ask]
) -> list[Ran]:
    """Scores and tokens from the logits of a plan's wanted rows."""
    ran = [Ran() for _ in items]
    if logits is None:
        return ran
    at, sampled, rows = 0, [], []
    for i, item in enumerate(items):
        ask, scored = asks[item.sequence.id], len(item.scored_rows)
        if scored:
            ran[i].scored = _score(item, logits[at : at + scored], ask)
        at += scored
        if item.samples:
            made = _rows(item, ask)
            rows += made
            sampled += [(i, at + place) for place in range(len(made))]
            at += len(made)
    if len(rows) < len(logits):
        logits = logits[[place for _, place in sampled]]
    for (i, _), chosen in zip(sampled, sample(logits, rows) if rows else [], strict=True):
        ran[i].chosen.append(chosen)
    return ran


def _score(item: PlanItem, logits: torch.Tensor, ask: Ask) -> list[TokenLogprobs | None]:
    span = item.scored_rows
    following = item.sequence.tokens[span.start + 1 : span.stop + 1]
    return position_logprobs(logits, following, ask.prompt_top)


def _rows(item: PlanItem, ask: Ask) -> list[Row]:
    """The rows of an item that samples: after its known tokens, and after each guessed one."""
    return [
        Row(ask.choosing, item.guess[:place], ask.masks[place] if ask.masks else None)
        for place in range(1 + len(item.guess))
    ]
