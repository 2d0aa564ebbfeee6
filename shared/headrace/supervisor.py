"""Keeps the processes of one machine's fleet alive, and takes all of them along when it goes.

Invariants:
- a child never outlives its supervisor, however that ends: the kernel kills it when its parent
  dies (PR_SET_PDEATHSIG), and a child that is born after its parent's death ends itself. What a
  child starts in turn must ask for the same (`die_with_parent`); it shares the child's process
  group, which is swept after every exit;
- a child that dies is started again after a growing delay; too many deaths in a window, or several
  starts in a row that never got ready, end the whole fleet with a message that says why;
- stopping goes stage by stage, front first, within STOP_S in all; then SIGKILL.

Rejected: multiprocessing (children share the parent's modules and signals), and a process manager
of the system's (not there on every machine, and this must start with one command).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TextIO

from headrace.clock import Clock, SystemClock
from headrace.errors import HeadraceError

STOP_S = 8.0
RESTARTS_MAX = 10
RESTART_WINDOW_MS = 60_000
UNREADY_EXITS_MAX = 3
BACKOFF_MS = 250
BACKOFF_MS_MAX = 5_000
READY_POLL_S = 0.05
AFTERMATH_S = 2.0
"""Time limit of a service's `on_exit`."""
PIPE_S = 1.0
"""How long the last lines of a child that has ended may take."""
LINE_BYTES_MAX = 16_384
BAD_SETTING_EXIT = 2

_PR_SET_PDEATHSIG = 1
_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)


class FleetError(HeadraceError):
    """The fleet cannot be started or kept up; the message says which service and why."""

    code = "fleet_down"


class Stage(IntEnum):
    """Start order; stopping goes the other way round."""

    STORE = 0
    CACHE = 1
    WORKER = 2
    GATEWAY = 3


STOP_SHARES = {Stage.GATEWAY: 0.4, Stage.WORKER: 0.8, Stage.CACHE: 0.9, Stage.STORE: 1.0}
"""By which part of STOP_S each stage must be gone; time that one leaves over is the next one's."""


class ChildState(Enum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


TRANSITIONS: dict[ChildState, frozenset[ChildState]] = {
    ChildState.WAITING: frozenset({ChildState.STARTING, ChildState.STOPPED}),
    ChildState.STARTING: frozenset({ChildState.READY, ChildState.WAITING, ChildState.STOPPED}),
    ChildState.READY: frozenset({ChildState.WAITING, ChildState.STOPPED}),
    ChildState.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a service. `tag` is what tells this start from others (a worker's id)."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    tag: str = ""


async def _nothing(launch: Launch) -> None:
    """The `on_exit` of a service that leaves nothing behind."""


@dataclass(frozen=True, slots=True)
class Service:
    """What to keep running. `ready` and `on_exit` get the launch that they are about.

    A `gate` holds back later stages until it is ready.
    """

    name: str
    stage: Stage
    launch: Callable[[], Launch]
    ready: Callable[[Launch], Awaitable[bool]]
    ready_s_max: float = 60.0
    on_exit: Callable[[Launch], Awaitable[None]] = _nothing
    gate: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a death. `reason` is for the log."""

    restart: bool
    delay_ms: int
    reason: str


class RestartBudget:
    """How many deaths of one service are borne. Pure: time comes in."""

    def __init__(self, restarts_max: int = RESTARTS_MAX) -> None:
        self._restarts_max = restarts_max
        self._deaths_ms: deque[int] = deque(maxlen=restarts_max + 1)
        self._unready = 0

    def on_exit(self, now_ms: int, was_ready: bool) -> Verdict:
        """Decide about a death at `now_ms` of a child that had been ready, or never was."""
        while self._deaths_ms and now_ms - self._deaths_ms[0] > RESTART_WINDOW_MS:
            self._deaths_ms.popleft()
        self._deaths_ms.append(now_ms)
        self._unready = 0 if was_ready else self._unready + 1
        if self._unready >= UNREADY_EXITS_MAX:
            return Verdict(False, 0, f"failed {self._unready} times in a row before it was ready")
        if len(self._deaths_ms) > self._restarts_max:
            window_s = RESTART_WINDOW_MS // 1000
            return Verdict(False, 0, f"died {len(self._deaths_ms)} times within {window_s} s")
        # the first death after a quiet time costs no wait: its clients are waiting
        power = len(self._deaths_ms) - 1
        delay_ms = min(BACKOFF_MS * 2 ** (power - 1), BACKOFF_MS_MAX) if power else 0
        return Verdict(True, delay_ms, f"death {len(self._deaths_ms)} of {self._restarts_max}")


def die_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the kernel kills the child when this process dies.

    Call it in the parent. The signal is bound to the thread that forks, so fork from the main one.
    """
    parent = os.getpid()
    if not sys.platform.startswith("linux"):
        return lambda: None  # no such signal there; only an orderly end takes children along
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            os._exit(126)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(126)

    return before_exec


class Log:
    """Lines of all children on one stream, each with its service's name in front."""

    def __init__(self, out: TextIO, names: Sequence[str]) -> None:
        self._out = out
        self._width = max((len(name) for name in names), default=0)
        self._colours = dict(zip(names, _COLOURS * len(names), strict=False))
        self._coloured = out.isatty() and "NO_COLOR" not in os.environ

    def line(self, name: str, text: str) -> None:
        label = name.ljust(self._width)
        if self._coloured:
            label = f"\x1b[{self._colours.get(name, 1)}m{label}\x1b[0m"
        # a reader that went away must not take the fleet along
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._out.write(f"{label} | {text}\n")
            self._out.flush()


class Pipe:
    """What a child prints, read by the event loop."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        self._transport: asyncio.ReadTransport | None = None

    async def open(self) -> asyncio.StreamReader:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=2 * LINE_BYTES_MAX)
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._read_fd, "rb", 0)
        )
        return reader

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        else:
            os.close(self._read_fd)


class Child:
    """One service and the process that runs it now."""

    def __init__(self, service: Service, log: Log, clock: Clock, on_change: Callable[[], None]):
        self.service = service
        self.state = ChildState.WAITING
        self.pid: int | None = None
        self.is_ready = asyncio.Event()
        self._log = log
        self._clock = clock
        self._on_change = on_change
        self._budget = RestartBudget()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def keep(self) -> None:
        """Run the service until `stop`. Raises FleetError when it cannot be kept running."""
        while not self._stopping.is_set():
            launch = self.service.launch()
            code, was_ready = await self._run_once(launch)
            await self._aftermath(launch)
            if self._stopping.is_set():
                break
            self._to(ChildState.WAITING)
            how = _how_it_ended(code)
            verdict = self._budget.on_exit(self._clock.now_ms(), was_ready)
            if code == BAD_SETTING_EXIT and not was_ready:
                verdict = Verdict(False, 0, "its last line says why")
            if not verdict.restart:
                raise FleetError(f"{self.service.name} {how}: {verdict.reason}")
            self._log.line(self.service.name, f"{how}; starting again in {verdict.delay_ms} ms")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), verdict.delay_ms / 1000)
        self._to(ChildState.STOPPED)

    async def _run_once(self, launch: Launch) -> tuple[int, bool]:
        """One process from start to end: its exit code, and whether it had become ready."""
        self._to(ChildState.STARTING)
        process, output = await self._start_process(launch)
        self._process, self.pid = process, process.pid
        self._on_change()
        if self._stopping.is_set():
            self.signal(signal.SIGTERM)
        watch = asyncio.create_task(self._until_ready(launch))
        pump = asyncio.create_task(self._pump(output))
        try:
            code = await process.wait()
        finally:
            watch.cancel()
            self.signal(signal.SIGKILL)
            # a grandchild that left the group may hold the pipe open for ever
            await asyncio.wait((pump,), timeout=PIPE_S)
            output.close()
            pump.cancel()
            await asyncio.gather(watch, pump, return_exceptions=True)
        was_ready = self.is_ready.is_set()
        self._process, self.pid = None, None
        self.is_ready.clear()
        return code, was_ready

    async def _start_process(self, launch: Launch) -> tuple[asyncio.subprocess.Process, Pipe]:
        """The process, and what it prints. Raises FleetError."""
        # a pipe of our own: with asyncio's, wait() would wait for grandchildren that hold it too
        output = Pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.argv,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **launch.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.write_fd,
                stderr=output.write_fd,
                # its own group: Ctrl-C at the terminal is for the supervisor alone
                process_group=0,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            output.close()
            raise FleetError(f"cannot start {self.service.name}: {error}") from error
        finally:
            os.close(output.write_fd)
        return process, output

    async def _until_ready(self, launch: Launch) -> None:
        try:
            async with asyncio.timeout(self.service.ready_s_max):
                while not await self.service.ready(launch):
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            limit = f"{self.service.ready_s_max:.0f} s"
            self._log.line(self.service.name, f"not ready after {limit}: ending this try")
            self.signal(signal.SIGKILL)
            return
        self._to(ChildState.READY)
        self.is_ready.set()
        self._on_change()

    async def _pump(self, output: Pipe) -> None:
        reader = await output.open()
        rest = b""
        while data := await reader.read(LINE_BYTES_MAX):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) >= LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._log.line(self.service.name, line.decode(errors="replace"))
        if rest:
            self._log.line(self.service.name, rest.decode(errors="replace"))

    async def _aftermath(self, launch: Launch) -> None:
        try:
            async with asyncio.timeout(AFTERMATH_S):
                await self.service.on_exit(launch)
        except Exception as error:
            # what `on_exit` does only speeds recovery up; leases do the same later
            self._log.line(self.service.name, f"clean-up after its exit failed: {error!r}")

    def signal(self, number: signal.Signals) -> None:
        """SIGTERM for the process, SIGKILL for all of its group."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)

    def stop(self) -> None:
        self._stopping.set()
        self.signal(signal.SIGTERM)

    def _to(self, state: ChildState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.service.name}: {self.state} → {state}"
        self.state = state


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


class Supervisor:
    """A fleet of services on this machine. One `run` a supervisor."""

    def __init__(
        self,
        services: Sequence[Service],
        *,
        out: TextIO | None = None,
        clock: Clock | None = None,
        on_change: Callable[[Mapping[str, int]], None] | None = None,
        stop_s: float = STOP_S,
    ) -> None:
        """`on_change` gets name → pid of all running children whenever one starts or ends."""
        names = [service.name for service in services]
        assert len(set(names)) == len(names), "names tell services apart"
        self._log = Log(out or sys.stderr, names)
        self._on_change = on_change
        self._stop_s = stop_s
        ordered = sorted(services, key=lambda service: service.stage)
        self.children = [
            Child(service, self._log, clock or SystemClock(), self._changed) for service in ordered
        ]
        self._keepers: dict[Child, asyncio.Task[None]] = {}
        self._stop_asked = asyncio.Event()
        self._at_once = asyncio.Event()

    def _changed(self) -> None:
        if self._on_change is not None:
            pids = {c.service.name: c.pid for c in self.children if c.pid is not None}
            self._on_change(pids)

    def request_stop(self) -> None:
        """The first call stops in order, the second one at once. What signals call."""
        if self._stop_asked.is_set():
            self._at_once.set()
        self._stop_asked.set()

    def listen_to_signals(self) -> None:
        """SIGINT, SIGTERM and SIGHUP become `request_stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.request_stop)

    async def run(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        """Start everything, call `on_ready` once all are ready, keep it up until asked to stop.

        Raises FleetError when a service cannot be started or kept running; children are gone
        whenever this returns or raises.
        """
        stop = asyncio.create_task(self._stop_asked.wait())
        start = asyncio.create_task(self._start(on_ready))
        try:
            while not stop.done():
                done, _ = await asyncio.wait(
                    {stop, *([] if start.done() else [start]), *self._keepers.values()},
                    return_when=asyncio.FIRST_COMPLETED,
                    timeout=None if start.done() else READY_POLL_S,
                )
                for task in done - {stop}:
                    task.result()  # raises the FleetError of a child that cannot be kept
        finally:
            start.cancel()
            stop.cancel()
            await self._stop()
            await asyncio.gather(start, stop, return_exceptions=True)

    async def _start(self, on_ready: Callable[[], Awaitable[None]]) -> None:
        for child in self.children:
            self._keepers[child] = asyncio.create_task(child.keep())
            if child.service.gate:
                await child.is_ready.wait()
        for child in self.children:
            await child.is_ready.wait()
        await on_ready()

    async def _stop(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for stage in sorted(Stage, reverse=True):
            tasks = []
            for child, task in self._keepers.items():
                if child.service.stage is stage and not task.done():
                    child.stop()
                    tasks.append(task)
            left_s = began + self._stop_s * STOP_SHARES[stage] - loop.time()
            await self._settle(tasks, left_s)
        for child, task in self._keepers.items():
            if not task.done():
                child.signal(signal.SIGKILL)
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    async def _settle(self, tasks: Sequence[asyncio.Task[None]], left_s: float) -> None:
        """Wait for `tasks` until the time is up or somebody wants the end at once; then SIGKILL."""
        if not tasks:
            return
        gone = asyncio.ensure_future(asyncio.wait(tasks))
        at_once = asyncio.create_task(self._at_once.wait())
        await asyncio.wait(
            {gone, at_once}, timeout=max(left_s, 0.1), return_when=asyncio.FIRST_COMPLETED
        )
        for child, task in self._keepers.items():
            if task in tasks and not task.done():
                self._log.line(child.service.name, "did not end in time: killed")
                child.signal(signal.SIGKILL)
        at_once.cancel()
        await gone
        await asyncio.gather(at_once, return_exceptions=True)
