"""`headrace bench`: what it hands to the process that measures, and what it refuses before."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headrace.cli import bench, main, rehearsal
from headrace.cli.stack import UpOptions


@dataclass
class Started:
    """The processes that were to be started; each ends with `code`."""

    code: int = 0
    argv: list[list[str]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def run(self, argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        self.argv.append(argv)
        self.env = env
        return subprocess.CompletedProcess(argv, self.code)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    started = Started()
    monkeypatch.setattr(bench.subprocess, "run", started.run)
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    return started


def headrace(*arguments: str) -> Any:
    return CliRunner().invoke(main.app, ["bench", *arguments])


def test_calibrate_measures_one_of_the_workers_that_share_the_machine(started: Started) -> None:
    """Two workers on four cores: two threads each, and the other one steps beside."""
    flags = ("--workers", "2", "--max-jobs", "8", "--quantization", "int8")
    done = headrace("calibrate", "--engine-only", *flags)
    assert done.exit_code == 0, done.output
    (argv,) = started.argv
    assert argv[1:3] == ["-m", "headrace_worker.calibrate"]
    assert argv[argv.index("--beside") + 1] == "1"
    assert argv[argv.index("--out") + 1] == "cost.json"
    told = {name: value for name, value in started.env.items() if name.startswith("HEADRACE_")}
    assert told == {
        "HEADRACE_MODEL": "smollm2",
        "HEADRACE_THREADS": "2",
        "HEADRACE_MAX_JOBS": "8",
        "HEADRACE_QUANTIZATION": "int8",
    }


def test_calibrate_fits_what_a_serving_fleet_logged(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fleet gets the settings, its workers' steps go to the process that fits, and whatever
    they were logged in is gone afterwards."""
    served: list[tuple[UpOptions, float, Path]] = []
    monkeypatch.setattr(rehearsal, "log_steps", lambda *told: served.append(told))
    done = headrace("calibrate", "--workers", "2", "--dtype", "bfloat16", "--seconds", "30")
    assert done.exit_code == 0, done.output
    ((options, seconds, folder),) = served
    assert (options.workers, options.threads, options.dtype, seconds) == (2, 2, "bfloat16", 30)
    assert options.speculation == "off", "a cost model knows nothing of guesses"
    (argv,) = started.argv
    assert argv[argv.index("--steps") + 1] == str(folder)
    assert not folder.exists()


def test_made_up_requests_are_of_all_sizes_and_never_too_long() -> None:
    """Phases go from a client for each worker to all that the workers take; lengths fit the model,
    and no two prompts share a block."""
    load = rehearsal.Load("http://nowhere", "m", rehearsal.Shape(3, 24, 512, 300))
    assert load.phases() == [3, 6, 12, 24]
    bodies = [json.loads(load.body()) for _ in range(400)]
    lengths = sorted(len(body["prompt"]) for body in bodies)
    assert 16 <= lengths[0] < 32 and lengths[-1] == 256
    assert 50 < lengths[200] < 150, "each magnitude as often as another"
    for body in bodies:
        assert len(body["prompt"]) + body["max_tokens"] <= 512
        assert 8 <= body["max_tokens"] <= 128 and max(body["prompt"]) < 300
    assert len({tuple(body["prompt"][:16]) for body in bodies}) == 400


def test_a_failed_measurement_fails_the_command(started: Started) -> None:
    """What went wrong was said by the process itself."""
    started.code = 1
    assert headrace("calibrate", "--engine-only", "--threads", "1").exit_code == 1
    assert started.env["OMP_NUM_THREADS"] == "1"


def test_calibrate_needs_the_worker(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's installation is told what to install, before anything starts."""
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    done = headrace("calibrate")
    assert (done.exit_code, started.argv) == (1, [])
    assert "pip install 'headrace[worker]'" in done.output


def test_calibrate_refuses_a_folder_that_is_not_there(started: Started, tmp_path: Path) -> None:
    """Two minutes of measuring must not end in an error about a file."""
    done = headrace("calibrate", "--out", str(tmp_path / "none" / "cost.json"))
    assert (done.exit_code, started.argv) == (1, [])
    assert "there is no folder" in done.output


def test_roofline_measures_the_whole_machine_by_default(started: Started, tmp_path: Path) -> None:
    """All cores, the settings that were given, and a file only where one is asked for."""
    out = tmp_path / "roof.json"
    assert headrace("roofline", "--quantization", "int4", "--dtype", "bfloat16").exit_code == 0
    assert headrace("roofline", "--threads", "1", "--out", str(out)).exit_code == 0
    first, second = started.argv
    assert first[1:3] == ["-m", "headrace_worker.roofline"] and "--out" not in first
    assert second[second.index("--out") + 1] == str(out)
    assert started.env["HEADRACE_THREADS"] == started.env["OMP_NUM_THREADS"] == "1"
    refused = headrace("roofline", "--out", str(tmp_path / "none" / "roof.json"))
    assert (refused.exit_code, len(started.argv)) == (1, 2)
    assert "there is no folder" in refused.output
