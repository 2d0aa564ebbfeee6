"""A line for each engine step of a serving worker: what it computed and how long it took.

Invariant: while there is work a step begins when the one before it ended, so the lines of a worker
that is never idle add up to the wall clock: what its own event loop, the gateway and the clients
take from its cores between two steps and during them is in its lines, as it is in what callers wait
for. The first line says whose steps these are. Rejected: sums in the reports to the dispatcher, a
quarter of a second each, in which the first steps of a process cannot be told from the others.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from headrace.errors import SettingsError
from headrace_worker.engine import Engine
from headrace_worker.fitting import Sizes
from headrace_worker.loading import LoadedModel
from headrace_worker.policy.plan import StepShape
from headrace_worker.results import StepResult
from headrace_worker.settings import WorkerSettings

STEPS_MAX = 1_000_000
"""Lines of one log, 40 MB; later steps are not logged."""
WARM_STEPS = 20
"""The first ones of a process, which page weights in and grow buffers, are read by nobody."""


class StepLog:
    """Written by one thread, the engine's."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        """Raises OSError when the file cannot be written."""
        # a line a write: what a killed worker had done is there
        self._file: TextIO = path.open("w", buffering=1)
        self._file.write(json.dumps(asdict(sizes)) + "\n")
        self._left = STEPS_MAX

    def note(self, shape: StepShape, took_ns: int) -> None:
        """A step took so long, of which nothing was computed if its shape is empty."""
        if self._left and (shape.prefill_tokens or shape.decode_rows):
            self._left -= 1
            self._file.write(json.dumps([took_ns // 1_000, *shape]) + "\n")

    def close(self) -> None:
        self._file.close()


class LoggedEngine(Engine):
    """An engine whose steps are logged."""

    def __init__(
        self, *args: Any, log: StepLog, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(*args)
        self._log = log
        self._clock_ns = clock_ns
        self._since_ns: int | None = None
        """When the last step ended, if there was more to do then."""

    def step(self) -> StepResult:
        began_ns = self._clock_ns() if self._since_ns is None else self._since_ns
        result = super().step()
        ended_ns = self._clock_ns()
        self._log.note(result.work.shape, ended_ns - began_ns)
        self._since_ns = ended_ns if self.has_work else None
        return result


Step = tuple[StepShape, float]
"""A line: what was computed, and milliseconds."""


def about(settings: WorkerSettings, loaded: LoadedModel, kv_tokens: int, threads: int) -> Sizes:
    """Of a worker of these settings, with its model's name as a cost model shows it."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    name = f"{loaded.record.name} {dtype} {loaded.quantization}, {threads} threads"
    return Sizes(kv_tokens, settings.max_jobs, settings.step_tokens, name)


def open_log(settings: WorkerSettings, sizes: Sizes) -> StepLog:
    """In the folder that `settings` name, by process. Raises SettingsError."""
    path = Path(settings.step_log) / f"{os.getpid()}.steps"
    try:
        return StepLog(path, sizes)
    except OSError as error:
        raise SettingsError(f"HEADRACE_STEP_LOG: cannot write {path}: {error.strerror}") from error


def read_log(path: Path) -> tuple[Sizes, list[Step]]:
    """What a StepLog holds, without the first WARM_STEPS. Raises SettingsError."""
    try:
        head, *lines = path.read_text().splitlines()
        sizes = Sizes(**json.loads(head))
        # the last line of a worker that was killed may be torn
        rows = [json.loads(line) for line in lines[WARM_STEPS:] if line.endswith("]")]
        return sizes, [(StepShape(*shape), took / 1_000) for took, *shape in rows]
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError(f"{path} is not a worker's log of steps: {error}") from error


def read_logs(paths: Iterable[Path]) -> tuple[Sizes, list[Step]]:
    """The steps of several workers that are alike. Raises SettingsError where they are not."""
    found = [read_log(path) for path in sorted(paths)]
    if not found:
        raise SettingsError("there is no log of steps")
    # how much KV fits is seen from the memory that is free at the start: a bit less for the last
    sizes = min((each for each, _ in found), key=lambda each: each.kv_tokens)
    if any(replace(each, kv_tokens=sizes.kv_tokens) != sizes for each, _ in found):
        raise SettingsError("workers of different sizes have no cost model in common")
    return sizes, [step for _, steps in found for step in steps]
