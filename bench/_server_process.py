"""Servers to compare: where each is reached, how it is started, and what its processes have used.

Invariant: a server that is started here is gone, with all that it started, before the next one
starts, so that two never share the cores. Its CPU time and memory are what the kernel counted for
its tree of processes, before and after a workload and never while it runs: looking costs time too.
Rejected: sampling memory while a workload runs (adding up shared pages walks the page tables under
the server's own lock); the kernel keeps each process's peak, and that can be set back.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._fleet import free_port

START_S_MAX = 600
"""A server may compile on its first start."""
STOP_S_MAX = 20
HTTP_S_MAX = 10
LOG_CHARS = 3_000
PROC = Path("/proc")
_FINAL = (400, 401, 403, 422)
"""Answers that waiting does not change."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

DIALECTS: dict[str, tuple[str, ...]] = {
    "headrace": ("ignore_eos",),
    "vllm": ("ignore_eos", "min_tokens"),
    "llamacpp": ("ignore_eos", "n_predict", "cache_prompt"),
    "openai": (),
}
"""By what a server calls itself as the owner of its model: fields beyond OpenAI's that it takes, so
that a text has as many tokens as were asked for. Who says something else gets OpenAI's alone."""


class ServerError(Exception):
    """A server that cannot be measured: it did not start, or does not answer as it should."""


@dataclass(frozen=True)
class Server:
    """One line of the comparison. `url`, or a `command` with `{port}` and perhaps `{folder}`.

    `pid`: the process whose tree counts where only a URL is known, 0 where nobody said.
    """

    name: str
    url: str = ""
    pid: int = 0
    command: str = ""

    @classmethod
    def parse(cls, text: str) -> Server:
        """`NAME=http://host:port[,pid=N]`, or `NAME=command …`. Raises ValueError."""
        name, separator, how = text.partition("=")
        name, how = name.strip(), how.strip()
        if not separator or not _NAME.fullmatch(name) or not how:
            raise ValueError(f"{text!r} is not NAME=URL or NAME=COMMAND")
        if how.startswith(("http://", "https://")):
            url, _, option = how.partition(",")
            key, _, value = option.partition("=")
            if option and (key != "pid" or not value.isdigit()):
                raise ValueError(f"{name}: after the URL comes pid=NUMBER, not {option!r}")
            return cls(name, url=url.rstrip("/").removesuffix("/v1"), pid=int(value or 0))
        if "{port}" not in how:
            raise ValueError(f"{name}: the command has to say {{port}} where its port goes")
        try:
            shlex.split(how)
        except ValueError as error:
            raise ValueError(f"{name}: {how!r} cannot be split into words: {error}") from error
        return cls(name, command=how)

    def argv(self, port: int, folder: Path) -> list[str]:
        """What is started, without a shell: `env NAME=VALUE …` sets variables."""
        words = shlex.split(self.command)
        return [w.replace("{port}", str(port)).replace("{folder}", str(folder)) for w in words]


@dataclass(frozen=True)
class Live:
    """A server that answers. `pid` 0: nothing is known of its processes."""

    url: str
    model: str
    dialect: str
    pid: int
    start_s: float


@dataclass(frozen=True)
class Usage:
    """CPU seconds of a tree of processes so far; the sums of their peaks and shares of memory.

    `peak_bytes` counts a page once for each process that maps it; `share_bytes`, taken now, once.
    """

    cpu_s: float
    peak_bytes: int
    share_bytes: int


# --- processes


def tree(pid: int) -> list[int]:
    """`pid`, its descendants, and who else is in its session."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)], sessions[int(entry.name)] = int(fields[1]), int(fields[3])
    found = {p for p in parents if p == pid or sessions[p] == pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def usage(pid: int) -> Usage:
    """Of `pid`'s tree; who ended and was waited for counts in its parent."""
    cpu = peak = share = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            fields = (PROC / str(one) / "stat").read_text().rpartition(")")[2].split()
            cpu += sum(int(field) for field in fields[11:15])
            peak += _kib(PROC / str(one) / "status", "VmHWM:") * 1024
            share += _kib(PROC / str(one) / "smaps_rollup", "Pss:") * 1024
    return Usage(cpu / _TICKS_PER_S, peak, share)


def forget_peaks(pid: int) -> None:
    """Peaks of the tree count from now on, where the kernel allows it."""
    for one in tree(pid):
        with contextlib.suppress(OSError):
            (PROC / str(one) / "clear_refs").write_text("5")


def busy_s() -> float:
    """CPU seconds that all processes of this machine have used, those of its host included."""
    fields = (PROC / "stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, soft, steal = map(int, fields)
    return (user + nice + system + irq + soft + steal) / _TICKS_PER_S


def _kib(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return 0


# --- a turn


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[Live]:
    """The server, ready for requests; one that was started here is stopped. Raises ServerError."""
    if server.url:
        yield _ready(server.url, server.pid, None, log)
        return
    with tempfile.TemporaryDirectory(prefix="bench-server-") as folder:
        port = free_port()
        argv = server.argv(port, Path(folder))
        with log.open("ab") as out:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise ServerError(f"cannot start {argv[0]}: {error}") from error
        try:
            yield _ready(f"http://127.0.0.1:{port}", process.pid, process, log)
        finally:
            _stop(process)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _ready(url: str, pid: int, process: subprocess.Popen[bytes] | None, log: Path) -> Live:
    """Waits until a text of one token comes."""
    began = time.monotonic()
    while True:
        try:
            model, owner = _model(url)
            dialect = owner if owner in DIALECTS else "openai"
            _ask(f"{url}/v1/completions", {"model": model, "prompt": " one", "max_tokens": 1})
            return Live(url, model, dialect, pid, time.monotonic() - began)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, urllib.error.HTTPError) and error.code in _FINAL:
                raise ServerError(f"{url} refuses a completion: {error}") from error
        if process is not None and process.poll() is not None:
            tail = log.read_text(errors="replace")[-LOG_CHARS:]
            raise ServerError(f"it ended with {process.returncode}:\n{tail}")
        if process is None or time.monotonic() - began > START_S_MAX:
            raise ServerError(f"no completion from {url}: {reason}")
        time.sleep(0.25)


def _model(url: str) -> tuple[str, str]:
    """The first model's name and owner."""
    first = _ask(f"{url}/v1/models", None)["data"][0]
    return str(first["id"]), str(first.get("owned_by", ""))


def _ask(url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=HTTP_S_MAX) as answer:
        return json.load(answer)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks it to end, then ends whatever is left of its tree."""
    members = {pid: _born(pid) for pid in tree(process.pid)}
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S_MAX)
    members |= {pid: _born(pid) for pid in tree(process.pid)}
    for pid, born in members.items():
        if born and _born(pid) == born:  # the number may be another process's by now
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    ends = time.monotonic() + STOP_S_MAX
    while any(born and _born(pid) == born for pid, born in members.items()):
        if time.monotonic() > ends:  # in the kernel, on a disk that does not answer
            break
        time.sleep(0.01)


def _born(pid: int) -> int:
    """When a process began, in ticks since the machine's start; 0 for one that is gone."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
