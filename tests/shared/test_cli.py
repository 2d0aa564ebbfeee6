"""The command line: what it tells, what it hands to the services, how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from headrace import keys, wire, wire_reports
from headrace.cli import main, stack, up
from headrace.cli.common import RunFile, parse_size
from headrace.errors import SettingsError
from headrace.types import (
    Board,
    WorkerRecord,
    WorkerRole,
    WorkerState,
    WorkerStatus,
)
from support import fleet
from support.valkey import Valkey

MODEL = "tiny"
RECORD = replace(fleet.MODEL, name=MODEL)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's own HEADRACE_ variables are not part of these stories."""
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        if name != "HEADRACE_CACHE_DIR":
            monkeypatch.delenv(name)


def worker_record(worker_id: str, pid: int, kernels: str = "avx2") -> bytes:
    sizes = (4_096, 8, 17)
    return wire.encode_worker(
        WorkerRecord(
            worker_id, MODEL, WorkerRole.BOTH, "here", pid, *sizes, kernels, precision="bfloat16"
        )
    )


async def put_fleet(redis: Redis) -> None:
    """One worker that serves, one that is gone, a gateway, a leader and its board."""
    await redis.hset(keys.MODELS, MODEL, "f")
    await redis.set(keys.record(MODEL), wire.encode_model(RECORD))
    await redis.hset(keys.workers(MODEL), "w0-1", worker_record("w0-1", 101))
    await redis.hset(keys.workers(MODEL), "w1-1", worker_record("w1-1", 102, "no compiler"))
    status = wire_reports.encode_status(WorkerStatus(WorkerState.READY, 2, 1, 3_000, 77))
    await redis.set(keys.status(MODEL, "w0-1"), status, px=60_000)
    await redis.set(keys.lease(MODEL, "w0-1"), b"1", px=60_000)
    await redis.hset(keys.load(MODEL, "w0-1"), mapping={"tokens": 1_096, "jobs": 3})
    gateway = {"id": "gw-1", "pid": 103, "host": "127.0.0.1", "port": 8000, "started": 18}
    await redis.set(keys.gateway("gw-1"), wire.pack(gateway), px=60_000)
    await redis.set(keys.leader(MODEL), b"gw-1", px=60_000)
    board = Board("gw-1", 1_000, (1, 2, 3), (1, 2, 597), (0, 5, 9), 4_096, 1_096, 1, 12.5, 0.0)
    await redis.set(keys.board(MODEL), wire_reports.encode_board(board), px=60_000)


def headrace(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that runs as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


# --- status


async def test_status_as_json_tells_who_serves_and_who_waits(valkey: Valkey, redis: Redis) -> None:
    """Every fact that a script needs to see and kill what it means, from Redis alone."""
    await put_fleet(redis)
    code, out, err = headrace("status", "--json", "--redis-url", valkey.url)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    (model,) = facts["models"]
    assert model["leader"] == "gw-1"
    assert model["queue"] == {"interactive": 1, "standard": 2, "batch": 3}
    assert (model["reserved_tokens"], model["capacity_tokens"]) == (1_096, 4_096)
    ready, gone = facts["workers"]
    assert {key: ready[key] for key in ("id", "pid", "role", "state", "running", "waiting")} == {
        "id": "w0-1", "pid": 101, "role": "both", "state": "ready", "running": 2, "waiting": 1,
    }  # fmt: skip
    assert (ready["free_kv_tokens"], ready["reserved_tokens"], ready["reserved_jobs"]) == (
        3_000,
        1_096,
        3,
    )
    assert (gone["id"], gone["state"]) == ("w1-1", "gone")
    (gateway,) = facts["gateways"]
    assert (gateway["pid"], gateway["port"]) == (103, 8000)
    assert facts["problems"] == [] and facts["supervisor"] is None


async def test_status_for_people_and_with_unreadable_records(valkey: Valkey, redis: Redis) -> None:
    """What is broken is what status is looked at for: a bad record is named, the rest is shown."""
    await put_fleet(redis)
    await redis.hset(keys.workers(MODEL), "w2-1", b"\xc1")
    await redis.set(keys.gateway("gw-2"), b"not msgpack")
    code, out, _ = headrace("status", "--redis-url", valkey.url)
    assert code == 0
    for expected in ("tiny", "w0-1", "ready", "3000/4096", "gw-1", "127.0.0.1:8000"):
        assert expected in out
    assert "w1-1 computes without native kernels: no compiler" in out
    assert "w0-1 computes" not in out
    assert "w0-1: weights and KV in bfloat16" in out
    assert "worker w2-1 of tiny" in out and "headrace:gateway:gw-2" in out


def test_status_finds_the_fleet_of_the_data_directory(tmp_path: Path, valkey: Valkey) -> None:
    """`up` leaves its addresses there; a file of a fleet that was killed does not count."""
    facts = RunFile(os.getpid(), valkey.url, "http://127.0.0.1:1", "m", 0, {"gateway": 7})
    facts.write(tmp_path)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600
    code, out, _ = headrace("status", "--json", "--data-dir", str(tmp_path))
    assert code == 0
    assert json.loads(out)["supervisor"] == {"pid": os.getpid(), "processes": {"gateway": 7}}
    dead = subprocess.Popen(["true"])
    dead.wait()
    RunFile(dead.pid, valkey.url, "http://127.0.0.1:1", "m", 0).write(tmp_path)
    code, out, err = headrace("status", "--json", "--data-dir", str(tmp_path))
    assert (code, out) == (1, "")
    assert err == (
        f"headrace: nothing runs on {tmp_path}: start `headrace up`, "
        "or name a server with --redis-url\n"
    )


def test_status_without_redis_is_one_line() -> None:
    code, out, err = headrace("status", "--redis-url", "redis://127.0.0.1:9/0")
    assert (code, out) == (1, "")
    assert err.startswith("headrace: Redis does not answer: ") and err.count("\n") == 1


# --- up: flags and variables


def options_of(
    monkeypatch: pytest.MonkeyPatch, *flags: str, env: dict[str, str] | None = None
) -> stack.UpOptions:
    """What `headrace up FLAGS` would start."""
    seen: list[stack.UpOptions] = []
    monkeypatch.setattr(stack, "run", seen.append)
    result = CliRunner().invoke(main.app, ["up", *flags], env=env or {})
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_flag_has_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same fleet from flags and from HEADRACE_ variables."""
    values = {
        "host": "0.0.0.0", "port": "9000", "workers": "3", "roles": "1:2", "model": "/m/x.gguf",
        "model-name": "mine", "dtype": "bfloat16", "quantization": "int4", "kv-dtype": "int8",
        "speculation": "off", "context-tokens": "4096",
        "tensor-parallel": "2", "pipeline-parallel": "3",
        "threads": "4", "data-dir": str(tmp_path), "redis-url": "redis://r:6379/1",
        "api-keys": "a,b", "otlp-endpoint": "http://o:4318", "kv-tokens": "8192",
        "max-jobs": "7", "cache-bytes": "2M",
        "cache-disk-path": str(tmp_path / "kv"), "cache-disk-bytes": "3G",
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    env = {f"HEADRACE_{name.upper().replace('-', '_')}": value for name, value in values.items()}
    by_flags = options_of(monkeypatch, *flags, "--no-cache")
    by_env = options_of(monkeypatch, env=env | {"HEADRACE_NO_CACHE": "1"})
    assert by_flags == by_env
    assert by_flags == stack.UpOptions(
        host="0.0.0.0", port=9000, workers=3, roles=(1, 2), model="/m/x.gguf", model_name="mine",
        dtype="bfloat16", quantization="int4", kv_dtype="int8", threads=4,
        tensor_parallel=2, pipeline_parallel=3,
        speculation="off", context_tokens=4096,
        data_dir=tmp_path.resolve(), redis_url="redis://r:6379/1", api_keys="a,b",
        otlp_endpoint="http://o:4318", kv_tokens=8192, max_jobs=7,
        cache_bytes=2 << 20, cache_disk_path=tmp_path / "kv", cache_disk_bytes=3 << 30,
        no_cache=True,
    )  # fmt: skip


def test_defaults_are_the_ones_that_the_readme_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(monkeypatch)
    assert (options.host, options.port, options.workers) == ("127.0.0.1", 8000, 1)
    assert options.served_name == "smollm2"
    assert options.http_url == "http://127.0.0.1:8000"


async def test_services_get_what_concerns_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Keys go to the gateway alone, workers share the cores, nobody shares a metrics port."""
    monkeypatch.setenv("HEADRACE_METRICS_PORT", "9100")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    flags = ("--workers", "2", "--api-keys", "secret", "--data-dir", str(tmp_path))
    flags += ("--quantization", "int8", "--kv-dtype", "int8", "--context-tokens", "99")
    flags += ("--speculation", "off", "--tensor-parallel", "2")
    options = options_of(monkeypatch, *flags, "--redis-url", "redis://r:6379/0")
    fleet = stack.Fleet(options, "smollm2", options.redis_url, tmp_path)
    env = {service.name: service.launch().env for service in fleet.services()}
    assert list(env) == ["cache", "worker-0", "worker-1", "gateway"]
    assert [env[name]["HEADRACE_API_KEYS"] for name in env] == ["", "", "", "secret"]
    assert env["worker-1"]["HEADRACE_THREADS"] == env["worker-1"]["OMP_NUM_THREADS"] == "4"
    ports = [env[name]["HEADRACE_METRICS_PORT"] for name in ("cache", "worker-0", "worker-1")]
    assert ports == ["9100", "9101", "9102"]
    assert env["worker-0"]["HEADRACE_CACHE_URL"] == env["cache"]["HEADRACE_CACHE_LISTEN"]
    assert env["gateway"]["HEADRACE_CACHE_URL"] == env["cache"]["HEADRACE_CACHE_LISTEN"]
    assert env["worker-0"]["HEADRACE_WORKER_ID"].startswith("w0-")
    names = ("QUANTIZATION", "KV_DTYPE", "CONTEXT_TOKENS", "SPECULATION", "TENSOR_PARALLEL")
    worker = env["worker-0"]
    assert [worker[f"HEADRACE_{name}"] for name in names] == ["int8", "int8", "99", "off", "2"]
    assert "HEADRACE_KV_TOKENS" not in env["worker-0"], "left to the worker"
    assert "HEADRACE_ROLE" not in env["worker-0"], "each does both"
    await fleet.redis.aclose()


def test_a_split_of_roles_makes_as_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--roles 1:2` needs no count; workers that it does not speak of do both."""
    options = options_of(monkeypatch, "--roles", "1:2")
    assert (options.workers, options.roles) == (3, (1, 2))
    more = options_of(monkeypatch, "--roles", "1:2", "--workers", "4")
    roles = [stack.worker_env(more, "m", n).get("HEADRACE_ROLE") for n in range(4)]
    assert roles == ["prefill", "decode", "decode", None]
    result = CliRunner().invoke(main.app, ["up", "--roles", "1"])
    assert result.exit_code == 1 and "write it like 1:1" in result.output


def test_the_banner_tells_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A curl line that works as it stands, also with keys, and without showing one."""
    flags = ("--host", "0.0.0.0", "--api-keys", "secret", "--data-dir", str(tmp_path))
    text = stack.banner(options_of(monkeypatch, *flags), "smollm2", 3.21)
    assert "http://127.0.0.1:8000/v1/chat/completions" in text
    assert '-H "authorization: Bearer $HEADRACE_API_KEY"' in text and "secret" not in text
    assert "Ctrl-C" in text and "ready in 3.2 s" in text


# --- failing


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("up", "--port", "99999"), 2, "65535"),
        (("up", "--no-such-flag"), 2, "No such option"),
        (("up", "--cache-bytes", "lots"), 1, "headrace: 'lots' is not a size"),
        (("up", "--cache-disk-bytes", "lots"), 1, "headrace: 'lots' is not a size"),
        (("up", "--model", "nosuch"), 1, "headrace: no model 'nosuch': known aliases"),
        (("pull", "nosuch"), 1, "headrace: no model 'nosuch': known aliases"),
        (("up", "--model-name", "a b"), 1, "headrace: model name 'a b' is not valid"),
        (("up", "--redis-url", "redis://:pw@127.0.0.1:9/0"), 1, "no Redis answers at redis://127"),
        (("up", "--redis-url", "http://x"), 1, "headrace: --redis-url: "),
        (("chat", "--url", "http://127.0.0.1:9", "hi"), 1, "headrace: nothing serves at http"),
        (("chat",), 1, "headrace: no prompt: give one as an argument, or on stdin"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    """Exit 2 for usage, 1 for the rest; never a traceback, never a password."""
    if arguments[0] == "up":
        arguments += ("--data-dir", str(tmp_path))
        arguments += () if "--port" in arguments else ("--port", "0")
    result = headrace(*arguments)
    assert (result[0], result[1]) == (code, ""), result
    assert message in result[2] and "Traceback" not in result[2] and ":pw@" not in result[2]
    if code == 1:
        assert result[2].count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("4k", 4096), ("256M", 256 << 20), ("2 GiB", 2 << 30)]
)
def test_sizes_are_written_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(SettingsError):
        parse_size(f"-{text}")


def test_help_is_instant() -> None:
    """Importing the commands loads nothing that takes long; each loads its own when it runs."""
    heavy = {"torch", "redis", "aiohttp", "numpy", "opentelemetry", "huggingface_hub", "pydantic"}
    code = f"import sys, headrace.cli.main; print(*(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert up.up.__doc__ is not None
