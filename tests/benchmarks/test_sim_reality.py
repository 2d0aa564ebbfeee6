"""The simulator's test against reality: calibrations between pieces, and what they are used for."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest
from bench._calibrating import StepLogs, load_plan, slower
from bench._load import Ask
from bench.sim_reality import Judged, costs, figures, in_pieces, simulation

from headrace.policy.cost_model import CostModel, attended
from headrace_worker.fitting import TERMS, Sizes
from headrace_worker.policy.plan import StepShape
from headrace_worker.step_log import WARM_STEPS, StepLog

TRUTH = CostModel(
    9.0, 0.7, 2.0, 5.0, 300.0, kv_tokens=90_000, max_jobs=8, step_tokens=512, name="t", batch_ms=2.0
)
SIZES = Sizes(90_000, 8, 512, "t")
ARGS = argparse.Namespace(workers=2, seed=1)


def shapes(seed: int, count: int = 400) -> list[StepShape]:
    """Steps as a worker takes them that has something to do most of the time."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        rows, chunk = dice.randint(0, 8), dice.choice((0, 0, 0, 16, 90, 300))
        if rows + chunk:
            context = sum(dice.randint(16, 600) for _ in range(rows))
            found.append(StepShape(chunk, rows, context, attended(dice.randint(0, 200), chunk)))
    return found


def logs_of(folder: Path, slownesses: list[float]) -> StepLogs:
    """Of two workers whose steps take so many times as long as TRUTH says, part after part."""
    logs = StepLogs(folder)
    written = [StepLog(folder / f"{n}.steps", SIZES) for n in range(2)]
    for each in written:
        for shape in shapes(0)[:WARM_STEPS]:
            each.note(shape, 10**9)
    for slowness in slownesses:
        for seed, each in enumerate(written):
            for shape in shapes(seed):
                each.note(shape, int(1e6 * slowness * TRUTH.step_duration_ms(*shape)))
        logs.cut()
    for each in written:
        each.close()
    return logs


def assert_alike(found: CostModel, expected: CostModel) -> None:
    for term in TERMS:
        assert getattr(found, term) == pytest.approx(getattr(expected, term), rel=0.02), term


def test_a_piece_is_simulated_as_slow_as_the_machine_was_around_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It slows down from calibration to calibration; the steps of a pilot say nothing."""
    first, second = costs(logs_of(tmp_path, [4.0, 1.0, 1.1, 1.2, 1.35, 1.5]), 2)
    assert_alike(first, slower(TRUTH, 1.1))
    assert_alike(second, slower(TRUTH, 1.35))
    said = capsys.readouterr().out
    assert "pilot: 3.2" in said and "calibration 1: 0.8" in said
    assert "is simulated at 0.89" in said and "its own steps by that: 1.00" in said


def test_the_steps_of_what_is_judged_are_in_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Were the machine three times slower only then, the simulator would be told of it by nobody,
    and the reader by the figures."""
    for name in ("usual", "slow"):
        (tmp_path / name).mkdir()
    usual = costs(logs_of(tmp_path / "usual", [1.0, 1.0, 1.0, 1.0]), 1)
    slow = costs(logs_of(tmp_path / "slow", [1.0, 1.0, 3.0, 1.0]), 1)
    assert usual == slow
    assert "decode 3.0" in capsys.readouterr().out


def test_pieces_hold_the_whole_plan() -> None:
    plan = [(0.5, Ask(1, 1)), (99.9, Ask(2, 1)), (100.0, Ask(3, 1)), (305.0, Ask(4, 1))]
    pieces = in_pieces(plan, 100.0)
    assert [[ask.prompt for _, ask in piece] for piece in pieces] == [[1, 2], [3], [4]]
    assert [at for piece in pieces for at, _ in piece] == pytest.approx([0.5, 99.9, 0.0, 5.0])


def test_only_pieces_are_judged_each_by_its_own_model() -> None:
    """What the calibration before it sent is simulated too, and counted by nobody."""
    plan = [(0.2 * n, Ask(100, 20)) for n in range(20)]
    lead = load_plan(0.6, 10.0, TRUTH, 2)
    assert lead == load_plan(0.6, 10.0, TRUTH, 2) != []
    fast, slow = TRUTH, slower(TRUTH, 2.0)
    alike = simulation(ARGS, Judged([plan, plan], [fast, fast], lead, {}))
    mixed = simulation(ARGS, Judged([plan, plan], [fast, slow], lead, {}))
    assert alike["complete"] == mixed["complete"] == 2 * len(plan)
    assert alike["lost"] == 0
    assert mixed["ttft_ms"]["mean"] > 1.3 * alike["ttft_ms"]["mean"]


def test_time_between_pieces_is_nobodys() -> None:
    """Two tokens a second in each piece, however far apart they are."""
    piece = [(float(at), 100.0, 1000.0, 2) for at in range(10)]
    later = [(at + 500.0, ttft, total, tokens) for at, ttft, total, tokens in piece]
    assert figures([piece, later])["output_tokens_per_s"] == pytest.approx(2.0)
    assert figures([piece, later])["complete"] == 20
