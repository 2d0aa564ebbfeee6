"""Runs a plan: tensors in, one forward pass, tokens out.

Invariant: the runner keeps no state between steps but the KV pool, so a step that failed half way
leaves nothing to repair: what it wrote lies in blocks that no hash names yet. Only rows that
somebody wants to see go through the output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.types import BLOCK_TOKENS, TokenLogprobs
from headrace_worker.attention.interface import AttentionBackend, AttentionBatch
from headrace_worker.model import Decoder
from headrace_worker.policy.plan import PlanItem
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.logprobs import position_logprobs
from headrace_worker.sampling.sampler import Chosen, Row, sample

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
    """One model over one attention backend."""

    def __init__(self, model: Decoder, backend: AttentionBackend) -> None:
        self._model = model
        self._backend = backend

    def run(self, items: Sequence[PlanItem], asks: Mapping[str, Ask]) -> list[Ran]:
        """Computes `items`; the result has one entry for each, in their order.

        `asks` by sequence id.
        """
        ran = [Ran() for _ in items]
        with torch.inference_mode():
            logits = self._forward(items)
            if logits is None:
                return ran
            at, sampled, rows = 0, [], []
            for i, item in enumerate(items):
                ask, scored = asks[item.sequence.id], len(item.scored_rows)
                if scored:
                    ran[i].scored = self._score(item, logits[at : at + scored], ask)
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

    @staticmethod
    def _score(item: PlanItem, logits: torch.Tensor, ask: Ask) -> list[TokenLogprobs | None]:
        span = item.scored_rows
        following = item.sequence.tokens[span.start + 1 : span.stop + 1]
        return position_logprobs(logits, following, ask.prompt_top)

    def _forward(self, items: Sequence[PlanItem]) -> torch.Tensor | None:
        """Logits of the rows that are scored or sample, [M, vocab]; None when there are none.

        For each item first those that are scored, then those that sample.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, rows = [0], []
        for item in items:
            sequence, stop = item.sequence, item.start + item.count
            first = len(tokens)
            span = range(item.start, item.start + item.rows)
            tokens += sequence.tokens[item.start : stop]
            tokens += item.guess
            positions += span
            blocks = sequence.blocks
            slots += [blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in span]
            starts.append(len(tokens))
            rows += [first + position - item.start for position in item.scored_rows]
            if item.samples:
                rows += range(first + item.count - 1, len(tokens))
        attend = self._backend.prepare(
            AttentionBatch(
                block_tables=[item.sequence.blocks for item in items],
                lengths=[item.start + item.rows for item in items],
                query_starts=starts,
                slots=torch.tensor(slots),
            )
        )
        every = rows == list(range(len(tokens)))
        logits: torch.Tensor = self._model(
            torch.tensor(tokens),
            torch.tensor(positions),
            None if every else torch.tensor(rows, dtype=torch.int64),
            attend,
        )
        return logits if rows else None


def _rows(item: PlanItem, ask: Ask) -> list[Row]:
    """The rows of an item that samples: after its known tokens, and after each guessed one."""
    return [
        Row(ask.choosing, item.guess[:place], ask.masks[place] if ask.masks else None)
        for place in range(1 + len(item.guess))
    ]
