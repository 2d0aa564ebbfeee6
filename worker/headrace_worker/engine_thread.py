"""The thread that steps the engine.

Invariant: only this thread touches the engine (but for `missing_blocks`, which is safe to call);
others leave commands in an inbox that is emptied before each step. Results go to the event loop in
step order. When the event loop falls behind by RESULTS_MAX steps (Redis is away), the thread waits
instead of filling memory.

All of torch's parallel work happens here. OpenMP makes a pool of threads for each thread that asks;
with more of them than cores they stop spinning and wake each other through the kernel, which
measured half the tokens per second.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import structlog
import torch

from headrace import turns
from headrace.clock import Clock
from headrace_worker.engine import Engine
from headrace_worker.results import StepResult

log = structlog.get_logger()

RESULTS_MAX = 1_024
QUIET_MAX = 16
QUIET_MS = 100
"""Steps, and time, that are told together with the next one of which the loop has to know at once.
What hangs on them are reports, a few a second."""
IDLE_CHECK_S = 60.0
NICEST = 19


class EngineThread:
    """Runs `engine` until `stop()`; `on_result` is called after each step in the loop that made it.

    `express` is asked first, here, to send a step's tokens when all before them were delivered; of
    a step that it took the loop is told somewhat later, and its deltas are gone.
    `threads`: cores that one step may use. `nice`: how far computing steps back for what answers,
    of this process and of others. With `debug`, what the engine holds is checked whenever
    it has nothing to do; a failed check ends the thread, and so the worker.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        on_result: Callable[[StepResult], None],
        *,
        threads: int,
        nice: int = 0,
        debug: bool = False,
        express: Callable[[StepResult], bool] | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._on_result = on_result
        self._threads = threads
        self._nice = nice
        self._debug = debug
        self._express = express
        self._quiet: list[StepResult] = []
        self._quiet_since_ms = 0
        self._handed = 0  # counted by the engine's thread alone, as what is done is by the loop
        self._done = 0
        self._inbox: deque[Callable[[Engine], None]] = deque()
        self._news = threading.Condition()
        self._stopping = False
        self._room = threading.BoundedSemaphore(RESULTS_MAX)
        self._busy_since_ms = -1
        self.steps = 0
        self.counts = engine.counts()
        self.outlook = engine.outlook()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Callable[[Engine], None]) -> None:
        """Run `command` in the engine's thread before its next step."""
        with self._news:
            self._inbox.append(command)
            self._news.notify()

    def stop(self) -> None:
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join(timeout=10)

    def results_done(self, steps: int) -> None:
        """So many steps' results have been delivered; the thread may run that much further."""
        self._done += steps
        if steps:
            self._room.release(steps)

    def stalled_ms(self) -> int:
        """How long the step that runs now has been running; 0 when none does."""
        since = self._busy_since_ms
        return 0 if since < 0 else self._clock.now_ms() - since

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        turns.ask(turns.USUAL_NS)
        # those that compute with this thread are made by it, and inherit that
        own = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, own) + self._nice
        os.setpriority(os.PRIO_PROCESS, own, min(NICEST, niceness))
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            log.error("the engine's thread died", error=repr(error), exc_info=error)
            self.failure = error

    def _wait_for_work(self) -> bool:
        """Empty the inbox; wait while there is nothing to do. False when told to stop."""
        while True:
            with self._news:
                while not (self._inbox or self._stopping or self._engine.has_work):
                    self._look()
                    self._hand_over()
                    if self._debug:
                        self._engine.check_integrity()
                    self._news.wait(IDLE_CHECK_S)
                commands = list(self._inbox)
                self._inbox.clear()
                if self._stopping:
                    return False
            for command in commands:
                command(self._engine)
            if self._engine.has_work:
                return True

    def _step(self) -> None:
        while not self._room.acquire(timeout=0.5):
            if self._stopping:
                return
        self._busy_since_ms = began_ms = self._clock.now_ms()
        result = self._engine.step()
        sent = self._express is not None and self._handed == self._done and self._express(result)
        self._busy_since_ms = -1
        self.steps += 1
        self._look()
        if not self._quiet:
            self._quiet_since_ms = began_ms
        self._quiet.append(replace(result, deltas=[]) if sent else result)
        waited_ms = began_ms - self._quiet_since_ms
        if not sent or len(self._quiet) >= QUIET_MAX or waited_ms >= QUIET_MS:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._quiet:
            told, self._quiet = self._quiet, []
            self._handed += len(told)
            self._loop.call_soon_threadsafe(self._tell, told)

    def _tell(self, results: list[StepResult]) -> None:
        for result in results:
            self._on_result(result)

    def _look(self) -> None:
        """What others are told of the engine: whole objects, replaced."""
        self.counts = self._engine.counts()
        self.outlook = self._engine.outlook()
