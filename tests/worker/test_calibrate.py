"""Calibration: the fit finds what made the times, and the engine's steps are what was planned."""

from __future__ import annotations

import random

import pytest

from headrace.errors import SettingsError
from headrace.policy.cost_model import CostModel
from headrace_worker.calibrate import (
    TERMS,
    Bench,
    Cell,
    Timing,
    cells,
    errors,
    fit,
    fit_terms,
    measure,
    predicted_ms,
    prepare,
    report,
)
from headrace_worker.engine import EngineConfig
from headrace_worker.loading import LoadedModel
from headrace_worker.settings import WorkerSettings

SIZES = {"kv_tokens": 90_000, "max_jobs": 32, "step_tokens": 512, "name": "made up"}
TRUTH = CostModel(50.0, 3.5, 5.0, 20.0, 1_300.0, batch_ms=30.0, **SIZES)
WANTED = cells(90_000, 8_192, 32, 512)


def timings_of(truth: CostModel, noise: float = 0.0, seed: int = 1) -> list[Timing]:
    dice = random.Random(seed)
    return [
        Timing(cell, predicted_ms(truth, cell) * (1 + dice.uniform(-noise, noise)))
        for cell in WANTED
    ]


def test_the_fit_finds_the_model_that_made_the_times() -> None:
    """Without noise every term comes back, and nothing is off."""
    found = fit(timings_of(TRUTH), **SIZES)
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(TRUTH, term), rel=1e-3)
    assert all(error.worst < 1e-3 for error in errors(found, timings_of(TRUTH)))


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_model_less_than_itself(seed: int) -> None:
    """Steps measured 10 % wrong, each its own way, give a model that is right within 8 %."""
    found = fit(timings_of(TRUTH, 0.1, seed), **SIZES)
    for cell in WANTED:
        assert predicted_ms(found, cell) == pytest.approx(predicted_ms(TRUTH, cell), rel=0.08)


def test_short_steps_count_as_much_as_long_ones() -> None:
    """One wild prefill step of seconds does not spoil what is known of decoding."""
    timings = timings_of(TRUTH)
    longest = max(timings, key=lambda timing: timing.took_ms)
    timings[timings.index(longest)] = Timing(longest.cell, longest.took_ms * 1.5)
    found = fit(timings, **SIZES)
    decode = next(error for error in errors(found, timings) if error.kind == "decode")
    assert decode.worst < 0.05


def test_no_term_is_negative() -> None:
    """Times that fall with the context are told as no cost of context, never as a negative one."""
    timings = [
        Timing(Cell(rows, context, 0, 0), 40.0 + rows - context / 1_000)
        for rows in (1, 4, 16)
        for context in (0, 512, 2_048)
    ]
    terms = dict(zip(TERMS, fit_terms(timings), strict=True))
    assert all(value >= 0 for value in terms.values())
    assert terms["decode_context_ms"] == 0
    assert terms["step_ms"] == pytest.approx(40, rel=0.1)


def test_nothing_measured_is_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        fit_terms([])


@pytest.mark.parametrize(
    ("kv_tokens", "context", "jobs", "step"),
    [
        (90_000, 8_192, 32, 512),
        (4_096, 512, 8, 64),
        (2_048, 2_048, 100, 128),
        (90_000, 8_192, 1, 16),
    ],
)
def test_cells_fit_the_worker(kv_tokens: int, context: int, jobs: int, step: int) -> None:
    """Whatever its sizes, no step is planned that it could not take."""
    wanted = cells(kv_tokens, context, jobs, step)
    assert len(wanted) == len(set(wanted))
    assert {"decode", "prefill"} <= {cell.kind for cell in wanted}
    for cell in wanted:
        assert cell.rows <= jobs and cell.rows + cell.chunk <= step
        assert cell.kv_tokens <= kv_tokens
        assert max(cell.context, cell.offset + cell.chunk) < context


def test_the_engine_takes_the_steps_that_were_planned(tiny: LoadedModel) -> None:
    """Every kind of step runs, KV of the past comes from imports, and the engine ends up empty."""
    config = EngineConfig(
        8_192, max_running=4, step_tokens_max=64, offer_blocks=False, speculation=False
    )
    bench = Bench(tiny, config)
    wanted = cells(8_192, 512, 4, 64)
    assert any(cell.context and cell.rows == 4 for cell in wanted)
    for cell in wanted:
        assert all(took_ms > 0 for took_ms in bench.visit(cell))
    timings = measure(bench, wanted, 0.0)
    assert {timing.cell.kind for timing in timings} == {"decode", "prefill", "mixed"}
    bench.engine.check_integrity()
    assert bench.engine.counts()[:2] == (0, 0)
    model = fit(timings, kv_tokens=8_192, max_jobs=4, step_tokens=64, name="tiny")
    assert CostModel.from_json(model.to_json()) == model
    assert "decode" in report(model, timings)


def test_cpu_time_is_for_one_thread() -> None:
    """With more the threads' times add up; that is said before a model is loaded."""
    with pytest.raises(SettingsError, match="only with one thread"):
        prepare(WorkerSettings(threads=2), cpu_time=True)
