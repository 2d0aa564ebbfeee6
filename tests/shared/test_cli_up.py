"""`headrace up` for real: the whole fleet as processes, with the real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 120.0


class Up:
    """One `headrace up` on a data directory and a free port of its own."""

    def __init__(self, data: Path, *flags: str) -> None:
        self.data = data
        self.out = data.parent / "out"
        fixed = ["--port", "0", "--threads", "1", "--data-dir", str(data)]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [*COMMAND, "up", *fixed, *flags], stdout=out, stderr=subprocess.STDOUT
            )

    def facts(self) -> dict[str, Any]:
        """What this fleet, not one before it, says about itself."""
        try:
            facts: dict[str, Any] = json.loads((self.data / "run.json").read_text())
        except FileNotFoundError:
            facts = {}
        return facts if facts.get("pid") == self.process.pid else {"processes": {}}

    def run(self, *arguments: str) -> str:
        command = [*COMMAND, arguments[0], "--data-dir", str(self.data), *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr + self.out.read_text()
        return done.stdout

    def until(self, check: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not check():
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.05)


COMMAND = [sys.executable, "-m", "headrace.cli.main"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    fleets: list[Up] = []

    def begin(*flags: str) -> Up:
        fleets.append(Up(tmp_path / "data", *flags))
        return fleets[-1]

    yield begin
    for fleet in fleets:
        fleet.process.terminate()
        fleet.process.wait(LIMIT_S)


def test_up_answers_and_goes_in_order(start: Callable[..., Up]) -> None:
    """One command to a streamed answer; a killed worker is replaced; Ctrl-C leaves nothing."""
    fleet = start("--kv-tokens", "16384")
    fleet.until(lambda: "Headrace serves smollm2 at" in fleet.out.read_text())
    answer = fleet.run("chat", "--max-tokens", "8", "--temperature", "0", "What is 2+2?")
    assert len(answer.strip()) > 0

    status = json.loads(fleet.run("status", "--json"))
    (worker,) = status["workers"]
    assert worker["state"] == "ready"
    assert worker["pid"] == fleet.facts()["processes"]["worker-0"]
    os.kill(worker["pid"], signal.SIGKILL)

    def replaced() -> bool:
        workers = json.loads(fleet.run("status", "--json"))["workers"]
        return any(w["state"] == "ready" and w["id"] != worker["id"] for w in workers)

    fleet.until(replaced)
    again = fleet.run("chat", "--max-tokens", "8", "--temperature", "0", "What is 2+2?")
    assert again == answer

    pids = list(fleet.facts()["processes"].values())
    fleet.process.send_signal(signal.SIGINT)
    assert fleet.process.wait(LIMIT_S) == 0, fleet.out.read_text()
    assert len(pids) == 4 and not any(alive(pid) for pid in pids)
    assert "did not end in time" not in fleet.out.read_text()
    assert not (fleet.data / "run.json").exists()


def test_nothing_is_left_of_a_fleet_that_was_killed(start: Callable[..., Up]) -> None:
    """kill -9 while it starts: all four services die, and the data directory is free again."""
    fleet = start()
    fleet.until(lambda: len(fleet.facts()["processes"]) == 4)
    pids = list(fleet.facts()["processes"].values())
    fleet.process.kill()
    fleet.process.wait()
    deadline = time.monotonic() + LIMIT_S
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = start()
    second.until(lambda: len(second.facts()["processes"]) == 4)
