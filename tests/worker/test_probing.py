"""Importing the worker makes no pool of threads: the engine's would lack its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace_worker import native

IMPORT = """
import os, numpy, torch
before = len(os.listdir("/proc/self/task"))
import headrace_worker.__main__
print(len(os.listdir("/proc/self/task")) - before)
"""
MULTIPLY = "torch.mm(torch.ones(400, 400), torch.ones(400, 400))"


def threads_started(script: str) -> int:
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    return int(made.stdout)


def test_importing_the_worker_starts_no_thread() -> None:
    """Probes of the processor at import run in the importing thread alone."""
    assert threads_started(IMPORT) == 0


def test_a_pool_would_be_seen() -> None:
    """The count is no constant: a product in two threads starts one."""
    script = IMPORT.replace(
        "import headrace_worker.__main__", f"torch.set_num_threads(2); {MULTIPLY}"
    )
    assert threads_started(script) > 0


def test_a_step_of_the_kernels_makes_no_pool_beside_their_team(tiny_folder: Path) -> None:
    """torch's threads would spin against it: the only new one is the team's second, which is the
    engine's and not left of loading."""
    if native.library() is None:
        pytest.skip(f"no native kernels here: {native.state()}")
    step = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import numpy, torch
from headrace_worker.loading import load_model
from worker.builders import make_engine, make_job, random_tokens
loaded = load_model(Path({str(tiny_folder)!r}), "test", "bfloat16", "int8")
engine = make_engine(loaded)
engine.add(make_job("j", random_tokens(400, 1), max_tokens=4))
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
while engine.has_work:
    engine.step()
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert threads_started(step) == 1
