"""Two gateways, two tenants owed 4:1: is that what they get, whichever gateway they come to?

    python -m bench fairness [--weights 4:1] [--seconds 180] [--json fairness.json]

Real services and a real model. All of tenant A's traffic enters at gateway 0; B's enters at both,
three quarters of it at gateway 1, and has longer prompts and answers than A's, so that sharing
requests instead of tokens would show. Each tenant keeps so many requests under way that some of
them always wait (the least number that waited is printed; at 0 the tenant was not backlogged, and
owed nothing). Service is counted here as virtual token counters do: the prompt's tokens when the
first token comes (no two prompts share any, so none is cached), output tokens twice, as they come.
Printed are the ratio in each window and over all of the time after the warm-up, and how far it is
from what is owed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench._fleet import Fleet, settings_of
from bench._load import Ask, Client, parse_shape, run

NAMES = ("a", "b")
SAMPLE_S = 0.25
OUTPUT_WEIGHT = 2
WAIT_MS_MAX = 3_600_000
WAITING_BANDS = ("INTERACTIVE", "STANDARD", "BATCH")


@dataclass
class Served:
    """What one tenant got in windows of `window_s` after `from_s`, and how many requests wait."""

    from_s: float
    window_s: float
    service: list[float] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    waiting: int = 0
    waiting_least: list[int] = field(default_factory=list)
    complete: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, prompt: int, output: int) -> None:
        window = int((time.perf_counter() - self.from_s) // self.window_s)
        if window < 0:
            return
        while len(self.service) <= window:
            self.service.append(0.0)
            self.output.append(0)
        self.service[window] += prompt + OUTPUT_WEIGHT * output
        self.output[window] += output


async def one(client: Client, served: Served, ask: Ask) -> None:
    """A request, counted as its tokens come."""
    counted = 0

    def watch(pieces: int) -> None:
        nonlocal counted
        if not counted:
            served.waiting -= 1
            served.add(ask.prompt, 0)
        counted += pieces
        served.add(0, pieces)

    served.waiting += 1
    answer = await client.send(ask, watch)
    if not counted:
        served.waiting -= 1
    if answer.complete:
        served.add(0, answer.tokens - counted)  # a piece is not always one token
        served.complete += 1
    else:
        served.failed[answer.how or str(answer.status)] += 1
    if not answer.admitted:
        await asyncio.sleep(max(0.25, answer.retry_after_ms / 1000))


async def backlog(
    client: Client, served: Served, draw: Callable[[], Ask], streams: int
) -> list[asyncio.Task[None]]:
    """`streams` clients, each with a request under way until it is cancelled."""

    async def forever() -> None:
        while True:
            await one(client, served, draw())

    return [asyncio.create_task(forever()) for _ in range(streams)]


def drawer(args: argparse.Namespace, tenant: int, dice: random.Random) -> Callable[[], Ask]:
    prompt, output = (args.shape_a, args.shape_b)[tenant]

    def draw() -> Ask:
        gateway = int(tenant == 1 and dice.random() < args.skew)
        # lengths vary by half, so that the two do not fall into step
        return Ask(
            max(1, round(prompt * dice.uniform(0.5, 1.5))),
            max(1, round(output * dice.uniform(0.5, 1.5))),
            args.band,
            f"bench-key-{NAMES[tenant]}",
            gateway,
        )

    return draw


async def experiment(fleet: Fleet, args: argparse.Namespace) -> list[Served]:
    from_s = time.perf_counter() + args.warm_up
    tenants = [Served(from_s, args.window) for _ in NAMES]
    async with Client(fleet.urls, fleet.model, args.seed) as client:
        tasks: list[asyncio.Task[None]] = []
        for number, served in enumerate(tenants):
            draw = drawer(args, number, random.Random(args.seed + number))
            tasks += await backlog(client, served, draw, args.streams)
        await asyncio.sleep(args.warm_up)
        while time.perf_counter() < from_s + args.seconds:
            for served in tenants:
                served.waiting_least.append(served.waiting)
            await asyncio.sleep(SAMPLE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tenants


def figures(tenants: list[Served], owed: float, seconds: float, window_s: float) -> dict[str, Any]:
    windows = int(seconds // window_s)
    rows = []
    for window in range(windows):
        a, b = (t.service[window] if window < len(t.service) else 0.0 for t in tenants)
        rows.append({"a": a, "b": b, "ratio": a / b if b else float("inf")})
    a, b = (sum(t.service[:windows]) for t in tenants)
    ratio = a / b if b else float("inf")
    return {
        "owed": owed,
        "ratio": ratio,
        "deviation": ratio / owed - 1,
        "windows": rows,
        "output_tokens": [sum(t.output[:windows]) for t in tenants],
        "waiting_least": [min(t.waiting_least, default=0) for t in tenants],
        "complete": [t.complete for t in tenants],
        "failed": [dict(t.failed) for t in tenants],
    }


def show(facts: dict[str, Any], window_s: float, cpus: dict[str, float]) -> None:
    print(f"{'from s':>7}{'service a':>12}{'service b':>12}{'ratio':>8}")
    for number, row in enumerate(facts["windows"]):
        at_s = number * window_s
        print(f"{at_s:>7.0f}{row['a']:>12.0f}{row['b']:>12.0f}{row['ratio']:>8.2f}")
    for number, name in enumerate(NAMES):
        print(
            f"tenant {name}: {facts['output_tokens'][number]} output tokens, "
            f"{facts['complete'][number]} requests complete, not so {facts['failed'][number]}; "
            f"at least {facts['waiting_least'][number]} waited at any time"
        )
    print(
        f"in all {facts['ratio']:.3f}:1 where {facts['owed']:.3f}:1 is owed: "
        f"{facts['deviation']:+.1%}"
    )
    print("CPU s: " + ", ".join(f"{name} {used:.1f}" for name, used in cpus.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--max-jobs", type=int, default=8, help="of each worker")
    parser.add_argument("--weights", default="4:1", metavar="A:B")
    parser.add_argument("--skew", type=float, default=0.75, help="B's part at gateway 1")
    parser.add_argument("--shape-a", type=parse_shape, default=(48, 32), metavar="PROMPT:OUTPUT")
    parser.add_argument("--shape-b", type=parse_shape, default=(96, 64), metavar="PROMPT:OUTPUT")
    parser.add_argument("--streams", type=int, default=48, help="requests of each tenant at a time")
    parser.add_argument("--band", type=int, default=1, help="0 interactive, 1 standard, 2 batch")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--warm-up", type=float, default=20.0)
    parser.add_argument("--window", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="HEADRACE_X=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    a, _, b = args.weights.partition(":")
    keys = f"bench-key-a:a weight={a},bench-key-b:b weight={b}"
    env = {
        "HEADRACE_API_KEYS": keys,
        "HEADRACE_MAX_JOBS": str(args.max_jobs),
        # what is measured is who is served of those that wait, not who may wait
        **{f"HEADRACE_WAIT_{band}_MS_MAX": str(WAIT_MS_MAX) for band in WAITING_BANDS},
    }
    fleet = Fleet(
        args.workers,
        gateways=2,
        model=args.model,
        threads=args.threads,
        env=env | settings_of(args.set),
    )
    with fleet:
        before = fleet.cpu()
        tenants = run(experiment(fleet, args))
        cpus = {name: now - before[name] for name, now in fleet.cpu().items()}
    facts = figures(tenants, float(a) / float(b), args.seconds, args.window)
    show(facts, args.window, cpus)
    if args.json:
        arguments = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": arguments} | facts, indent=2))


if __name__ == "__main__":
    main()
