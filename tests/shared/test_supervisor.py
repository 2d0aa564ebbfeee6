"""The supervisor: who lives, who is started again, who goes first, and that nobody stays behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from redis.asyncio import Redis

from headrace import embedded, keys, streams
from headrace.cli import stack
from headrace.cli.common import CommandError, RunFile
from headrace.supervisor import (
    BACKOFF_MS,
    BACKOFF_MS_MAX,
    RESTART_WINDOW_MS,
    UNREADY_EXITS_MAX,
    FleetError,
    Launch,
    RestartBudget,
    Service,
    Stage,
    Supervisor,
)

DEADLINE_S = 20.0


async def always(launch: Launch) -> bool:
    return True


async def never(launch: Launch) -> bool:
    return False


async def nothing() -> None:
    """An `on_ready` that does nothing."""


def shell(name: str, script: str, stage: Stage = Stage.WORKER, **facts: object) -> Service:
    """A service that is a line of shell; ready at once unless told otherwise."""
    options = {"ready": always} | facts
    launch = Launch(["sh", "-c", script])
    return Service(name, stage, lambda: launch, **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Watched:
    """A supervisor that runs in the background of a test."""

    def __init__(self, *services: Service, stop_s: float = 8.0) -> None:
        self.out = io.StringIO()
        self.pids: dict[str, int] = {}
        self.ready = asyncio.Event()
        self.supervisor = Supervisor(services, out=self.out, on_change=self._changed, stop_s=stop_s)
        self.task = asyncio.create_task(self.supervisor.run(self._ready))

    def _changed(self, pids: Mapping[str, int]) -> None:
        self.pids = dict(pids)

    async def _ready(self) -> None:
        self.ready.set()

    async def until(self, check: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not check():
                assert not self.task.done() or self.task.exception() is None, self.task
                await asyncio.sleep(0.01)

    async def up(self) -> None:
        await asyncio.wait_for(self.ready.wait(), DEADLINE_S)

    async def stop(self) -> None:
        self.supervisor.request_stop()
        await asyncio.wait_for(self.task, DEADLINE_S)


# --- which deaths are borne


def test_the_first_death_costs_no_wait_and_later_ones_ever_more() -> None:
    """Delays double up to a maximum, and start afresh after a quiet window."""
    budget = RestartBudget()
    delays = [budget.on_exit(now_ms=n, was_ready=True).delay_ms for n in range(8)]
    assert delays[:4] == [0, BACKOFF_MS, 2 * BACKOFF_MS, 4 * BACKOFF_MS]
    assert delays[-1] == BACKOFF_MS_MAX
    assert budget.on_exit(now_ms=2 * RESTART_WINDOW_MS, was_ready=True).delay_ms == 0


def test_too_many_deaths_in_a_window_are_the_end() -> None:
    """The limit counts deaths of a service that always got ready in between."""
    budget = RestartBudget(restarts_max=3)
    assert all(budget.on_exit(n, was_ready=True).restart for n in range(3))
    verdict = budget.on_exit(3, was_ready=True)
    assert not verdict.restart
    assert "died 4 times" in verdict.reason


def test_a_service_that_never_gets_ready_is_not_tried_for_ever() -> None:
    """However slowly it fails: the window does not matter when no start succeeds."""
    budget = RestartBudget()
    times = [n * 2 * RESTART_WINDOW_MS for n in range(UNREADY_EXITS_MAX)]
    verdicts = [budget.on_exit(now_ms, was_ready=False) for now_ms in times]
    assert [v.restart for v in verdicts] == [True] * (UNREADY_EXITS_MAX - 1) + [False]


# --- a fleet of small processes


async def test_a_child_that_dies_is_started_again_and_its_end_is_told() -> None:
    """Each start has its own tag, and `on_exit` gets the tag of the start that ended."""
    ended: list[str] = []
    starts = iter(range(10))

    async def on_exit(launch: Launch) -> None:
        ended.append(launch.tag)

    service = Service(
        "worker-0",
        Stage.WORKER,
        lambda: Launch(["sleep", "1000"], tag=f"start-{next(starts)}"),
        always,
        on_exit=on_exit,
    )
    fleet = Watched(service)
    await fleet.up()
    first = fleet.pids["worker-0"]
    os.kill(first, signal.SIGKILL)
    await fleet.until(lambda: fleet.pids.get("worker-0", first) != first)
    assert ended == ["start-0"]
    assert "was ended by SIGKILL; starting again" in fleet.out.getvalue()
    await fleet.stop()
    assert ended == ["start-0", "start-1"]
    assert fleet.pids and not any(alive(pid) for pid in fleet.pids.values())


async def test_stopping_goes_front_first(tmp_path: Path) -> None:
    """Gateway, worker, cache, store: each is gone before the next one hears of the end."""
    story = tmp_path / "story"
    services = [
        shell(
            stage.name.lower(),
            f"trap 'echo {stage.name} asked >>{story}; sleep 0.05; "
            f"echo {stage.name} gone >>{story}; exit 0' TERM; "
            f"touch {tmp_path}/{stage.name}; while :; do sleep 0.02; done",
            stage,
        )
        for stage in Stage
    ]
    fleet = Watched(*services)
    await fleet.up()
    await fleet.until(lambda: all((tmp_path / stage.name).exists() for stage in Stage))
    await fleet.stop()
    order = ["GATEWAY", "WORKER", "CACHE", "STORE"]
    expected = [f"{name} {what}" for name in order for what in ("asked", "gone")]
    assert story.read_text().splitlines() == expected


async def test_a_child_that_will_not_go_is_killed_with_its_own_children(tmp_path: Path) -> None:
    """SIGTERM first, then SIGKILL for the whole process group."""
    pid_file = tmp_path / "pid"
    script = f"trap '' TERM; sleep 1000 & echo $! >{pid_file}; while :; do sleep 0.05; done"
    fleet = Watched(shell("worker-0", script), stop_s=0.2)
    await fleet.up()
    await fleet.until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
    grandchild = int(pid_file.read_text())
    await fleet.stop()
    assert "did not end in time: killed" in fleet.out.getvalue()
    wait_until(lambda: not alive(grandchild))


async def test_a_second_request_ends_everything_at_once(tmp_path: Path) -> None:
    """Without it this stop would take as long as `stop_s` says, which the test could not bear."""
    started, mark = tmp_path / "started", tmp_path / "mark"
    script = f"trap 'touch {mark}' TERM; touch {started}; while :; do sleep 0.02; done"
    fleet = Watched(shell("worker-0", script), stop_s=10 * DEADLINE_S)
    await fleet.until(started.exists)
    fleet.supervisor.request_stop()
    await fleet.until(mark.exists)
    await fleet.stop()


async def test_a_gate_holds_later_stages_back() -> None:
    """Nothing is started that would only fail until the store is there."""
    open_gate = asyncio.Event()

    async def ready(launch: Launch) -> bool:
        return open_gate.is_set()

    fleet = Watched(
        shell("valkey", "sleep 1000", Stage.STORE, ready=ready, gate=True),
        shell("worker-0", "sleep 1000"),
    )
    await fleet.until(lambda: "valkey" in fleet.pids)
    await asyncio.sleep(0)
    assert "worker-0" not in fleet.pids
    open_gate.set()
    await fleet.up()
    assert set(fleet.pids) == {"valkey", "worker-0"}
    await fleet.stop()


async def test_a_service_that_cannot_start_ends_the_fleet_and_says_which() -> None:
    """The others are stopped too: half a fleet helps nobody."""
    fleet = Watched(
        shell("cache", "sleep 1000", Stage.CACHE), shell("worker-0", "exit 3", ready=never)
    )
    with pytest.raises(
        FleetError, match="worker-0 ended with exit code 3: failed 3 times in a row"
    ):
        await asyncio.wait_for(fleet.task, DEADLINE_S)
    assert not any(alive(pid) for pid in fleet.pids.values())


async def test_a_bad_setting_is_not_tried_again() -> None:
    """Exit code 2 before readiness: another try would say the same."""
    fleet = Watched(shell("worker-0", "echo bad >&2; exit 2", ready=never))
    with pytest.raises(FleetError, match="its last line says why"):
        await asyncio.wait_for(fleet.task, DEADLINE_S)
    assert fleet.out.getvalue().count("worker-0 | bad") == 1


async def test_every_line_bears_its_service_and_long_ones_are_cut() -> None:
    """Both of a child's streams, without a limit on what it may print."""
    script = "echo one; echo two >&2; head -c 100000 /dev/zero | tr '\\0' x; sleep 1000"
    fleet = Watched(shell("a", script), shell("worker-0", "echo three; sleep 1000"))
    await fleet.until(lambda: fleet.out.getvalue().count("x") > 90_000)
    await fleet.stop()
    lines = fleet.out.getvalue().splitlines()
    assert {"a        | one", "a        | two", "worker-0 | three"} <= set(lines)
    assert all(line.startswith(("a        | ", "worker-0 | ")) for line in lines)
    assert max(map(len, lines)) < 40_000


# --- the parent dies


PARENT = """
import asyncio, sys
from headrace.supervisor import Launch, Service, Stage, Supervisor

async def always(launch): return True
async def nothing(): print("ready", flush=True)

services = [
    Service(n, Stage.WORKER, lambda: Launch(["sleep", "1000"]), always) for n in ("a", "b")
]
def say(pids): print(*pids.values(), flush=True)
asyncio.run(Supervisor(services, on_change=say).run(nothing))
"""


def test_no_child_survives_a_parent_that_is_killed() -> None:
    """kill -9 of the supervisor: nobody is left to tell the children, but the kernel does."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        lines = []
        for line in parent.stdout:
            if line.strip() == "ready":
                break
            lines.append(line)
        pids = [int(pid) for pid in lines[-1].split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids))


# --- the embedded Valkey under it


def valkey_service(folder: Path, data: Path) -> Service:
    data.mkdir(exist_ok=True)
    launch = Launch(embedded.server_argv(embedded.server_binary(), folder, data))

    async def ready(launch: Launch) -> bool:
        return await embedded.answers(embedded.redis_url(folder))

    return Service("valkey", Stage.STORE, lambda: launch, ready, gate=True)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # pytest's own temporary paths are too long for a socket's address
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    folder = embedded.runtime_dir(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    yield folder  # type: ignore[misc]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


async def test_what_valkey_has_taken_survives_its_death(runtime: Path, tmp_path: Path) -> None:
    """kill -9, a restart by the supervisor, and the same stream entries are there."""
    fleet = Watched(valkey_service(runtime, tmp_path / "valkey"))
    await fleet.up()
    redis: Redis = streams.connect(embedded.redis_url(runtime))
    for n in range(100):
        await redis.xadd("s", {"n": str(n)})
    first = fleet.pids["valkey"]
    os.kill(first, signal.SIGKILL)
    await fleet.until(lambda: fleet.pids.get("valkey", first) != first)
    await fleet.until(lambda: fleet.supervisor.children[0].is_ready.is_set())
    await redis.connection_pool.disconnect()
    assert await redis.xlen("s") == 100
    await redis.aclose()
    await fleet.stop()


async def test_a_dead_workers_lease_ends_with_it(runtime: Path, tmp_path: Path) -> None:
    """The supervisor buries it: no lease, and one event that wakes the dispatcher."""
    fleet = Watched(valkey_service(runtime, tmp_path / "valkey"))
    await fleet.up()
    url = embedded.redis_url(runtime)
    parts = stack.Fleet(options(tmp_path), "m", url, runtime)
    worker = next(s for s in parts.services() if s.stage is Stage.WORKER)
    launches = [worker.launch(), worker.launch()]
    assert launches[0].tag != launches[1].tag
    await parts.redis.set(keys.lease("m", launches[0].tag), b"1", px=60_000)
    await worker.on_exit(launches[0])
    assert not await parts.redis.exists(keys.lease("m", launches[0].tag))
    assert await parts.redis.xlen(keys.events("m")) == 1
    await parts.redis.aclose()
    await fleet.stop()


def test_a_socket_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared /tmp: a link that was put there first would hand the data over."""
    with tempfile.TemporaryDirectory(prefix="hr-") as short:  # a socket's address is limited
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        folder = embedded.runtime_dir(tmp_path)
        folder.rmdir()
        folder.symlink_to(tmp_path)
        with pytest.raises(embedded.SettingsError, match="not a folder of yours"):
            embedded.runtime_dir(tmp_path)


# --- before anything starts


def options(data_dir: Path, **changes: object) -> stack.UpOptions:
    facts: dict[str, object] = {
        "host": "127.0.0.1", "port": 0, "workers": 1, "roles": (0, 0),
        "model": "smollm2", "model_name": "",
        "dtype": "", "quantization": "", "kv_dtype": "", "threads": None,
        "tensor_parallel": 1, "pipeline_parallel": 1,
        "speculation": "", "context_tokens": None,
        "data_dir": data_dir, "redis_url": "", "api_keys": "",
        "otlp_endpoint": "", "kv_tokens": None, "max_jobs": None, "cache_bytes": None,
        "cache_disk_path": None, "cache_disk_bytes": None, "no_cache": False,
    }  # fmt: skip
    return stack.UpOptions(**facts | changes)  # type: ignore[arg-type]


def test_a_taken_port_is_said_plainly() -> None:
    """And port 0 answers with one that is free."""
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port} on 127.0.0.1 is taken"):
            stack.free_port("127.0.0.1", port)
    assert stack.free_port("127.0.0.1", 0) > 0
    with pytest.raises(CommandError, match="not an address of this machine"):
        stack.free_port("no such host", 8000)


def test_two_fleets_never_share_a_data_directory(tmp_path: Path) -> None:
    """The second one names the first; once that is gone, the directory is free."""
    with stack._exclusive(tmp_path):
        RunFile(os.getpid(), "unix:///x", "http://127.0.0.1:1", "m", 0).write(tmp_path)
        first = rf"another `headrace up` \(pid {os.getpid()}"
        with pytest.raises(CommandError, match=first), stack._exclusive(tmp_path):
            pass
    with stack._exclusive(tmp_path):
        pass
