"""The thread that computes steps back for what answers: gateways, Redis, the worker's own loop."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from headrace.clock import SystemClock
from headrace_worker.engine import Engine
from headrace_worker.engine_thread import EngineThread
from headrace_worker.loading import load_model
from worker.builders import make_engine


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_computing_steps_back_and_nothing_else_does(tiny_folder: Path) -> None:
    """Threads that the engine's makes, as those of the kernels, inherit it."""
    engine = make_engine(load_model(tiny_folder, "test", "float32"))
    thread = EngineThread(engine, SystemClock(), lambda result: None, threads=1, nice=3)
    loop, seen = asyncio.get_running_loop(), asyncio.Queue[int]()

    def look(engine: Engine) -> None:
        mine = niceness()
        child = threading.Thread(target=lambda: theirs.append(niceness()))
        theirs: list[int] = []
        child.start()
        child.join()
        loop.call_soon_threadsafe(seen.put_nowait, mine)
        loop.call_soon_threadsafe(seen.put_nowait, theirs[0])

    before = niceness()
    thread.start()
    try:
        thread.send(look)
        assert [await seen.get(), await seen.get()] == [before + 3] * 2
        assert niceness() == before
    finally:
        thread.stop()
