"""`headrace bench`: measure this machine. `calibrate` feeds `headrace simulate --cost`, `roofline`
says how far the engine's steps are from what the machine can do.

The engine is measured by a process with the worker's packages: this one must not import torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.cli.common import CommandError, plain_errors

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure this machine."""


Model = Annotated[
    str, typer.Option(envvar="HEADRACE_MODEL", help="Alias, Hugging Face id or path.")
]
Threads = Annotated[
    int | None,
    typer.Option(envvar="HEADRACE_THREADS", min=1, help="Per worker. Default: cores / workers."),
]
Workers = Annotated[
    int,
    typer.Option(
        envvar="HEADRACE_WORKERS", min=1, max=64, help="How many share this machine all the time."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(envvar="HEADRACE_DTYPE", help="What the model computes in.")
]
Quantization = Annotated[
    Literal["none", "int8", "int4"] | None,
    typer.Option(envvar="HEADRACE_QUANTIZATION", help="Bits of the weights."),
]
KvDtype = Annotated[
    Literal["auto", "int8"] | None, typer.Option(envvar="HEADRACE_KV_DTYPE", help="The KV cache.")
]
KvTokens = Annotated[
    int | None,
    typer.Option(envvar="HEADRACE_KV_TOKENS", min=1, help="Tokens of KV the worker can hold."),
]
MaxJobs = Annotated[
    int | None, typer.Option(envvar="HEADRACE_MAX_JOBS", min=1, help="Jobs at a time.")
]
Seconds = Annotated[float, typer.Option(min=1.0, max=3_600.0, help="About how long to measure.")]
Out = Annotated[Path, typer.Option(help="Where the cost model goes, for `simulate --cost`.")]
Figures = Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")]
CpuTime = Annotated[
    bool,
    typer.Option(
        "--cpu-time", help="Count CPU time of one thread: for a machine that is busy now."
    ),
]
Table = Annotated[bool, typer.Option("--table", help="Print every step that was measured.")]


@bench.command()
@plain_errors
def calibrate(
    model: Model = "smollm2",
    threads: Threads = None,
    workers: Workers = 1,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_dtype: KvDtype = None,
    kv_tokens: KvTokens = None,
    max_jobs: MaxJobs = None,
    seconds: Seconds = 75.0,
    out: Out = Path("cost.json"),
    cpu_time: CpuTime = False,
    table: Table = False,
) -> None:
    """Time the real engine's steps here and write the cost model that `simulate --cost` reads."""
    if not out.parent.is_dir():
        raise CommandError(f"--out: there is no folder {out.parent}")
    each = threads or max(1, len(os.sched_getaffinity(0)) // workers)
    settings = {
        **_settings(model, each, dtype, quantization, kv_dtype),
        "HEADRACE_KV_TOKENS": kv_tokens,
        "HEADRACE_MAX_JOBS": max_jobs,
    }
    flags = [
        *("--seconds", str(seconds), "--beside", str(workers - 1), "--out", str(out)),
        *(["--cpu-time"] if cpu_time else []),
        *(["--table"] if table else []),
    ]
    _measure("headrace_worker.calibrate", flags, settings)


@bench.command()
@plain_errors
def roofline(
    model: Model = "smollm2",
    threads: Threads = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_dtype: KvDtype = None,
    seconds: Seconds = 30.0,
    out: Figures = None,
) -> None:
    """Measure memory bandwidth and products here, and what fraction of them the engine reaches."""
    if out is not None and not out.parent.is_dir():
        raise CommandError(f"--out: there is no folder {out.parent}")
    each = threads or len(os.sched_getaffinity(0))
    flags = ["--seconds", str(seconds), *(["--out", str(out)] if out is not None else [])]
    settings = _settings(model, each, dtype, quantization, kv_dtype)
    _measure("headrace_worker.roofline", flags, settings)


def _settings(
    model: str, threads: int, dtype: str | None, quantization: str | None, kv_dtype: str | None
) -> dict[str, object]:
    """A worker's variables; None leaves one as it is."""
    return {
        "HEADRACE_MODEL": model,
        "HEADRACE_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "HEADRACE_DTYPE": dtype,
        "HEADRACE_QUANTIZATION": quantization,
        "HEADRACE_KV_DTYPE": kv_dtype,
    }


def _measure(module: str, flags: list[str], settings: dict[str, object]) -> None:
    """Runs a module of the worker in a process of its own. Raises CommandError, typer.Exit."""
    if find_spec("headrace_worker") is None or find_spec("torch") is None:
        raise CommandError("this runs the engine: pip install 'headrace[worker]'")
    given = {name: str(value) for name, value in settings.items() if value is not None}
    done = subprocess.run([sys.executable, "-m", module, *flags], env=os.environ | given)
    if done.returncode:
        raise typer.Exit(done.returncode)
