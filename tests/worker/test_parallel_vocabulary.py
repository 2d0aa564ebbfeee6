"""Tokens from a vocabulary in parts are those of the whole one, and few numbers travel for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headrace.types import Sampling
from headrace_worker.parallel.collective import Counts, SharedGroup
from headrace_worker.parallel.shape import run_of
from headrace_worker.parallel.vocabulary import NOTHING, OPEN, Verdict, Vocabulary
from headrace_worker.parallel.wishes import Need, Wishes, need_of, wishes_of
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.sampler import Row, sample
from worker.ranks import together

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.05},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 40},
    "top_k 1": {"top_k": 1},
    "large top_k": {"top_k": 300},
    "top_p": {"top_p": 0.9},
    "narrow top_p": {"top_p": 0.2, "temperature": 0.7},
    "wide top_p": {"top_p": 0.999},
    "min_p": {"min_p": 0.1},
    "tiny min_p": {"min_p": 1e-5},
    "all filters": {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    "min_p and top_p": {"min_p": 0.05, "top_p": 0.7},
    "typical_p": {"typical_p": 0.5},
    "penalty": {"presence_penalty": 1.0},
    "bias": {"temperature": 0.0, "logit_bias": ((7, 50.0),)},
}


def row_of(vocab: int, seed: int, **options: Any) -> Row:
    sampling = Sampling(max_tokens=9, seed=seed, **options)
    return Row(Choosing(sampling, [1, 2, 3, 4], 2, frozenset(), vocab))


def settle(verdict: Verdict, rows: list[Row]) -> list[int | None]:
    """The tokens of a verdict, those of whole rows chosen as ever."""
    left = np.flatnonzero(verdict.tokens == OPEN).tolist()
    chosen = iter(sample(verdict.whole, [rows[i] for i in left]) if left else [])
    found: list[int | None] = []
    for token in verdict.tokens.tolist():
        if token == OPEN:
            one = next(chosen)
            found.append(None if one is None else one.token)
        else:
            found.append(None if token == NOTHING else token)
    return found


def choose(
    logits: torch.Tensor, rows: list[Row], ranks: int
) -> tuple[list[int | None], Verdict, Counts]:
    """Tokens, the verdict they come from, and what the first rank received for it."""
    vocab = logits.shape[1]
    runs = [run_of(vocab, ranks, i, 8) for i in range(ranks)]
    wishes = Wishes.unpack(wishes_of(rows, vocab).pack())

    def work(group: SharedGroup) -> tuple[Verdict | None, Counts]:
        run = runs[group.rank]
        part = logits[:, run.start : run.stop].clone()
        return Vocabulary(runs, group).choose(part, wishes), group.counts

    results = together(ranks, work)
    assert [verdict for verdict, _ in results[1:]] == [None] * (ranks - 1)
    verdict, counts = results[0]
    assert verdict is not None
    return settle(verdict, rows), verdict, counts


def whole(logits: torch.Tensor, rows: list[Row]) -> list[int | None]:
    with torch.inference_mode():
        return [c and c.token for c in sample(logits.clone(), rows)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("vocab", [33, 311, 5000])
def test_tokens_are_those_of_the_whole_row(vocab: int, ranks: int) -> None:
    """Every kind of sampling, flat and steep rows, ties, tokens that are ruled out."""
    torch.manual_seed(vocab + ranks)
    rows = [row_of(vocab, seed, **options) for seed in range(12) for options in KINDS.values()]
    scales = torch.tensor([0.1, 1.0, 4.0])[torch.arange(len(rows)) % 3]
    logits = torch.randn(len(rows), vocab) * scales[:, None]
    logits[::4] = logits[::4].bfloat16().float()  # plenty of equal ones
    logits[::7, 5:] = logits[::7, 5:].masked_fill(torch.rand(vocab - 5) < 0.5, -torch.inf)
    found, _, _ = choose(logits, rows, ranks)
    assert found == whole(logits, rows)


def test_most_rows_are_settled_without_being_whole() -> None:
    """Few numbers travel: of 5,000 logits a greedy row takes 2, a drawn one some hundred."""
    torch.manual_seed(1)
    logits = torch.randn(240, 5000) * 4
    limits = {"greedy": 2, "plain": 250, "top_k": 90, "top_p": 700, "min_p": 600}
    for kind, limit in limits.items():
        rows = [row_of(5000, seed, **KINDS[kind]) for seed in range(len(logits))]
        _, verdict, counts = choose(logits, rows, 2)
        assert (verdict.tokens == OPEN).mean() < 0.05, kind
        assert counts.bytes / 4 / len(rows) <= limit, kind


def test_what_is_near_an_edge_is_fetched() -> None:
    """A draw on the very edge between two tokens is not left to rounding."""
    vocab = 64
    rows = [row_of(vocab, seed) for seed in range(40)]
    wishes = wishes_of(rows, vocab)
    logits = torch.full((len(rows), vocab), -40.0)
    numbers = wishes.numbers[:, 0]
    # two groups of weight; their edge is where the row's own number falls
    logits[:, 0] = torch.from_numpy(np.log(numbers))
    logits[:, 1] = torch.from_numpy(np.log1p(-numbers))
    found, verdict, _ = choose(logits, rows, 2)
    assert (verdict.tokens == OPEN).all()
    assert found == whole(logits, rows)


@pytest.mark.parametrize("kind", ["greedy", "plain", "top_k", "top_p"])
def test_rows_that_are_no_numbers_choose_nothing(kind: str) -> None:
    rows = [row_of(200, seed, **KINDS[kind]) for seed in range(4)]
    logits = torch.randn(4, 200)
    logits[0, 150] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 100:] = -torch.inf  # a rank of which nothing is possible
    found, _, _ = choose(logits, rows, 2)
    assert found[:3] == [None] * 3
    assert found == whole(logits, rows)


def test_whoever_changes_or_reads_logits_gets_them_whole() -> None:
    needs = {kind: need_of(row_of(5000, 1, **options), 5000) for kind, options in KINDS.items()}
    assert [kind for kind, need in needs.items() if need is Need.WHOLE] == [
        "large top_k", "typical_p", "penalty", "bias",
    ]  # fmt: skip
    assert need_of(row_of(5000, 1, logprobs=0), 5000) is Need.WHOLE
    masked = Row(row_of(5000, 1).choosing, mask=np.zeros(157, np.int32))
    assert need_of(masked, 5000) is Need.WHOLE
