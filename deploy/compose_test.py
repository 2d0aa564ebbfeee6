"""The containers for real: build them, bring them up with two workers, ask, look at the trace.

    python deploy/compose_test.py [--keep]

Passes when a request that is streamed over the WebSocket is answered and its trace crosses gateway,
worker and cache service in one tree. Where no engine answers, the variable PROVISION names a script
that brings one. Where Jaeger's image cannot be pulled, deploy/otlp_receiver.py stands in for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "headrace-compose-test"
JAEGER = "jaegertracing/jaeger:2.20.0"
SERVICES = {"gateway", "worker", "cache-service"}
WORKERS = 2
PULL_S = 300
READY_S = 180.0
ANSWER_S = 120.0
TRACE_S = 30.0
PROMPT = "Tell me in a few plain sentences how water drives the wheel of an old mill, and why. "


def say(text: str) -> None:
    print(f"compose-test: {text}", flush=True)


def fail(text: str) -> SystemExit:
    return SystemExit(f"compose-test: FAILED: {text}")


def succeeds(*command: str, timeout_s: float = 60) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def ensure_engine() -> None:
    if succeeds("docker", "version"):
        return
    script = os.environ.get("PROVISION")
    if not script:
        raise fail("no Docker engine answers (PROVISION may name a script that brings one)")
    say(f"no Docker engine answers: running {script}")
    subprocess.run(shlex.split(script), check=True)
    if not succeeds("docker", "version"):
        raise fail(f"no Docker engine answers after {script}")


def compose_command() -> list[str]:
    if succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise fail("neither `docker compose` nor `docker-compose` is here")


def have_jaeger(image: str) -> bool:
    if succeeds("docker", "image", "inspect", image):
        return True
    say(f"pulling {image}")
    return succeeds("docker", "pull", image, timeout_s=PULL_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """The containers of one test, on ports of their own."""

    def __init__(self) -> None:
        self.http_port, self.query_port = free_port(), free_port()
        files = ["-f", "compose.yaml"]
        image = os.environ.get("HEADRACE_JAEGER_IMAGE", JAEGER)
        if not have_jaeger(image):
            say(f"{image} cannot be pulled: our own receiver stands in for it")
            files += ["-f", "deploy/compose-test.yaml"]
        self._command = [*compose_command(), *files, "--project-name", PROJECT]
        self._env = os.environ | {
            "HEADRACE_PORT": str(self.http_port),
            "HEADRACE_JAEGER_PORT": str(self.query_port),
            # what the machine has is shared by all of them
            "HEADRACE_KV_TOKENS": os.environ.get("HEADRACE_KV_TOKENS", "16384"),
            "HEADRACE_THREADS": os.environ.get("HEADRACE_THREADS", "1"),
        }

    def run(self, *arguments: str, check: bool = True) -> None:
        command = [*self._command, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise fail(f"`{shlex.join(command)}` ended with exit code {done.returncode}")

    def output(self, *arguments: str) -> str:
        """What a command prints; '' when it fails."""
        command = [*self._command, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, capture_output=True
        )
        return done.stdout.decode() if done.returncode == 0 else ""

    def python(self, service: str, *arguments: str) -> str:
        return self.output("exec", "-T", service, "python", *arguments)


def check_images(stack: Stack) -> None:
    """torch is for workers, and nothing runs as root."""
    code = "import importlib.util as u, os; print(u.find_spec('torch') is not None, os.getuid())"
    expected = {"gateway": "False", "cache-service": "False", "worker": "True"}
    for service, has_torch in expected.items():
        answer = stack.python(service, "-c", code).split()
        if len(answer) != 2 or answer[0] != has_torch or answer[1] == "0":
            raise fail(f"{service}: torch and user id are {answer}, torch should be {has_torch}")


def until_workers(stack: Stack) -> None:
    """All workers serve, as `headrace status` tells it from inside."""
    deadline = time.monotonic() + READY_S
    states: list[str] = []
    while time.monotonic() < deadline:
        answer = stack.python("gateway", "-m", "headrace.cli.main", "status", "--json")
        states = [w["state"] for w in json.loads(answer or '{"workers": []}')["workers"]]
        if states.count("ready") == WORKERS:
            say(f"{WORKERS} workers are ready")
            return
        time.sleep(0.5)
    raise fail(f"not {WORKERS} workers ready, but {states}")


async def until_ready(session: aiohttp.ClientSession, url: str) -> None:
    deadline = time.monotonic() + READY_S
    answer = "nothing"
    while time.monotonic() < deadline:
        try:
            async with session.get(f"{url}/ready") as response:
                if response.status == 200:
                    return
                answer = f"{response.status} {await response.text()}"
        except (aiohttp.ClientError, TimeoutError) as error:
            answer = repr(error)
        await asyncio.sleep(0.5)
    raise fail(f"{url}/ready: {answer}")


async def ask(session: aiohttp.ClientSession, url: str) -> tuple[str, list[str]]:
    """One streamed answer over the WebSocket: its text and the types of its events."""
    frame = {
        "type": "response.create",
        "model": os.environ.get("HEADRACE_MODEL", "smollm2"),
        "input": PROMPT * 4,
        "max_output_tokens": 48,
        "temperature": 0,
    }
    text, kinds = "", []
    async with asyncio.timeout(ANSWER_S), session.ws_connect(f"{url}/v1/responses") as ws:
        await ws.send_json(frame)
        async for message in ws:
            event = json.loads(message.data)
            kinds.append(event["type"])
            if event["type"] == "response.output_text.delta":
                text += event["delta"]
            if event["type"] in ("response.completed", "response.incomplete"):
                return text, kinds
            if event["type"] in ("error", "response.failed"):
                raise fail(f"the request failed: {message.data}")
    raise fail(f"the connection was closed after {kinds}")


def services_of(trace: dict[str, Any]) -> set[str]:
    return {process["serviceName"] for process in trace["processes"].values()}


def tree_problem(trace: dict[str, Any]) -> str:
    """Why the spans are not one tree, or ''."""
    ids = {span["spanID"] for span in trace["spans"]}
    parents = [
        [r["spanID"] for r in span.get("references", []) if r["refType"] == "CHILD_OF"]
        for span in trace["spans"]
    ]
    roots = sum(1 for found in parents if not found)
    lost = sum(1 for found in parents for parent in found if parent not in ids)
    return "" if roots == 1 and not lost else f"{roots} roots, {lost} spans without their parent"


async def crossing_trace(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """A whole trace that all services have spans in, waited for: spans are sent in batches."""
    deadline = time.monotonic() + TRACE_S
    seen = "no trace"
    while time.monotonic() < deadline:
        async with session.get(f"{url}/api/traces", params={"service": "worker"}) as response:
            traces = (await response.json())["data"]
        for trace in traces:
            problem = tree_problem(trace)
            seen = f"a trace over {sorted(services_of(trace))}: {problem or 'one tree'}"
            if services_of(trace) >= SERVICES and not problem:
                return trace
        await asyncio.sleep(0.5)
    raise fail(f"no trace crosses {sorted(SERVICES)}: {seen}")


async def check(stack: Stack) -> None:
    url, query_url = (f"http://127.0.0.1:{p}" for p in (stack.http_port, stack.query_port))
    async with aiohttp.ClientSession() as session:
        began = time.monotonic()
        await until_ready(session, url)
        say(f"ready after {time.monotonic() - began:.1f} s")
        text, kinds = await ask(session, url)
        deltas = kinds.count("response.output_text.delta")
        if deltas < 2 or not text.strip():
            raise fail(f"not a streamed answer: {kinds}")
        say(f"streamed answer in {deltas} deltas: {text.strip()[:80]!r}")
        trace = await crossing_trace(session, query_url)
        say(
            f"one trace of {len(trace['spans'])} spans over {', '.join(sorted(services_of(trace)))}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    keep = parser.parse_args().keep
    ensure_engine()
    stack = Stack()
    try:
        stack.run("build")
        stack.run("up", "--detach", "--scale", f"worker={WORKERS}")
        check_images(stack)
        until_workers(stack)
        asyncio.run(check(stack))
    except BaseException:
        stack.run("logs", "--tail=40", check=False)
        raise
    finally:
        if not keep:
            stack.run("down", "--volumes", "--timeout", "5", check=False)
    say("passed")


if __name__ == "__main__":
    sys.exit(main())
