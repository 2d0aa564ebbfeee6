"""What `headrace up` starts: the services, their settings and when each of them is ready.

Invariant: everything that can be known to fail (a taken port, a data directory in use, an absent
model, a Redis that does not answer) is said before the first process starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from redis.asyncio import Redis

from headrace import embedded, keys, models, streams
from headrace.cli.common import CommandError, RunFile, data_dir_of, place
from headrace.cli.fleet import worker_ready
from headrace.errors import ModelError
from headrace.supervisor import Launch, Service, Stage, Supervisor
from headrace.types import WorkerRole

STORE_READY_S = 120.0
CACHE_READY_S = 30.0
WORKER_READY_S = 900.0
GATEWAY_READY_S = 30.0
SERVING_S = 30.0
"""How long the gateway may take to see workers that are ready."""
HTTP_S = 2.0
DRAIN_MS = 2_500
"""What gateway and worker may take to end their work; both fit into the supervisor's STOP_S."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The flags of `up`; '' and None leave the choice to the service.

    `roles`: how many of the workers, the first ones, compute prompts, and how many decode.
    """

    host: str
    port: int
    workers: int
    roles: tuple[int, int]
    model: str
    model_name: str
    dtype: str
    quantization: str
    kv_dtype: str
    speculation: str
    context_tokens: int | None
    tensor_parallel: int
    pipeline_parallel: int
    threads: int | None
    data_dir: Path
    redis_url: str
    api_keys: str
    otlp_endpoint: str
    kv_tokens: int | None
    max_jobs: int | None
    cache_bytes: int | None
    cache_disk_path: Path | None
    cache_disk_bytes: int | None
    no_cache: bool

    @property
    def served_name(self) -> str:
        return keys.check_model_name(self.model_name or models.served_name(self.model))

    @property
    def http_url(self) -> str:
        return f"http://{_url_host(self.host)}:{self.port}"


def run(options: UpOptions) -> None:
    """Bring the fleet up and keep it up until a signal. Raises HeadraceError."""
    options = replace(options, port=free_port(options.host, options.port))
    name = options.served_name
    _check_redis_url(options.redis_url)
    _make_data_dir(options.data_dir)
    with _exclusive(options.data_dir):
        place(options.data_dir).unlink(missing_ok=True)  # of one that was killed
        has_model(options.model)
        runtime = embedded.runtime_dir(options.data_dir)
        try:
            if options.redis_url:
                fleet = Fleet(options, name, options.redis_url, runtime)
            else:
                binary = embedded.server_binary()
                fleet = Fleet(options, name, embedded.redis_url(runtime), runtime, binary)
            asyncio.run(_supervise(options, fleet))
        finally:
            place(options.data_dir).unlink(missing_ok=True)
            shutil.rmtree(runtime, ignore_errors=True)


async def _supervise(options: UpOptions, fleet: Fleet) -> None:
    if options.redis_url and not await embedded.answers(options.redis_url):
        raise CommandError(
            f"no Redis answers at {_without_password(options.redis_url)}: start it, or leave "
            "--redis-url away to use the embedded one"
        )
    facts = RunFile(
        pid=os.getpid(),
        redis_url=fleet.redis_url,
        http_url=options.http_url,
        model=fleet.model,
        started_ms=time.time_ns() // 1_000_000,
    )

    def on_change(pids: Mapping[str, int]) -> None:
        replace(facts, processes=dict(pids)).write(options.data_dir)

    began = time.monotonic()

    async def on_ready() -> None:
        await until_serving(options)
        print(banner(options, fleet.model, time.monotonic() - began), flush=True)

    supervisor = Supervisor(fleet.services(), on_change=on_change)
    supervisor.listen_to_signals()
    try:
        await supervisor.run(on_ready)
    finally:
        await fleet.redis.aclose()


# --- the services


class Fleet:
    """The services of one `up`, with the addresses at which they find each other."""

    def __init__(
        self,
        options: UpOptions,
        model: str,
        redis_url: str,
        runtime: Path,
        valkey: Path | None = None,
    ) -> None:
        """`valkey` is the server to start; None when `redis_url` is served by somebody else."""
        self.model = model
        self.redis_url = redis_url
        self.redis: Redis = streams.connect(redis_url)
        self._options = options
        self._runtime = runtime
        self._valkey = valkey
        self._cache_socket = runtime / "cache.sock"
        self._common = {
            "HEADRACE_REDIS_URL": redis_url,
            "HEADRACE_OTLP_ENDPOINT": options.otlp_endpoint,
            "HEADRACE_API_KEYS": "",  # the gateway's alone
            "HEADRACE_DRAIN_MS": str(DRAIN_MS),
        }

    def services(self) -> list[Service]:
        found = [self._store(self._valkey)] if self._valkey is not None else []
        if not self._options.no_cache:
            found.append(self._cache())
        found += [self._worker(index) for index in range(self._options.workers)]
        return [*found, self._gateway()]

    def _store(self, binary: Path) -> Service:
        data = self._options.data_dir / "valkey"
        data.mkdir(mode=0o700, exist_ok=True)
        launch = Launch(embedded.server_argv(binary, self._runtime, data))

        async def ready(launch: Launch) -> bool:  # noqa: ARG001  # the shape of Service.ready
            return await embedded.answers(self.redis_url)

        return Service("valkey", Stage.STORE, lambda: launch, ready, STORE_READY_S, gate=True)

    def _cache(self) -> Service:
        env = {"HEADRACE_CACHE_LISTEN": self._cache_url()}
        if self._options.cache_bytes is not None:
            env["HEADRACE_CACHE_BYTES"] = str(self._options.cache_bytes)
        env["HEADRACE_CACHE_DISK_PATH"] = str(self._options.cache_disk_path or "")
        if self._options.cache_disk_bytes is not None:
            env["HEADRACE_CACHE_DISK_BYTES"] = str(self._options.cache_disk_bytes)
        launch = Launch(_module("headrace_cache"), self._common | _metrics_env(0) | env)

        async def ready(launch: Launch) -> bool:  # noqa: ARG001  # the shape of Service.ready
            return await _socket_answers(self._cache_socket)

        return Service("cache", Stage.CACHE, lambda: launch, ready, CACHE_READY_S)

    def _cache_url(self) -> str:
        return f"unix://{self._cache_socket}"

    def _worker(self, index: int) -> Service:
        env = self._common | worker_env(self._options, self.model, index)
        env["HEADRACE_CACHE_URL"] = "" if self._options.no_cache else self._cache_url()

        def launch() -> Launch:
            # an id is one incarnation: what the last one held must never look like this one's
            worker_id = f"w{index}-{secrets.token_hex(4)}"
            own = {"HEADRACE_WORKER_ID": worker_id}
            return Launch(_module("headrace_worker"), env | own, worker_id)

        async def ready(launch: Launch) -> bool:
            try:
                return await worker_ready(self.redis, self.model, launch.tag)
            except streams.REDIS_DOWN:
                return False

        return Service(
            f"worker-{index}", Stage.WORKER, launch, ready, WORKER_READY_S, on_exit=self._bury
        )

    async def _bury(self, launch: Launch) -> None:
        """End a dead worker's lease now: its jobs move on at once instead of when it runs out."""
        await self.redis.delete(keys.lease(self.model, launch.tag))
        await self.redis.xadd(
            keys.events(self.model), {"e": b"x"}, maxlen=keys.EVENTS_MAX, approximate=True
        )

    def _gateway(self) -> Service:
        env = {
            "HEADRACE_HOST": self._options.host,
            "HEADRACE_PORT": str(self._options.port),
            "HEADRACE_API_KEYS": self._options.api_keys,
            "HEADRACE_CACHE_URL": "" if self._options.no_cache else self._cache_url(),
        }
        launch = Launch(_module("headrace_gateway"), self._common | env)

        async def ready(launch: Launch) -> bool:  # noqa: ARG001  # the shape of Service.ready
            status, _ = await _get(self._options.host, self._options.port, "/live")
            return status == 200

        return Service("gateway", Stage.GATEWAY, lambda: launch, ready, GATEWAY_READY_S)


def worker_env(options: UpOptions, model: str, index: int) -> dict[str, str]:
    """The settings of worker `index`; what no flag says is left to the worker."""
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.workers)
    env = {
        "HEADRACE_MODEL": options.model,
        "HEADRACE_MODEL_NAME": model,
        "HEADRACE_TENSOR_PARALLEL": str(options.tensor_parallel),
        "HEADRACE_PIPELINE_PARALLEL": str(options.pipeline_parallel),
        "HEADRACE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    optional = {
        "HEADRACE_DTYPE": options.dtype or None,
        "HEADRACE_QUANTIZATION": options.quantization or None,
        "HEADRACE_KV_DTYPE": options.kv_dtype or None,
        "HEADRACE_SPECULATION": options.speculation or None,
        "HEADRACE_CONTEXT_TOKENS": options.context_tokens,
        "HEADRACE_KV_TOKENS": options.kv_tokens,
        "HEADRACE_MAX_JOBS": options.max_jobs,
        "HEADRACE_ROLE": role_of(options.roles, index),
    }
    env |= {key: str(value) for key, value in optional.items() if value is not None}
    return env | _metrics_env(1 + index)


def role_of(roles: tuple[int, int], index: int) -> str | None:
    """What worker `index` of a fleet with so many of each is to be; None: what it is by default."""
    prefill, decode = roles
    if index < prefill:
        return WorkerRole.PREFILL.value
    return WorkerRole.DECODE.value if index < prefill + decode else None


def _metrics_env(offset: int) -> dict[str, str]:
    """Processes of one machine cannot share HEADRACE_METRICS_PORT: they count up from it."""
    text = os.environ.get("HEADRACE_METRICS_PORT", "")
    port = int(text) if text.isdigit() else 0
    return {"HEADRACE_METRICS_PORT": str(port + offset)} if port else {}


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


# --- before the first process


def free_port(host: str, port: int) -> int:
    """`port` itself, or a free one for 0. Raises CommandError when it cannot be served on."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise CommandError(f"{host} is not an address of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CommandError(
                f"port {port} on {host} is taken: stop what listens there, "
                f"or choose another with --port"
            ) from error
        raise CommandError(f"cannot serve on {host} port {port}: {error.strerror}") from error


def _make_data_dir(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make {folder}: {error.strerror}: see --data-dir") from error


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """No second `up` on the same data. Raises CommandError naming the first."""
    try:
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = RunFile.read(folder)
            who = f" (pid {running.pid}, {running.http_url})" if running else ""
            raise CommandError(
                f"another `headrace up`{who} uses {folder}: stop it, or give this one "
                "its own --data-dir"
            ) from None
        yield


def has_model(model: str) -> None:
    """Pull it if it is not here. Raises HeadraceError."""
    try:
        models.resolve(model)
    except ModelError:
        from rich.console import Console

        from headrace.cli.pull import fetch

        fetch(model, Console(stderr=True))


def _check_redis_url(url: str) -> None:
    """Raises CommandError for what is no Redis URL at all."""
    try:
        if url:
            streams.connect(url)
    except ValueError as error:
        raise CommandError(f"--redis-url: {error}") from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


# --- readiness


async def _socket_answers(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    writer.close()
    return True


async def _get(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET on this machine; status 0 when nothing answers."""
    host = _reachable(host)
    try:
        async with asyncio.timeout(HTTP_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                head, _, body = (await reader.read(65_536)).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return int(head.split(maxsplit=2)[1]), body.decode(errors="replace")
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0, ""


async def until_serving(options: UpOptions) -> None:
    """Until the gateway takes requests. Raises CommandError."""
    status, body = 0, ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SERVING_S):
            while True:
                status, body = await _get(options.host, options.port, "/ready")
                if status == 200:
                    return
                await asyncio.sleep(0.05)
    raise CommandError(f"the gateway does not become ready: HTTP {status} {body.strip()[:300]}")


def _reachable(host: str) -> str:
    """Where this machine reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _url_host(host: str) -> str:
    host = _reachable(host)
    return f"[{host}]" if ":" in host else host


def banner(options: UpOptions, model: str, took_s: float) -> str:
    """What the user sees once everything serves."""
    url = options.http_url
    auth = ' -H "authorization: Bearer $HEADRACE_API_KEY"' if options.api_keys else ""
    body = f'{{"model":"{model}","messages":[{{"role":"user","content":"Hello"}}]}}'
    traces = options.otlp_endpoint or "off (--otlp-endpoint http://127.0.0.1:4318 sends them)"
    own = "" if options.data_dir == data_dir_of(None) else f" --data-dir {options.data_dir}"
    lines: list[tuple[str, str]] = [
        ("try", f"curl {url}/v1/chat/completions{auth} -H 'content-type: application/json' "
                f"-d '{body}'"),
        ("chat", f"headrace chat{own}"),
        ("status", f"headrace status{own}"),
        ("data", str(options.data_dir)),
        ("traces", traces),
        ("stop", "Ctrl-C"),
    ]  # fmt: skip
    text = "\n".join(f"  {name:<8}{value}" for name, value in lines)
    return f"\nHeadrace serves {model} at {url} (ready in {took_s:.1f} s)\n\n{text}\n"
