"""The real thing for tests: Valkey, cache service, workers and gateways, each a process."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from headrace import keys, wire, wire_reports
from headrace.streams import connect
from headrace.types import WorkerStatus
from support.valkey import Valkey

START_S_MAX = 120


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Stack:
    """Services by name; workers are named by their worker id.

    `each`: settings of the first workers, one after another.
    """

    workers: int = 1
    gateways: int = 1
    model: str = "smollm2"
    env: dict[str, str] = field(default_factory=dict)
    each: Sequence[dict[str, str]] = ()
    roles: tuple[str, ...] = ()
    """Of the first workers; the others do both."""

    def __post_init__(self) -> None:
        self.valkey = Valkey(aof=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: Path = self.valkey.folder / "logs"
        self.logs.mkdir()
        self.cache_url = f"unix://{self.valkey.folder}/c"
        self.cache_env: dict[str, str] = {}
        """Settings of the cache service alone, from its next start on."""
        self.ports = [free_port() for _ in range(self.gateways)]
        self._spawned = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def __enter__(self) -> Stack:
        self.valkey.start()
        self.start_cache()
        for number in range(self.workers):
            own = self.each[number] if number < len(self.each) else {}
            role = self.roles[number] if number < len(self.roles) else "both"
            self.start_worker(role, **own)
        for index, port in enumerate(self.ports):
            self._spawn(f"gateway{index}", "headrace_gateway", HEADRACE_PORT=str(port))
        self.wait_ready(self.workers)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + 12
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.valkey.close()

    def start_cache(self) -> None:
        own = {"HEADRACE_CACHE_LISTEN": self.cache_url} | self.cache_env
        self._spawn("cache", "headrace_cache", **own)

    def start_worker(self, role: str = "both", **env: str) -> str:
        """Its name is its role's, where it has a special one."""
        self._spawned += 1
        name = f"{'w' if role == 'both' else role}{self._spawned}"
        own = {"HEADRACE_WORKER_ID": name, "HEADRACE_ROLE": role} | env
        self._spawn(name, "headrace_worker", **own)
        return name

    def start_torchrun(self, names: list[str], commands: list[list[str]], **env: str) -> None:
        """One worker over several hosts: each of `commands` runs the worker module on one."""
        for name, command in zip(names, commands, strict=True):
            self._spawn(name, "headrace_worker", command, HEADRACE_WORKER_ID=names[0], **env)

    def _spawn(self, name: str, module: str, command: list[str] | None = None, **env: str) -> None:
        base = {
            "HEADRACE_REDIS_URL": self.valkey.url,
            "HEADRACE_CACHE_URL": self.cache_url,
            "HEADRACE_HOST": "127.0.0.1",
            "HEADRACE_MODEL": self.model,
            "HEADRACE_DTYPE": "float32",
            "HEADRACE_QUANTIZATION": "none",
            "HEADRACE_THREADS": "1",
            "HEADRACE_KV_TOKENS": "16384",
            "HEADRACE_DEBUG": "1",
        }
        log = (self.logs / f"{name}.log").open("wb")
        self.processes[name] = subprocess.Popen(
            [*(command or [sys.executable]), "-m", module],
            env=os.environ | base | self.env | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        log.close()

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send `number` to a service and wait for its end."""
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait()

    def stop(self, name: str, limit_s: float = 15) -> int:
        """Ask a service to end, as an orderly stop does; its exit code."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(limit_s)

    def wait_lease(self, worker: str) -> None:
        """Until `worker` takes jobs, whichever process it is."""
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            if asyncio.run(self._leased(worker)):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{worker} is not there:\n{self.log_of(worker)[-4000:]}")

    async def _leased(self, worker: str) -> bool:
        redis = connect(self.valkey.url)
        try:
            return bool(await redis.exists(keys.lease(self.model, worker)))
        finally:
            await redis.aclose()

    def log_of(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                raw, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            raw, status = error.read(), error.code
            error.close()
        text = raw.decode()
        return status, json.loads(text) if text[:1] in "{[" else text

    def wait_ready(self, workers: int) -> None:
        """Until the gateway answers and `workers` workers take jobs."""
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended:\n{self.log_of(name)[-4000:]}")
            try:
                ready = self.get("/ready")[0] == 200 and self.workers_now() >= workers
            except OSError:
                ready = False
            if ready:
                return
            time.sleep(0.05)
        logs = "\n".join(f"--- {name}\n{self.log_of(name)[-2000:]}" for name in self.processes)
        raise RuntimeError(f"not ready in {START_S_MAX} s\n{logs}")

    async def statuses(self) -> dict[str, WorkerStatus]:
        """What each live worker last said of itself; killed ones count no more at once."""
        alive = {process.pid for process in self.processes.values()}
        redis = connect(self.valkey.url)
        try:
            found = {}
            for raw in (await redis.hgetall(keys.workers(self.model))).values():
                record = wire.decode_worker(raw)
                status = await redis.get(keys.status(self.model, record.id))
                leased = await redis.exists(keys.lease(self.model, record.id))
                if status and leased and record.pid in alive:
                    found[record.id] = wire_reports.decode_status(status)
            return found
        finally:
            await redis.aclose()

    def workers_now(self) -> int:
        """How many workers live; for callers with or without a running event loop."""
        with ThreadPoolExecutor(1) as aside:
            return len(aside.submit(asyncio.run, self.statuses()).result())

    async def leftovers(self) -> dict[str, int]:
        """Everything that must be zero when nothing runs."""
        redis = connect(self.valkey.url)
        try:
            return await _leftovers(redis, self.model)
        finally:
            await redis.aclose()

    async def wait_idle(self, limit_s: float = 15) -> None:
        """Until no job, reservation, stream entry or live generation is left."""
        left: dict[str, int] = {}
        async with asyncio.timeout(limit_s):
            try:
                while left := {k: v for k, v in (await self.leftovers()).items() if v}:
                    await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                raise AssertionError(f"not idle after {limit_s} s: {left}") from None


async def _leftovers(redis: Redis, model: str) -> dict[str, int]:
    left = {"intake": await redis.xlen(keys.intake(model))}
    for raw in await redis.hkeys(keys.workers(model)):
        worker = raw.decode()
        left[f"{worker} entries"] = await redis.xlen(keys.jobs(model, worker))
        for name, value in (await redis.hgetall(keys.load(model, worker))).items():
            left[f"{worker} reserved {name.decode()}"] = int(value)
        status = await redis.get(keys.status(model, worker))
        if status:
            decoded = wire_reports.decode_status(status)
            left[f"{worker} running"] = decoded.running
            left[f"{worker} waiting"] = decoded.waiting
    return left
