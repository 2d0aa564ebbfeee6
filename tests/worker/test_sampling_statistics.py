"""Drawn tokens follow the model's distribution: filtered or not, with speculation or without.

Every experiment is repeatable: its seeds are fixed. Each also shows that it can fail, by holding
the same draws against distributions that are a little wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from headrace.types import Sampling
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.sampler import Row
from worker import sampling_reference as reference
from worker.both import sample

DRAWS = 20_000
FAIR = 1e-4
"""A fair experiment falls below this p-value once in 10,000."""
WRONG = 1e-6


def draws(logits: list[float], *, one_seed: bool, **options: Any) -> NDArray[np.int64]:
    """How often each token comes: positions of one job, or first tokens of many."""
    counts = np.zeros(len(logits), np.int64)
    tokens = [0] * (DRAWS + 1)
    batch = torch.tensor([logits])
    for start in range(0, DRAWS, 1000):
        rows = []
        for i in range(start, start + 1000):
            seed, said = (5, i) if one_seed else (i, 0)
            sampling = Sampling(max_tokens=DRAWS, seed=seed, **options)
            # an output of `said` tokens, which nothing here looks at
            choosing = Choosing(sampling, tokens, len(tokens) - said, frozenset(), len(logits))
            rows.append(Row(choosing))
        chosen = sample(batch.expand(1000, -1), rows)
        counts += np.bincount([c.token for c in chosen if c], minlength=len(logits))
    assert counts.sum() == DRAWS
    return counts


def p_value(counts: NDArray[np.int64], shares: dict[int, float]) -> float:
    """Of Pearson's chi-square test; tokens expected fewer than 5 times count as one."""
    expected = np.zeros(len(counts))
    expected[list(shares)] = list(shares.values())
    expected *= counts.sum()
    if counts[expected == 0].sum():
        return 0.0
    rare = expected < 5
    pairs = [(c, e) for c, e, r in zip(counts, expected, rare, strict=True) if not r]
    if expected[rare].sum() > 0:
        pairs.append((int(counts[rare].sum()), float(expected[rare].sum())))
    seen, hoped = np.array(pairs).T
    statistic = ((seen - hoped) ** 2 / hoped).sum()
    return float(stats.chi2.sf(statistic, max(1, len(pairs) - 1)))


SMALL = [0.3, 1.2, -0.5, 2.0, 0.0, 0.9, 1.1, -1.0, 0.4, 1.7]
LARGE = (np.random.default_rng(11).standard_normal(700) * 1.5).astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("logits", "options"),
    [
        (SMALL, {"temperature": 1.0}),
        (LARGE, {"temperature": 0.8}),
        (SMALL, {"temperature": 0.5, "top_k": 4}),
        (LARGE, {"temperature": 1.0, "top_k": 40}),
        (SMALL, {"temperature": 1.0, "top_p": 0.8}),
        (LARGE, {"temperature": 1.0, "top_p": 0.6}),
        (SMALL, {"temperature": 1.2, "min_p": 0.25}),
        (SMALL, {"temperature": 1.0, "typical_p": 0.7}),
        (LARGE, {"temperature": 1.0, "typical_p": 0.4}),
        (SMALL, {"temperature": 1.5, "top_k": 8, "min_p": 0.1, "typical_p": 0.9, "top_p": 0.8}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else f"{len(value)} tokens",
)
def test_frequencies_follow_the_filtered_softmax(
    logits: list[float], options: dict[str, Any]
) -> None:
    """Chi-square of 20,000 draws; a hotter model and a set with one token less do not pass."""
    one_seed = len(logits) == len(SMALL)
    counts = draws(logits, one_seed=one_seed, **options)
    shares, sharp = reference.distribution(logits, Sampling(max_tokens=9, **options))
    assert sharp and p_value(counts, shares) > FAIR
    hotter = options | {"temperature": options["temperature"] * 1.2}
    warm, _ = reference.distribution(logits, Sampling(max_tokens=9, **hotter))
    assert p_value(counts, warm) < WRONG
    if len(logits) == len(SMALL):
        fewer = dict(sorted(shares.items(), key=lambda item: item[1])[1:])
        assert p_value(counts, reference.normalized(fewer)) < WRONG
    if len(options) > 1:
        free, _ = reference.distribution(
            logits, Sampling(max_tokens=9, temperature=options["temperature"])
        )
        assert p_value(counts, free) < WRONG


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Pairs of tokens at positions i and i + 1, and of seeds s and s + 1: no chi-square link."""
    jobs, length, vocab = 100, 100, 4
    batch = torch.tensor([[0.1, 0.9, 0.0, 0.4]])
    grid = np.zeros((jobs, length), np.int64)
    tokens = [0] * (length + 1)
    for seed in range(jobs):
        sampling = Sampling(max_tokens=length, seed=seed)
        rows = [
            Row(Choosing(sampling, tokens, len(tokens) - i, frozenset(), vocab))
            for i in range(length)
        ]
        chosen = sample(batch.expand(length, -1), rows)
        grid[seed] = [c.token for c in chosen if c]
    for first, second in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        table = np.zeros((vocab, vocab))
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        assert stats.chi2_contingency(table).pvalue > FAIR
    assert stats.chi2_contingency(table + np.diag([200] * vocab)).pvalue < WRONG


class Markov:
    """A language model whose next token depends on the last one."""

    VOCAB, START, END = 12, 0, 11

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(4)
        self.table = torch.randn(self.VOCAB, self.VOCAB, generator=source) * 2

    def say(self, sampling: Sampling, draft_max: int) -> tuple[list[int], int, int]:
        """(output, draft tokens accepted, refused) of one job; no draft at all with `draft_max` 0.

        The draft is what followed the last token when it was last said.
        """
        tokens, accepted, refused = [self.START, 3, 5], 0, 0
        ends = frozenset({self.END})
        choosing = Choosing(sampling, tokens, prompt := len(tokens), ends, self.VOCAB)
        while len(tokens) - prompt < sampling.max_tokens:
            draft = self.guess(tokens, draft_max)
            after = [tokens[-1], *draft]
            rows = [Row(choosing, draft[:n]) for n in range(len(draft) + 1)]
            for place, choice in enumerate(sample(self.table[after], rows)):
                assert choice is not None
                tokens.append(choice.token)
                if choice.token in ends:
                    return tokens[prompt : prompt + sampling.max_tokens], accepted, refused
                if place < len(draft) and choice.token != draft[place]:
                    refused += 1
                    break
                accepted += place < len(draft)
        return tokens[prompt : prompt + sampling.max_tokens], accepted, refused

    @staticmethod
    def guess(tokens: list[int], draft_max: int) -> tuple[int, ...]:
        earlier = [i for i, token in enumerate(tokens[:-1]) if token == tokens[-1]]
        return tuple(tokens[earlier[-1] + 1 :][:draft_max]) if earlier else ()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "min_tokens": 20},
        {"temperature": 0.0, "frequency_penalty": 0.4, "presence_penalty": 0.3, "min_tokens": 50},
        {"temperature": 1.2, "repetition_penalty": 1.3, "typical_p": 0.9, "min_tokens": 50},
        {"temperature": 0.9, "bad_words": ((3, 5), (7,), (2, 2, 2)), "min_tokens": 50},
    ],
    ids=str,
)
def test_speculation_says_the_same(options: dict[str, Any]) -> None:
    """Token for token, whatever was guessed; guesses are both taken and refused."""
    model, accepted, refused = Markov(), 0, 0
    for seed in range(15):
        sampling = Sampling(max_tokens=60, seed=seed, **options)
        plain, *_ = model.say(sampling, 0)
        assert plain == model.say(sampling, 0)[0], "repeatable"
        for draft_max in (1, 4):
            output, right, wrong = model.say(sampling, draft_max)
            assert output == plain
            accepted, refused = accepted + right, refused + wrong
    assert accepted > 0 and refused > 0


def test_speculation_keeps_the_distribution() -> None:
    """What follows each token, over 400 speculating jobs, follows the model's own table."""
    model, follows = Markov(), Counter[tuple[int, int]]()
    for seed in range(400):
        output, *_ = model.say(Sampling(max_tokens=40, seed=seed), 3)
        follows.update(zip([5, *output], output, strict=False))
    for token in range(model.VOCAB):
        counts = np.array([follows[token, after] for after in range(model.VOCAB)])
        if counts.sum() < 500:
            continue
        logits = model.table[token].tolist()
        shares, _ = reference.distribution(logits, Sampling(max_tokens=9))
        assert p_value(counts, shares) > FAIR
        flat, _ = reference.distribution(logits, Sampling(max_tokens=9, temperature=1.5))
        assert p_value(counts, flat) < WRONG
    assert sum(follows.values()) > 5000 and math.isfinite(sum(follows.values()))
