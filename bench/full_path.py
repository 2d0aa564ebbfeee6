"""What the way through gateway, Redis and worker costs, beside the engine driven in this process.

    python -m bench full_path [--streams 32] [--prompt 128] [--out 128] [--rounds 3] [--cache]

Both serve the same requests, one after the other, in alternation: first the engine alone, called in
a loop by a thread as a worker's is; then a fleet of this machine over HTTP, which idles meanwhile.
Settings are the HEADRACE_ variables, for both. The client's own work is on this machine too, and
counts against the fleet: its CPU seconds are printed, and the gateway's, Redis' and the worker's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import threading
import time
from typing import Any

import aiohttp
import torch

from bench.serving import completion, cpu_s, fleet
from headrace.clock import SystemClock
from headrace.types import Band, Job, Sampling, pack_tokens
from headrace_worker import startup
from headrace_worker.allocator import keep_freed_memory
from headrace_worker.engine import Engine
from headrace_worker.engine_config import EngineConfig
from headrace_worker.settings import WorkerSettings

WARM_UP = 8
"""Streams, and tokens of each, before anything counts."""


class Bare:
    """An engine as a worker of these settings has it, without the worker."""

    def __init__(self, settings: WorkerSettings, streams: int) -> None:
        self._threads = startup.threads_each(settings, 1)
        torch.set_num_threads(1)
        loaded = startup.load(settings)
        config = EngineConfig(
            kv_tokens=startup.kv_tokens_for(settings, loaded),
            max_running=max(streams, settings.max_jobs),
            step_tokens_max=settings.step_tokens,
            step_stretch=settings.step_stretch,
            offer_blocks=False,
            speculation=settings.speculation == "ngram",
            kv_dtype=settings.kv_dtype,
        )
        self.precision = loaded.precision
        self._engine = Engine(loaded, config, SystemClock())
        self._jobs = 0

    def serve(self, prompts: list[list[int]], out: int) -> float:
        """Seconds until all of `prompts` have their `out` tokens."""
        took: list[float] = []
        thread = threading.Thread(target=lambda: took.append(self._serve(prompts, out)))
        thread.start()
        thread.join()
        return took[0]

    def _serve(self, prompts: list[list[int]], out: int) -> float:
        torch.set_num_threads(self._threads)
        began, tokens = time.perf_counter(), 0
        for prompt in prompts:
            self._jobs += 1
            self._engine.add(
                Job(
                    id=f"bare-{self._jobs}",
                    model=self._engine.record.name,
                    tenant="bench",
                    band=Band.STANDARD,
                    arrived_ms=self._jobs,
                    gateway="bench",
                    prompt=pack_tokens(prompt),
                    sampling=Sampling(max_tokens=out, temperature=0.0, ignore_eos=True),
                )
            )
        while self._engine.has_work:
            tokens += sum(len(delta.tokens) for delta in self._engine.step().deltas)
        assert tokens == out * len(prompts), "every token once"
        return time.perf_counter() - began


async def through_fleet(facts: dict[str, Any], prompts: list[list[int]], out: int) -> float:
    """Seconds until all of `prompts`, asked for at once, are answered."""

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> None:
        body = completion(facts, prompt, out)
        async with session.post(f"{facts['http_url']}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            last = b""
            async for chunk in answer.content.iter_any():
                last = (last + chunk)[-64:]
            assert b"data: [DONE]" in last, "a whole answer"

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(one(session, prompt) for prompt in prompts))
        return time.perf_counter() - began


def processes(facts: dict[str, Any]) -> dict[str, float]:
    """CPU seconds so far, by process; this one is the client."""
    return {"client": cpu_s(os.getpid())} | {n: cpu_s(p) for n, p in facts["processes"].items()}


def measure(facts: dict[str, Any], bare: Bare, args: argparse.Namespace) -> None:
    dice = random.Random(args.seed)
    tokens = args.streams * args.out

    def prompts_of(count: int) -> list[list[int]]:
        return [[dice.randrange(100, 5_000) for _ in range(args.prompt)] for _ in range(count)]

    few = prompts_of(WARM_UP)
    bare.serve(few, WARM_UP)
    asyncio.run(through_fleet(facts, few, WARM_UP))
    alone, whole = [], []
    for _ in range(args.rounds):
        prompts = prompts_of(args.streams)
        own = cpu_s(os.getpid())
        engine = tokens / bare.serve(prompts, args.out)
        own = cpu_s(os.getpid()) - own
        before = processes(facts)
        path = tokens / asyncio.run(through_fleet(facts, prompts, args.out))
        spent = {name: cpu - before[name] for name, cpu in processes(facts).items()}
        alone.append(engine)
        whole.append(path)
        cpu = ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items() if seconds)
        print(
            f"engine {engine:6.1f} tok/s (CPU s: {own:.2f}), full path {path:6.1f} tok/s "
            f"(CPU s: {cpu})",
            flush=True,
        )
    loss = 1 - statistics.median(whole) / statistics.median(alone)
    print(
        f"{args.streams} streams of {args.prompt}/{args.out}, {bare.precision}: engine "
        f"{statistics.median(alone):.1f} tok/s, full path {statistics.median(whole):.1f} tok/s, "
        f"which is {loss:.1%} less"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", action="store_true", help="with the cache service as well")
    args = parser.parse_args()
    keep_freed_memory()
    bare = Bare(WorkerSettings(), args.streams)
    with fleet([] if args.cache else ["--no-cache"]) as facts:
        measure(facts, bare, args)


if __name__ == "__main__":
    main()
