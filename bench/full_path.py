"""What the way through gateway, Redis and worker costs, beside the engine driven in this process.

    python -m bench full_path [--streams 32] [--prompt 128] [--out 64] [--pairs 8] [--cache]

Both serve the same requests, one right after the other: the engine alone, called in a loop by a
thread as a worker's is, and a fleet of this machine over HTTP, which idles meanwhile. What a shared
machine gives changes from minute to minute by more than the path takes, so runs are short, who is
first changes from pair to pair, and what is told is the median of what each pair says, with how far
the pairs lie apart.
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
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens a second of the engine alone and through the fleet, right after each other."""

    engine: float
    path: float

    @property
    def loss(self) -> float:
        """The part of the engine's rate that the path takes; below 0 where it had more."""
        return 1 - self.path / self.engine


def measure(facts: dict[str, Any], bare: Bare, args: argparse.Namespace) -> None:
    dice = random.Random(args.seed)

    def prompts_of(count: int) -> list[list[int]]:
        return [[dice.randrange(100, 5_000) for _ in range(args.prompt)] for _ in range(count)]

    few = prompts_of(WARM_UP)
    bare.serve(few, WARM_UP)
    asyncio.run(through_fleet(facts, few, WARM_UP))
    pairs = [
        run_pair(facts, bare, prompts_of(args.streams), args.out, engine_first=number % 2 == 0)
        for number in range(args.pairs)
    ]
    report(pairs, args, bare.precision)


def run_pair(
    facts: dict[str, Any], bare: Bare, prompts: list[list[int]], out: int, *, engine_first: bool
) -> Pair:
    """Both serve `prompts`; who is first changes from pair to pair."""
    rates: dict[str, float] = {}
    spent: dict[str, float] = {}
    for side in ("engine", "path") if engine_first else ("path", "engine"):
        before = processes(facts)
        if side == "engine":
            took_s = bare.serve(prompts, out)
        else:
            took_s = asyncio.run(through_fleet(facts, prompts, out))
            spent = {name: cpu - before[name] for name, cpu in processes(facts).items()}
        rates[side] = out * len(prompts) / took_s
    pair = Pair(**rates)
    cpu = ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items() if seconds)
    print(
        f"{'engine first' if engine_first else 'path first  '}: engine {pair.engine:6.1f} tok/s, "
        f"full path {pair.path:6.1f} tok/s, {pair.loss:6.1%} less (CPU s: {cpu})",
        flush=True,
    )
    return pair


def report(pairs: Sequence[Pair], args: argparse.Namespace, precision: str) -> None:
    losses = sorted(pair.loss for pair in pairs)
    low, middle, high = statistics.quantiles(losses, n=4)
    engine = statistics.median(pair.engine for pair in pairs)
    path = statistics.median(pair.path for pair in pairs)
    print(
        f"{args.streams} streams of {args.prompt}/{args.out}, {precision}, {len(pairs)} pairs: "
        f"engine {engine:.1f} tok/s, full path {path:.1f} tok/s; of a pair the path has "
        f"{middle:.1%} less (median; half of them {low:.1%} to {high:.1%}, all {losses[0]:.1%} to "
        f"{losses[-1]:.1%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8, help="at least 2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", action="store_true", help="with the cache service as well")
    args = parser.parse_args()
    keep_freed_memory()
    bare = Bare(WorkerSettings(), args.streams)
    with fleet([] if args.cache else ["--no-cache"]) as facts:
        measure(facts, bare, args)


if __name__ == "__main__":
    main()
