"""Serving on this machine: TTFT, tokens/s, Redis commands per token, gateway CPU per 1,000 tokens.

Starts a fleet of its own with `headrace up` (its flags can be passed on after `--`), streams
completions over HTTP at each concurrency, and prints one line for each. A first pass warms up and
does not count. Prompts are random token ids, so nothing is shared unless `--shared` says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from redis.asyncio import Redis

from headrace.streams import connect

START_S_MAX = 120


@dataclass(frozen=True)
class Stream:
    """One finished request: seconds to the first token, seconds in all, tokens."""

    first_s: float
    total_s: float
    tokens: int


@contextmanager
def fleet(flags: list[str]) -> Iterator[dict[str, Any]]:
    """A running `headrace up`; yields what it wrote about itself."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "headrace.cli.main",
                "up",
                "--port",
                "0",
                "--data-dir",
                folder,
                *flags,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield wait_for(Path(folder) / "run.json", process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)


def wait_for(run_file: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline and process.poll() is None:
        if run_file.exists():
            facts: dict[str, Any] = json.loads(run_file.read_text())
            if asyncio.run(is_ready(facts["http_url"])):
                return facts
        time.sleep(0.2)
    raise SystemExit("headrace up did not become ready")


async def is_ready(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/ready") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


def completion(facts: dict[str, Any], prompt: list[int], out: int) -> dict[str, Any]:
    """A request for `out` tokens behind `prompt`, greedy and streamed."""
    return {
        "model": facts["model"],
        "prompt": prompt,
        "max_tokens": out,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def one(
    session: aiohttp.ClientSession, facts: dict[str, Any], prompt: list[int], out: int
) -> Stream:
    usage = {"stream_options": {"include_usage": True}}
    body = completion(facts, prompt, out) | usage
    began = time.perf_counter()
    first_s, tokens = 0.0, 0
    async with session.post(f"{facts['http_url']}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter() - began
                if b'"usage":{' in line or b'"usage": {' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return Stream(first_s, time.perf_counter() - began, tokens)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def commands(redis: Redis) -> int:
    return int((await redis.info("stats"))["total_commands_processed"])


async def round_of(facts: dict[str, Any], args: argparse.Namespace, streams: int) -> str:
    dice = random.Random(args.seed + streams)
    shared = [dice.randrange(100, 5_000) for _ in range(args.shared)]
    prompts = [
        shared + [dice.randrange(100, 5_000) for _ in range(args.prompt)]
        for _ in range(max(streams, args.requests))
    ]
    gateway = facts["processes"]["gateway"]
    redis = connect(facts["redis_url"])
    slots = asyncio.Semaphore(streams)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def run(prompt: list[int]) -> Stream:
                async with slots:
                    return await one(session, facts, prompt, args.out)

            cpu_before, commands_before = cpu_s(gateway), await commands(redis)
            began = time.perf_counter()
            done = await asyncio.gather(*(run(prompt) for prompt in prompts))
            took_s = time.perf_counter() - began
            tokens = sum(stream.tokens for stream in done)
            cpu = (cpu_s(gateway) - cpu_before) / tokens * 1000
            per_token = (await commands(redis) - commands_before) / tokens
    finally:
        await redis.aclose()
    gaps = [(s.total_s - s.first_s) / max(1, s.tokens - 1) * 1000 for s in done]
    return (
        f"{streams:>3} streams: {tokens / took_s:7.1f} tok/s, "
        f"TTFT median {statistics.median(s.first_s for s in done) * 1000:6.0f} ms, "
        f"ITL mean {statistics.mean(gaps):5.1f} ms, "
        f"{per_token:5.2f} redis commands/token, gateway {cpu:5.2f} CPU s/1,000 tokens"
    )


async def measure(facts: dict[str, Any], args: argparse.Namespace) -> None:
    await round_of(facts, args, 2)
    for streams in args.streams:
        print(await round_of(facts, args, streams), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="at least this many a round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of their own")
    parser.add_argument("--shared", type=int, default=0, help="tokens shared by all prompts")
    parser.add_argument("--out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    args, flags = parser.parse_known_args()
    with fleet([flag for flag in flags if flag != "--"]) as facts:
        asyncio.run(measure(facts, args))


if __name__ == "__main__":
    main()
