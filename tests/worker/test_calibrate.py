"""Calibration: the fit finds what made the times, and the engine's steps are what was planned."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from headrace.clock import ManualClock
from headrace.errors import SettingsError
from headrace.policy.cost_model import CostModel
from headrace_worker.calibrate import Bench, Cell, cells, measure, prepare
from headrace_worker.engine import EngineConfig
from headrace_worker.fitting import (
    TERMS,
    Sizes,
    Timing,
    errors,
    fit,
    fit_terms,
    grouped,
    predicted_ms,
    report,
    timing_of,
)
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.plan import StepShape
from headrace_worker.settings import WorkerSettings
from headrace_worker.step_log import WARM_STEPS, LoggedEngine, StepLog, read_logs
from worker.builders import make_job

SIZES = Sizes(kv_tokens=90_000, max_jobs=32, step_tokens=512, name="made up")
TRUTH = CostModel(50.0, 3.5, 5.0, 20.0, 1_300.0, 90_000, 32, 512, "made up", batch_ms=30.0)
WANTED = cells(90_000, 8_192, 32, 512)


def timings_of(truth: CostModel, noise: float = 0.0, seed: int = 1) -> list[Timing]:
    dice = random.Random(seed)
    return [
        timing_of(
            cell.shape, truth.step_duration_ms(*cell.shape) * (1 + dice.uniform(-noise, noise))
        )
        for cell in WANTED
    ]


def test_the_fit_finds_the_model_that_made_the_times() -> None:
    """Without noise every term comes back, and nothing is off."""
    found = fit(timings_of(TRUTH), SIZES)
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(TRUTH, term), rel=1e-3)
    assert all(error.worst < 1e-3 for error in errors(found, timings_of(TRUTH)))


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_model_less_than_itself(seed: int) -> None:
    """Steps measured 10 % wrong, each its own way, give a model that is right within 8 %."""
    found = fit(timings_of(TRUTH, 0.1, seed), SIZES)
    for exact in timings_of(TRUTH):
        assert predicted_ms(found, exact) == pytest.approx(exact.took_ms, rel=0.08)


def test_short_steps_count_as_much_as_long_ones() -> None:
    """One wild prefill step of seconds does not spoil what is known of decoding."""
    timings = timings_of(TRUTH)
    longest = max(timings, key=lambda timing: timing.took_ms)
    timings[timings.index(longest)] = replace(longest, took_ms=longest.took_ms * 1.5)
    found = fit(timings, SIZES)
    decode = next(error for error in errors(found, timings) if error.kind == "decode")
    assert decode.worst < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_are_late_now_and_then_are_right_on_average(seed: int) -> None:
    """A busy machine makes a step late, never early: what callers wait for in all is the mean of
    single steps, which their median and the least relative error both miss by the late ones."""
    dice = random.Random(seed)
    shapes = [cell.shape for cell in WANTED if cell.rows <= 8]
    steps = [
        (shape, TRUTH.step_duration_ms(*shape) * (1.8 if dice.random() < 0.25 else 1.0))
        for shape in shapes * 40
    ]
    timings = grouped(steps)
    assert sum(timing.count for timing in timings) == len(steps)
    for error in errors(fit(timings, SIZES), timings):
        assert abs(error.bias) < 0.02, error


def test_a_worker_that_serves_logs_what_its_steps_computed(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    """The log says of each step what the cost model asks for, as long as there was work since the
    step before; the wait for work belongs to no step."""
    sizes, ticks = Sizes(8_192, 4, 64, "tiny"), itertools.count(0, 5_000_000)
    log = StepLog(tmp_path / "1.steps", sizes)
    config = EngineConfig(8_192, max_running=4, step_tokens_max=64, speculation=False)
    engine = LoggedEngine(tiny, config, ManualClock(), log=log, clock_ns=lambda: next(ticks))
    engine.step()  # nothing to do, nothing to log
    for name, prompt in (("a", range(3, 73)), ("b", range(80, 100))):
        engine.add(make_job(name, prompt, max_tokens=3))
        while engine.has_work:
            engine.step()
    log.close()
    head, *lines = (tmp_path / "1.steps").read_text().splitlines()
    assert json.loads(head) == asdict(sizes)
    shapes = [StepShape(*json.loads(line)[1:]) for line in lines]
    assert shapes == [
        StepShape(64, 0, 0, 64 * 65 / 2),
        StepShape(6, 0, 0, 6 * 64 + 6 * 7 / 2),
        StepShape(0, 1, 71, 0.0),
        StepShape(0, 1, 72, 0.0),
        StepShape(20, 0, 0, 20 * 21 / 2),
        StepShape(0, 1, 21, 0.0),
        StepShape(0, 1, 22, 0.0),
    ]
    assert {json.loads(line)[0] for line in lines} == {5_000}, "microseconds from end to end"


def test_logs_are_read_without_the_first_steps(tmp_path: Path) -> None:
    """Those page weights in. The line at which a worker was killed is left out; logs of different
    workers have no model in common, and what is no log is said by name."""
    log = StepLog(tmp_path / "1.steps", SIZES)
    for took in range(WARM_STEPS + 3):
        log.note(StepShape(0, 2, 100, 0.0), 1_000_000 * (took + 1))
    log.close()
    with (tmp_path / "1.steps").open("a") as file:
        file.write("[12, 3")
    sizes, steps = read_logs(tmp_path.glob("*.steps"))
    assert sizes == SIZES
    assert [took_ms for _, took_ms in steps] == [21.0, 22.0, 23.0]
    StepLog(tmp_path / "2.steps", replace(SIZES, kv_tokens=80_000)).close()
    sizes, steps = read_logs(tmp_path.glob("*.steps"))
    assert (sizes.kv_tokens, len(steps)) == (80_000, 3), "whoever started last found less memory"
    StepLog(tmp_path / "2.steps", replace(SIZES, max_jobs=8)).close()
    with pytest.raises(SettingsError, match="different sizes"):
        read_logs(tmp_path.glob("*.steps"))
    (tmp_path / "2.steps").write_text("no log")
    with pytest.raises(SettingsError, match=r"2\.steps is not a worker's log"):
        read_logs(tmp_path.glob("*.steps"))
    with pytest.raises(SettingsError, match="no log"):
        read_logs([])


def test_no_term_is_negative() -> None:
    """Times that fall with the context are told as no cost of context, never as a negative one."""
    timings = [
        timing_of(Cell(rows, context, 0, 0).shape, 40.0 + rows - context / 1_000)
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
    took = measure(bench, wanted, 0.0)
    assert {cell.kind for cell in took} == {"decode", "prefill", "mixed"}
    bench.engine.check_integrity()
    assert bench.engine.counts()[:2] == (0, 0)
    timings = [timing_of(cell.shape, ms) for cell, ms in took.items()]
    model = fit(timings, Sizes(kv_tokens=8_192, max_jobs=4, step_tokens=64, name="tiny"))
    assert CostModel.from_json(model.to_json()) == model
    assert "decode" in report(model, timings)


def test_cpu_time_is_for_one_thread() -> None:
    """With more the threads' times add up; that is said before a model is loaded."""
    with pytest.raises(SettingsError, match="only with one thread"):
        prepare(WorkerSettings(threads=2), cpu_time=True)
