"""Choosing a token the slow way: lists, sorts, math in double precision, one row at a time.

It says what every option of Sampling means, and shares nothing with the sampler but the numbers
from (seed, position) and the shape of its tree. Where double and single precision may rightly part,
at the edge of a set or of a drawn interval, all tokens are named that are right.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.types import Sampling
from headrace_worker.sampling.draw import FAN
from headrace_worker.sampling.uniform import uniforms

EDGE = 2e-6
"""Relative distance to an edge within which single precision may fall on either side."""


@dataclass(frozen=True)
class Answer:
    """Tokens that may be chosen; `sharp` when precision leaves nothing open."""

    tokens: frozenset[int]
    sharp: bool


@dataclass(frozen=True)
class Text:
    """What a job has said when a row is chosen: `output` includes the draft."""

    prompt: Sequence[int]
    output: Sequence[int]
    ends: frozenset[int]


def choose(
    raw: Sequence[float], s: Sampling, text: Text, allowed: Sequence[bool] | None
) -> Answer | None:
    """The answer of one row; None when there is nothing to choose."""
    if any(math.isnan(x) for x in raw) or not math.isfinite(max(raw)):
        return None
    logits = edited(list(raw), s, text, allowed)
    best = max(logits)
    if best == -math.inf:
        return None
    if s.temperature == 0:
        return Answer(frozenset({logits.index(best)}), sharp=True)
    shares, sharp = distribution(logits, s)
    if not sharp:
        return Answer(frozenset(shares), sharp=False)
    widths = [len(raw)]
    numbers = uniforms([s.seed], [len(text.output)])[0].tolist()
    while widths[-1] > FAN and len(widths) < len(numbers):
        widths.append(math.ceil(widths[-1] / FAN))
    right = descended(shares, widths, numbers)
    return Answer(frozenset(right), len(right) == 1)


def descended(shares: dict[int, float], widths: list[int], numbers: list[float]) -> set[int]:
    """The tokens that may be drawn among `shares`: group by group, the smallest width first."""
    if not widths:
        return set(shares)
    groups: dict[int, dict[int, float]] = {}
    for token, share in shares.items():
        key = functools.reduce(operator.mod, widths, token)
        groups.setdefault(key, {})[token] = share
    whole, right, before = math.fsum(shares.values()), set[int](), 0.0
    for key in sorted(groups):
        after = before + math.fsum(groups[key].values()) / whole if whole else before
        if before - EDGE <= numbers[0] < after + EDGE and sum(groups[key].values()) > 0:
            right |= descended(groups[key], widths[:-1], numbers[1:])
        before = after
    return right


def edited(
    logits: list[float], s: Sampling, text: Text, allowed: Sequence[bool] | None
) -> list[float]:
    """Logits after mask, bias, bans and penalties, rounded to float32 as they are stored."""
    single = np.float32
    if allowed is not None:
        logits = [x if ok else -math.inf for x, ok in zip(logits, allowed, strict=True)]
    for token, bias in s.logit_bias:
        logits[token] = float(single(logits[token]) + single(bias))
    words = {word[-1] for word in s.bad_words if ends_with(text.output, word[:-1])}
    ends = text.ends if len(text.output) < s.min_tokens else frozenset()
    for banned in (words | ends, words, set()):
        left = [-math.inf if t in banned else x for t, x in enumerate(logits)]
        if max(left) > -math.inf:
            break
    for token in range(len(left)):
        x, count = left[token], list(text.output).count(token)
        if s.repetition_penalty != 1 and (count or token in text.prompt):
            x = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
        x = x - s.frequency_penalty * count
        x = x - s.presence_penalty * (count > 0)
        left[token] = float(single(x))
    return left


def ends_with(output: Sequence[int], start: Sequence[int]) -> bool:
    return list(output[len(output) - len(start) :]) == list(start) and len(start) <= len(output)


def distribution(logits: Sequence[float], s: Sampling) -> tuple[dict[int, float], bool]:
    """Probabilities of the tokens that the filters keep, by id; and whether that set is sharp."""
    best = max(logits)
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    weights = {t: math.exp((logits[t] - best) / s.temperature) for t in order}
    sharp = True
    if s.top_k:
        weights = {t: weights[t] for t in order[: s.top_k]}
    if s.min_p:
        sharp = all(abs(w - s.min_p) > EDGE * s.min_p for w in weights.values() if w < 1)
        weights = {t: w for t, w in weights.items() if w >= s.min_p}
    if s.typical_p < 1:
        shares = normalized(weights)
        entropy = -sum(p * math.log(p) for p in shares.values() if p)
        away = {t: abs(-math.log(p) - entropy) for t, p in shares.items() if p}
        by_distance = sorted(away, key=lambda t: (away[t], t))
        kept, sure = until(by_distance, shares, s.typical_p)
        left = [t for t in by_distance if t not in kept]
        near = left and away[left[0]] - away[kept[-1]] < EDGE * (1 + away[kept[-1]])
        same = left and logits[left[0]] == logits[kept[-1]]
        sharp = sharp and sure and (not near or bool(same))
        weights = {t: weights[t] for t in kept}
    if s.top_p < 1:
        kept, sure = until([t for t in order if t in weights], normalized(weights), s.top_p)
        sharp = sharp and sure
        weights = {t: weights[t] for t in kept}
    return normalized(weights), sharp


def until(order: list[int], shares: dict[int, float], mass: float) -> tuple[list[int], bool]:
    """The shortest start of `order` that has `mass`, and whether rounding cannot change it."""
    ends = []
    for aim in (mass * (1 - EDGE), mass, mass * (1 + EDGE)):
        sums = np.cumsum([shares[t] for t in order])
        ends.append(min(int((sums < aim).sum()) + 1, len(order)))
    return order[: ends[1]], ends[0] == ends[2]


def normalized(weights: dict[int, float]) -> dict[int, float]:
    whole = math.fsum(weights.values())
    return {t: w / whole for t, w in weights.items()}


def log_softmax(raw: Sequence[float]) -> list[float]:
    best = max(raw)
    return [x - best - math.log(math.fsum(math.exp(y - best) for y in raw)) for x in raw]
