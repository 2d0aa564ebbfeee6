"""A fleet of separate processes to measure: Valkey, workers, gateways, perhaps a cache service.

`headrace up` starts one gateway; these experiments need several, each process's CPU time, and
settings for some of them only. Everything dies with the benchmark.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace import embedded, models

START_S_MAX = 300
STOP_S_MAX = 15


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings_of(pairs: Sequence[str]) -> dict[str, str]:
    """`HEADRACE_X=1` pairs from a command line."""
    wrong = [pair for pair in pairs if "=" not in pair or not pair.startswith("HEADRACE_")]
    if wrong:
        raise SystemExit(f"{wrong[0]!r} is not of the form HEADRACE_NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Fleet:
    """Services by name: `valkey`, `cache`, `w0`…, `gw0`…; a context manager.

    `threads`: of each worker. `env`: settings of all services, `own` of some workers.
    """

    def __init__(
        self,
        workers: int,
        gateways: int = 1,
        *,
        model: str = "smollm2",
        threads: int = 1,
        cache: bool = False,
        env: Mapping[str, str] | None = None,
        own: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.source = model
        self.model = models.served_name(model)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._counts = (workers, gateways)
        self._threads, self._cache = threads, cache
        self._env = dict(env or {})
        self._own = dict(own or {})
        self._temporary = tempfile.TemporaryDirectory(prefix="headrace-bench-")
        self.folder = Path(self._temporary.name)
        self.redis_url = embedded.redis_url(self.folder)
        self.urls = [f"http://127.0.0.1:{free_port()}" for _ in range(gateways)]

    def __enter__(self) -> Fleet:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        deadline = time.monotonic() + STOP_S_MAX
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._temporary.cleanup()

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each service so far."""
        return {name: cpu_s(process.pid) for name, process in self.processes.items()}

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self) -> None:
        data = self.folder / "data"
        data.mkdir()
        self._spawn("valkey", embedded.server_argv(embedded.server_binary(), self.folder, data), {})
        self._until(lambda: embedded.socket_path(self.folder).exists())
        if self._cache:
            self.start_cache()
        workers, _ = self._counts
        for index in range(workers):
            self.start_worker(f"w{index}", self._own.get(f"w{index}"))
        for index, url in enumerate(self.urls):
            port = url.rpartition(":")[2]
            own = {"HEADRACE_PORT": port, "HEADRACE_GATEWAY_ID": f"gw{index}"}
            self._service(f"gw{index}", "headrace_gateway", own)
        self._until(lambda: all(self._ready(url) for url in self.urls))
        if workers:
            self.wait_workers(workers)

    def start_cache(self, own: Mapping[str, str] | None = None) -> None:
        """`own` are settings of it alone."""
        self._service("cache", "headrace_cache", own or {})

    def wait_workers(self, count: int) -> None:
        """Until `count` workers take jobs."""
        self._until(lambda: self._ready_workers() == count)

    def stop(self, name: str) -> None:
        """Ask a service to end, and wait until it has."""
        process = self.processes.pop(name)
        process.terminate()
        process.wait(STOP_S_MAX)

    def start_worker(self, name: str, own: Mapping[str, str] | None = None) -> None:
        """`own` are settings of it alone."""
        settings = {
            "HEADRACE_WORKER_ID": name,
            "HEADRACE_MODEL": self.source,
            "HEADRACE_MODEL_NAME": self.model,
            "HEADRACE_THREADS": str(self._threads),
            "OMP_NUM_THREADS": str(self._threads),
        }
        self._service(name, "headrace_worker", settings | dict(own or {}))

    def wait_serving(self) -> None:
        """Until every gateway has a worker, whoever started that."""
        self._until(lambda: all(self._answers(url + "/ready") for url in self.urls))

    def _service(self, name: str, module: str, own: Mapping[str, str]) -> None:
        self.start(name, [sys.executable, "-m", module], own)

    def start(self, name: str, argv: Sequence[str], own: Mapping[str, str]) -> None:
        """Another process with the settings of this fleet's services; `own` are its own."""
        common = {
            "HEADRACE_REDIS_URL": self.redis_url,
            "HEADRACE_HOST": "127.0.0.1",
            "HEADRACE_CACHE_URL": f"unix://{self.folder}/cache" if self._cache else "",
            "HEADRACE_CACHE_LISTEN": f"unix://{self.folder}/cache",
            "HEADRACE_LOG_LEVEL": "warning",
        }
        self._spawn(name, argv, common | self._env | dict(own))

    def _spawn(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                argv,
                env=os.environ | env,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )

    def _until(self, holds: object) -> None:
        assert callable(holds)
        deadline = time.monotonic() + START_S_MAX
        while not holds():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended:\n{self.log_of(name)[-4000:]}")
            if time.monotonic() > deadline:
                raise SystemExit(f"the fleet is not ready after {START_S_MAX} s")
            time.sleep(0.1)

    def _ready(self, url: str) -> bool:
        # a fleet without workers of its own has nothing to be ready for
        return self._answers(url + ("/ready" if self._counts[0] else "/live"))

    def _answers(self, url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _ready_workers(self) -> int:
        done = subprocess.run(
            [sys.executable, "-m", "headrace.cli.main", "status", "--json"],
            env=os.environ | {"HEADRACE_REDIS_URL": self.redis_url},
            capture_output=True,
        )
        if done.returncode:
            return 0
        return sum(worker["state"] == "ready" for worker in json.loads(done.stdout)["workers"])
