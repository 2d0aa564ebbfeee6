"""Streams beside long prompts: how evenly tokens come while prompts of 2,048 tokens keep arriving.

    python -m bench interleaving [--streams 32] [--long 2048] [--every 5] [--seconds 40] [-- FLAGS]

Starts a fleet of its own with `headrace up` (FLAGS are passed on), keeps `--streams` completions
running over HTTP, and measures the gaps between the tokens of each as a client sees them: first
without, then with a long prompt every `--every` seconds, whether the one before is answered or not.
A character that takes several tokens comes with the last of them: such gaps, which say nothing of
steps, are left out (one stream in 32 may write nothing else).
Prints the median and the 99th percentile of the gaps, and the long prompts' time to first token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.serving import completion, fleet

SETTLE_S = 3.0
LONG_AT_A_TIME = 8
"""Places beside the streams' for long prompts."""


@dataclass
class Seen:
    """(when, seconds since the stream's token before) and (when asked, seconds to first token)."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    long: list[tuple[float, float]] = field(default_factory=list)
    streaming: set[int] = field(default_factory=set)

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        return sorted(gap * 1000 for at, gap in self.gaps if begin <= at < end)


async def events(
    session: aiohttp.ClientSession, facts: dict[str, Any], prompt: list[int], out: int
) -> Any:
    """When each event of a completion arrives, and whether its characters take a token at most."""
    body = completion(facts, prompt, out)
    async with session.post(f"{facts['http_url']}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                yield time.perf_counter(), line.isascii()


async def keep_streaming(
    number: int, session: aiohttp.ClientSession, facts: dict[str, Any], seen: Seen,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    dice = random.Random(args.seed + number)
    while True:
        prompt = [dice.randrange(100, 5_000) for _ in range(args.prompt)]
        before = None
        async for now, plain in events(session, facts, prompt, args.out):
            if before is not None and plain:
                seen.gaps.append((now, now - before))
            before = now
            seen.streaming.add(number)


async def ask_long(
    session: aiohttp.ClientSession, facts: dict[str, Any], prompt: list[int], seen: Seen
) -> None:
    asked = time.perf_counter()
    async for now, _ in events(session, facts, prompt, 1):
        seen.long.append((asked, now - asked))
        return


def told(name: str, gaps: list[float]) -> str:
    p50, p99 = statistics.median(gaps), gaps[int(len(gaps) * 0.99)]
    return (
        f"{name}: {len(gaps)} gaps, ITL p50 {p50:6.1f} ms, p99 {p99:6.1f} ms, "
        f"p99/p50 {p99 / p50:.2f}, longest {gaps[-1]:.0f} ms"
    )


async def measure(facts: dict[str, Any], args: argparse.Namespace) -> None:
    seen, dice = Seen(), random.Random(args.seed)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout
    ) as session:
        tasks = [
            asyncio.create_task(keep_streaming(number, session, facts, seen, args))
            for number in range(args.streams)
        ]
        while len(seen.streaming) < args.streams:
            await asyncio.sleep(0.05)
        await asyncio.sleep(SETTLE_S)
        begin = time.perf_counter()
        await asyncio.sleep(args.quiet)
        middle = time.perf_counter()
        while time.perf_counter() < middle + args.seconds:
            prompt = [dice.randrange(100, 5_000) for _ in range(args.long)]
            tasks.append(asyncio.create_task(ask_long(session, facts, prompt, seen)))
            await asyncio.sleep(args.every)
        end = time.perf_counter()
        for task in tasks:
            if task.done():
                task.result()  # an error ends the measurement
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
    print(told("streams alone     ", seen.gaps_ms(begin, middle)))
    print(told("with long prompts ", seen.gaps_ms(middle, end)))
    waits = sorted(wait for _, wait in seen.long)
    print(
        f"{len(waits)} of {int(args.seconds / args.every)} prompts of {args.long} tokens answered: "
        f"TTFT median {statistics.median(waits):.2f} s, longest {waits[-1]:.2f} s"
        if waits
        else "no long prompt was answered"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--out", type=int, default=768, help="tokens until a stream starts anew")
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between long prompts")
    parser.add_argument("--quiet", type=float, default=8.0, help="seconds without long prompts")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=1)
    args, flags = parser.parse_known_args()
    jobs = ["--max-jobs", str(args.streams + LONG_AT_A_TIME)]
    with fleet([*jobs, *(flag for flag in flags if flag != "--")]) as facts:
        asyncio.run(measure(facts, args))


if __name__ == "__main__":
    main()
