"""Runs a plan: tensors in, one forward pass, tokens out.

Invariant: the runner keeps no state between steps but the KV pool, so a step that failed half way
leaves nothing to repair: what it wrote lies in blocks that no hash names yet. Only rows that
sample go through the output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from headrace.types import BLOCK_TOKENS, Sampling
from headrace_worker.attention.interface import AttentionBackend, AttentionBatch
from headrace_worker.model import Llama
from headrace_worker.policy.scheduler import PlanItem
from headrace_worker.sampling.sampler import SamplingRow, sample


class NonFiniteLogits:
    """The result of a row whose logits have no finite maximum: there is nothing to choose."""


NON_FINITE = NonFiniteLogits()
Sampled = int | None | NonFiniteLogits
"""A plan item's result: its token, None where it does not sample, or NON_FINITE."""


class Runner:
    """One model over one attention backend."""

    def __init__(self, model: Llama, backend: AttentionBackend) -> None:
        self._model = model
        self._backend = backend

    def run(self, items: Sequence[PlanItem], samplings: Mapping[str, Sampling]) -> list[Sampled]:
        """Computes `items`; the result has one entry for each, in their order.

        `samplings` by sequence id.
        """
        # the attention interface wants single rows first
        order = sorted(range(len(items)), key=lambda i: items[i].count > 1)
        ordered = [items[i] for i in order]
        sampling = [(i, item) for i, item in zip(order, ordered, strict=True) if item.samples]
        rows = [self._row(item, samplings[item.sequence.id]) for _, item in sampling]
        with torch.inference_mode():
            logits = self._forward(ordered)
            tokens = sample(logits, rows) if logits is not None else []
        results: list[Sampled] = [None] * len(items)
        for (i, _), token in zip(sampling, tokens, strict=True):
            results[i] = NON_FINITE if token is None else token
        return results

    @staticmethod
    def _row(item: PlanItem, sampling: Sampling) -> SamplingRow:
        return SamplingRow(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            position=item.sequence.output_tokens,
        )

    def _forward(self, items: Sequence[PlanItem]) -> torch.Tensor | None:
        """Logits of the rows that sample, [M, vocab]; None when there are none."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, rows = [0], []
        for item in items:
            sequence, stop = item.sequence, item.start + item.count
            span = range(item.start, stop)
            tokens += sequence.tokens[item.start : stop]
            positions += span
            blocks = sequence.blocks
            slots += [blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in span]
            starts.append(len(tokens))
            if item.samples:
                rows.append(len(tokens) - 1)
        attend = self._backend.prepare(
            AttentionBatch(
                block_tables=[item.sequence.blocks for item in items],
                lengths=[item.start + item.count for item in items],
                query_starts=starts,
                slots=torch.tensor(slots),
            )
        )
        logits: torch.Tensor = self._model(
            torch.tensor(tokens),
            torch.tensor(positions),
            None if len(rows) == len(tokens) else torch.tensor(rows, dtype=torch.int64),
            attend,
        )
        return logits if rows else None
