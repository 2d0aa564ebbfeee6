"""Importing the worker makes no pool of threads: the engine's would lack its place."""

from __future__ import annotations

import subprocess
import sys

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
