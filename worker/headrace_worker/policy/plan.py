"""What one step computes: the frozen plan, its draft, and what came of it.

Invariant: a plan never has more rows than the step's budget, no more of prompts than they may have
beside streams, and no more of lower bands' prompts than they may have beside a better band.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from headrace.policy.cost_model import attended
from headrace.types import FinishReason
from headrace_worker.policy.blocks import CachedBlock
from headrace_worker.policy.pace import TOKENS_UNLIMITED
from headrace_worker.policy.sequence import Sequence

ITEMS_MAX = 1 << 20
"""More than any plan has."""


class StepShape(NamedTuple):
    """What a step computes, as `CostModel.step_duration_ms` counts it.

    `decode_context`: tokens of KV that the decoding rows read. `prefill_context`: pairs of a
    prefill token and a token that it attends to.
    """

    prefill_tokens: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    prefill_context: float = 0.0


NO_SHAPE = StepShape()
"""Nothing is computed."""


@dataclass(frozen=True, slots=True)
class PlanItem:
    """Compute KV for `count` tokens of `sequence` from `start`; `samples`: then choose the next.

    `guess` are tokens that may follow the known ones: they are computed as if they did, and a
    token is chosen after each of them as well.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    guess: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.count + len(self.guess)

    @property
    def scored_rows(self) -> range:
        """Positions in this item whose probabilities are wanted and not known yet."""
        sequence = self.sequence
        first = max(self.start, sequence.scored)
        return range(first, max(first, min(self.start + self.count, sequence.scoring)))

    @property
    def prefill_tokens(self) -> int:
        """Tokens computed that are no output of the step before: all but a stream's last one."""
        streams = self.samples and self.start >= self.sequence.prompt_tokens
        return self.count - streams


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. `evicted` blocks hold their old KV until the step writes to them.

    `hurried`: lower bands were left out for a better band's prompt.
    """

    items: tuple[PlanItem, ...]
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]
    evicted: tuple[CachedBlock, ...]
    hurried: bool = False

    @property
    def tokens(self) -> int:
        return sum(item.rows for item in self.items)

    def row_counts(self) -> tuple[int, int, int]:
        """Rows of prompts' chunks; of streams, guesses included; of these the guesses."""
        prompts = streams = guessed = 0
        for item in self.items:
            if item.count > 1:
                prompts += item.count
            else:
                streams += item.rows
                guessed += len(item.guess)
        return prompts, streams, guessed

    @property
    def shape(self) -> StepShape:
        prefill = rows = context = 0
        pairs = 0.0
        for item in self.items:
            tokens = item.prefill_tokens
            if tokens:
                prefill += tokens
                pairs += attended(item.start, tokens)
            if tokens < item.count:
                rows += 1
                context += item.start + item.count
        return StepShape(prefill, rows, context, pairs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gave one sequence.

    `tokens`: new output, of which all but the last had been guessed. `blocks`: its full blocks,
    head first, when it ended.
    """

    sequence: Sequence
    tokens: tuple[int, ...]
    ending: FinishReason | None
    blocks: tuple[int, ...] = ()


class Draft:
    """The plan in the making. Of prompts of bands worse than `guarded`, `lower_left` tokens fit,
    of all prompts beside streams `beside_left`.

    `under_way`: sequences that another plan is computing; `items_max`: how many this one may have.
    """

    def __init__(
        self,
        now: int,
        budget: int,
        guarded: int,
        lower_left: int,
        under_way: Collection[str] = (),
        items_max: int = ITEMS_MAX,
    ) -> None:
        self.now = now
        self.under_way = under_way
        self._items_max = items_max
        self.budget = budget
        self.guarded = guarded
        self.lower_left = lower_left
        self.beside_left = TOKENS_UNLIMITED
        self.blocked = False
        """Whether somebody did not fit: nobody behind is let in."""
        self.items: dict[str, PlanItem] = {}
        self.admitted: dict[str, Sequence] = {}
        self.preempted: dict[str, Sequence] = {}

    def room(self, sequence: Sequence) -> int:
        """How many of its tokens this step may compute."""
        if len(self.items) >= self._items_max:
            return 0
        if not sequence.lacks_prompt():
            return self.budget
        room = min(self.budget, self.beside_left)
        return min(room, self.lower_left) if self._limits(sequence) else room

    def _limits(self, sequence: Sequence) -> bool:
        return sequence.band > self.guarded and sequence.lacks_prompt()

    def add(self, sequence: Sequence, count: int) -> None:
        samples = count == sequence.pending and sequence.known < sequence.tokens_max
        self.items[sequence.id] = PlanItem(sequence, sequence.computed, count, samples)
        self.budget -= count
        if sequence.lacks_prompt():
            self.beside_left -= count
        if self._limits(sequence):
            self.lower_left -= count

    def drop(self, sequence: Sequence) -> None:
        item = self.items.pop(sequence.id, None)
        if item is not None:
            self.budget += item.rows
        if self.admitted.pop(sequence.id, None) is None:
            self.preempted[sequence.id] = sequence
