"""Engines whose model lies on several ranks: threads of this process, or processes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from headrace.clock import ManualClock
from headrace_worker import startup
from headrace_worker.engine import Engine
from headrace_worker.engine_config import EngineConfig
from headrace_worker.parallel.links import Links, SharedLinks
from headrace_worker.parallel.rank import Follower
from headrace_worker.parallel.ranks import Ranks
from headrace_worker.parallel.shape import Shape
from headrace_worker.settings import WorkerSettings


def settings_for(folder: Path, shape: Shape, **changes: Any) -> WorkerSettings:
    said = {
        "model": str(folder),
        "model_name": "test",
        "dtype": "float32",
        "threads": 1,
        "tensor_parallel": shape.tensor,
        "pipeline_parallel": shape.pipeline,
    }
    return WorkerSettings(**(said | changes))


def as_env(settings: WorkerSettings) -> dict[str, str]:
    """The variables that make these settings."""
    said = settings.model_dump(exclude_defaults=True)
    return {f"HEADRACE_{name.upper()}": str(value) for name, value in said.items()}


def engine_over(
    ranks: Ranks, settings: WorkerSettings, *, kv_tokens: int = 8192, **limits: Any
) -> Engine:
    """Waits until all ranks have loaded."""
    loaded = startup.load(settings, ranks.links)
    ranks.await_loaded(loaded.record.fingerprint)
    config = EngineConfig(kv_tokens=kv_tokens, kv_dtype=settings.kv_dtype, **limits)
    return Engine(loaded, config, ManualClock(), ranks)


class Apart:
    """Links of ranks that reach each other, and not each other's KV."""

    def __init__(self, inner: SharedLinks) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def threaded(settings: WorkerSettings, *, apart: bool = False, **limits: Any) -> Iterator[Engine]:
    """Ranks that are threads, with the same links as processes have.

    `apart`: each keeps its KV to itself, as on several hosts or GPUs.
    """
    shape = startup.shape_of(settings)
    ours = SharedLinks.create(shape)
    failures: list[BaseException] = []

    def follow(rank: int) -> None:
        links = SharedLinks(ours.memory, rank, shape)
        try:
            memory = None if apart else links.memory
            Follower(links, startup.load(settings, links), memory).run()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [
        threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, shape.ranks)
    ]
    for thread in threads:
        thread.start()
    ranks = Ranks(cast(Links, Apart(ours)) if apart else ours)
    try:
        yield engine_over(ranks, settings, **limits)
    finally:
        ranks.close()
        for thread in threads:
            thread.join(30)
        ours.memory.close()
    assert not failures, failures


@contextlib.contextmanager
def spawned(settings: WorkerSettings, **limits: Any) -> Iterator[tuple[Engine, Ranks]]:
    """Ranks that are processes."""
    ranks = Ranks.spawn(startup.shape_of(settings), {**as_env(settings), "OMP_NUM_THREADS": "1"})
    try:
        yield engine_over(ranks, settings, **limits), ranks
    finally:
        ranks.close()
        for pid in ranks.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)
                raise AssertionError(f"rank process {pid} outlived its worker")
