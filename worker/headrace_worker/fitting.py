"""From timed steps to a cost model: the terms of `headrace.policy.cost_model`, none negative.

Invariant: the fit weighs each step's error by its duration, a decode step of 20 ms counts as much
as a prefill step of 800 ms, and is right on average: steps of one composition are averaged before
their relative errors are squared, as single ones, which a busy machine makes late and never early,
would draw the model below their mean. Rejected: medians of a serving worker's steps, since callers
wait for the late ones too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import mul

import numpy as np

from headrace.policy.cost_model import CONTEXT_UNIT_TOKENS, PREFILL_CONTEXT_UNIT, CostModel
from headrace_worker.policy.plan import StepShape

TERMS = (
    "step_ms",
    "prefill_token_ms",
    "decode_row_ms",
    "decode_context_ms",
    "prefill_context_ms",
    "batch_ms",
)
GROUP_STEPS_MIN = 5
"""A composition that was seen less often is not reported; it counts for what it is."""
SAME_LOSS = 1e-6
_CONTEXT_BUCKET = 512
"""Steps whose rows read so many tokens more are of another composition."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a CostModel says of its worker beside the times."""

    kv_tokens: int
    max_jobs: int
    step_tokens: int
    name: str


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a step of some composition takes: the mean of `count` of them.

    `features`: what CostModel multiplies with TERMS, in their order and units.
    """

    kind: str
    features: tuple[float, ...]
    took_ms: float
    count: int = 1


def timing_of(shape: StepShape, took_ms: float) -> Timing:
    """One step."""
    prefill, rows, context, pairs = shape
    features = (
        1.0,
        float(prefill),
        float(rows),
        context / CONTEXT_UNIT_TOKENS,
        pairs / PREFILL_CONTEXT_UNIT,
        float(prefill + rows > 1),
    )
    return Timing(_kind(shape), features, took_ms)


def grouped(steps: Iterable[tuple[StepShape, float]]) -> list[Timing]:
    """The means of steps (shape, ms) whose compositions are about the same."""
    groups: dict[tuple[int, ...], list[Timing]] = {}
    for shape, took_ms in steps:
        prefill, rows, context, pairs = shape
        before = int(pairs / prefill).bit_length() if prefill else 0
        key = (prefill.bit_length(), rows, context // _CONTEXT_BUCKET, before)
        groups.setdefault(key, []).append(timing_of(shape, took_ms))
    return [
        Timing(
            some[0].kind,
            tuple(statistics.fmean(s.features[term] for s in some) for term in range(len(TERMS))),
            statistics.fmean(step.took_ms for step in some),
            len(some),
        )
        for some in groups.values()
    ]


def _kind(shape: StepShape) -> str:
    if shape.prefill_tokens and shape.decode_rows:
        return "mixed"
    return "decode" if shape.decode_rows else "prefill"


def fit_terms(timings: Sequence[Timing]) -> tuple[float, ...]:
    """The values of TERMS, none negative, with the least sum of squared relative errors.

    Exact: the best non-negative solution is the best unrestricted one over some subset of the
    terms, and there are only 63 of them (Lawson and Hanson, "Solving Least Squares Problems", 1974,
    chapter 23). Raises ValueError without timings.
    """
    if not timings:
        raise ValueError("nothing was measured")
    took = np.array([timing.took_ms for timing in timings])
    weights = np.sqrt([timing.count for timing in timings])
    rows = np.array([timing.features for timing in timings]) * (weights / took)[:, None]
    best, best_loss = np.zeros(len(TERMS)), float((weights**2).sum())
    for size in range(1, len(TERMS) + 1):
        for subset in combinations(range(len(TERMS)), size):
            some = np.linalg.lstsq(rows[:, subset], weights, rcond=None)[0]
            if (some < 0).any():
                continue
            values = np.zeros(len(TERMS))
            values[list(subset)] = some
            loss = float(((rows @ values - weights) ** 2).sum())
            # a term that says nothing new (no step of one token was seen) is left out
            if loss < best_loss * (1 - SAME_LOSS):
                best, best_loss = values, loss
    return tuple(float(value) for value in best)


def fit(timings: Sequence[Timing], sizes: Sizes) -> CostModel:
    """The CostModel of a worker of these sizes. Raises SettingsError where it makes no sense."""
    terms = (round(value, 6) for value in fit_terms(timings))
    return CostModel(
        **dict(zip(TERMS, terms, strict=True)),
        kv_tokens=sizes.kv_tokens,
        max_jobs=sizes.max_jobs,
        step_tokens=sizes.step_tokens,
        name=sizes.name,
    )


def predicted_ms(model: CostModel, timing: Timing) -> float:
    """What `model` says of such a step."""
    terms: list[float] = [getattr(model, term) for term in TERMS]
    return float(sum(map(mul, terms, timing.features)))


@dataclass(frozen=True, slots=True)
class FitError:
    """How far a model is off for one kind of step, as shares of what was measured.

    `mean` and `worst` over `compositions`, `bias` over all `steps`.
    """

    kind: str
    compositions: int
    steps: int
    mean: float
    worst: float
    bias: float


def errors(model: CostModel, timings: Sequence[Timing]) -> list[FitError]:
    """One FitError for each kind of step that was measured."""
    found = []
    often = max(timing.count for timing in timings) >= GROUP_STEPS_MIN
    for kind in ("decode", "prefill", "mixed"):
        mine = [timing for timing in timings if timing.kind == kind]
        if not mine:
            continue
        total = sum(timing.took_ms * timing.count for timing in mine)
        bias = sum(predicted_ms(model, each) * each.count for each in mine) / total - 1
        some = [each for each in mine if each.count >= GROUP_STEPS_MIN or not often] or mine
        off = [abs(predicted_ms(model, each) / each.took_ms - 1) for each in some]
        steps = sum(each.count for each in mine)
        found.append(FitError(kind, len(some), steps, statistics.fmean(off), max(off), bias))
    return found


def report(model: CostModel, timings: Sequence[Timing]) -> str:
    """The terms and how well they say what was measured, for people."""
    terms = "\n".join(f"  {term:<20}{getattr(model, term):10.4f}" for term in TERMS)
    lines = [
        f"  {e.kind:<8} {e.compositions:>3} kinds of step ({e.steps} steps): off by {e.mean:6.1%} "
        f"on average, {e.worst:6.1%} at worst, bias {e.bias:+6.1%}"
        for e in errors(model, timings)
    ]
    return f"{model.name}\n{terms}\nthe model against what was measured\n" + "\n".join(lines)
