"""Prefill and decode on workers of their own, or both on each: the same load on the same cores.

Short prompts with long outputs and long prompts with short outputs arrive at a steady rate, at the
same instants for each way. Printed: the gaps between the tokens that the streams see, the first
tokens, and all tokens a second, of prompts and output, from the first request to the end of the
last. A first pass warms up and does not count. `--ways` names them: `both` and `P:D`, as many
workers each.
`--transfer` measures instead how long the KV of a long prompt is on its way, all of it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench._fleet import Fleet, settings_of
from bench._load import Answer, Ask, Client, Lag, open_loop, parse_shape, percentile, run
from headrace import keys
from headrace.cli.common import parse_roles
from headrace.streams import connect, parse_entries
from headrace.types import JobMoved
from headrace.wire_reports import decode_event


@dataclass
class Seen:
    """What one way gave: gaps in ms, answers by kind, seconds."""

    gaps_ms: list[float] = field(default_factory=list)
    streams: list[Answer] = field(default_factory=list)
    prompts: list[Answer] = field(default_factory=list)
    took_s: float = 0.0
    moved: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        done = [each for each in (*self.streams, *self.prompts) if each.complete]
        return sum(each.ask.prompt + each.tokens for each in done)


def steady(rate: float, duration_s: float, dice: random.Random) -> list[float]:
    """One arrival in each turn of 1 / `rate` seconds, anywhere in the middle half of it.

    Poisson's bunches would measure how long a queue gets at so few arrivals, for each way another.
    """
    count = int(rate * duration_s)
    return [(number + dice.uniform(0.25, 0.75)) / rate for number in range(count)]


async def load(
    url: str, model: str, args: argparse.Namespace, duration_s: float, seed: int
) -> Seen:
    """Both kinds of requests for `duration_s`; returns when the last has ended."""
    seen, dice, lag = Seen(), random.Random(seed), Lag()
    stream, prompt = parse_shape(args.stream), parse_shape(args.long)
    spread = stream[1] // 2
    streams = [
        (at_s, Ask(stream[0], stream[1] + dice.randint(-spread, spread)))
        for at_s in steady(args.stream_rate, duration_s, dice)
    ]
    prompts = [(at_s, Ask(*prompt)) for at_s in steady(args.long_rate, duration_s, dice)]
    async with Client([url], model, seed) as client:

        async def send(ask: Ask) -> Answer:
            last_s = 0.0

            def watch(_: int) -> None:
                nonlocal last_s
                now = time.perf_counter()
                if last_s:
                    seen.gaps_ms.append((now - last_s) * 1000)
                last_s = now

            return await client.send(ask, watch if ask.prompt == stream[0] else None)

        began = time.perf_counter()
        tasks = await open_loop(sorted([*streams, *prompts], key=lambda each: each[0]), send, lag)
        answers = await asyncio.gather(*tasks)
        seen.took_s = time.perf_counter() - began
    seen.streams = [each for each in answers if each.ask.prompt == stream[0]]
    seen.prompts = [each for each in answers if each.ask.prompt != stream[0]]
    return seen


async def moved(redis_url: str, model: str) -> int:
    """Jobs that moved from one worker to another, as far as the events still tell."""
    redis = connect(redis_url)
    try:
        raw = await redis.xrange(keys.events(model))
        events = [decode_event(entry.data) for entry in parse_entries(raw)]
        return sum(isinstance(event, JobMoved) for event in events)
    finally:
        await redis.aclose()


def own_settings(way: str, workers: int) -> dict[str, dict[str, str]]:
    """Each worker's role."""
    if way == "both":
        return {}
    prefill, decode = parse_roles(way)
    if prefill + decode != workers:
        raise SystemExit(f"{way}: {workers} workers are to be split")
    roles = ["prefill"] * prefill + ["decode"] * decode
    return {f"w{index}": {"HEADRACE_ROLE": role} for index, role in enumerate(roles)}


def measure(way: str, args: argparse.Namespace) -> Seen:
    with Fleet(
        args.workers,
        model=args.model,
        threads=args.threads,
        env=settings_of(args.set),
        own=own_settings(way, args.workers),
    ) as fleet:
        url = fleet.urls[0]
        run(load(url, fleet.model, args, args.warm, 99))
        before = fleet.cpu()
        moved_before = asyncio.run(moved(fleet.redis_url, fleet.model))
        seen: Seen = run(load(url, fleet.model, args, args.seconds, args.seed))
        seen.moved = asyncio.run(moved(fleet.redis_url, fleet.model)) - moved_before
        seen.cpu_s = {name: used - before[name] for name, used in fleet.cpu().items()}
    return seen


def told(way: str, seen: Seen) -> str:
    gaps, done = seen.gaps_ms, [*seen.streams, *seen.prompts]
    first = [each.ttft_ms for each in seen.prompts if each.complete]
    begun = [each.ttft_ms for each in seen.streams if each.complete]
    incomplete = sum(not each.complete for each in done)
    output = sum(each.tokens for each in done if each.complete)
    cpu = ", ".join(f"{name} {used / seen.took_s:.2f}" for name, used in seen.cpu_s.items())
    return (
        f"{way:>5}: ITL of {len(gaps)} gaps p50 {percentile(gaps, 50):6.1f}, "
        f"p90 {percentile(gaps, 90):6.1f}, p99 {percentile(gaps, 99):6.1f}, "
        f"max {max(gaps, default=0):6.1f} ms | first token of {len(first)} long prompts p50 "
        f"{percentile(first, 50):6.0f}, p99 {percentile(first, 99):6.0f} ms, of streams p50 "
        f"{percentile(begun, 50):6.0f}, p99 {percentile(begun, 99):6.0f} ms | "
        f"{seen.tokens / seen.took_s:6.1f} tokens/s, {output / seen.took_s:5.1f} of output | "
        f"{seen.moved} jobs moved, {incomplete} of {len(done)} incomplete | cores: {cpu}"
    )


async def transfer(args: argparse.Namespace) -> None:
    """KV of one prompt from one engine into another's pool, over shared memory and over TCP."""
    from headrace import models
    from headrace.clock import SystemClock
    from headrace.types import Band, Job, Sampling, pack_tokens
    from headrace_worker.engine import Engine, EngineConfig
    from headrace_worker.loading import load_model
    from headrace_worker.moving.inbox import Inbox
    from headrace_worker.moving.mover import Mover

    loaded, clock = load_model(models.resolve(args.model), args.model), SystemClock()
    prompt, dice = parse_shape(args.long)[0], random.Random(args.seed)
    sender = Engine(loaded, EngineConfig(kv_tokens=4 * prompt), clock)
    for shared in (True, False):
        receiver = Engine(loaded, EngineConfig(kv_tokens=4 * prompt), clock)
        inbox = Inbox(
            receiver,
            "tcp://127.0.0.1:0",
            kv_tokens=4 * prompt,
            max_jobs=8,
            send=lambda command, engine=receiver: command(engine),
        )
        if not shared:
            inbox.landing.close()
        address, mover = await inbox.start(), Mover(sender.layout, sender.block_bytes, clock)
        job = Job(
            f"shared {shared}", args.model, "t", Band.STANDARD, 0, "g",
            pack_tokens(dice.randrange(100, 40_000) for _ in range(prompt)),
            Sampling(max_tokens=8, temperature=0.0), move_to="d", move_address=address,
        )  # fmt: skip
        sender.add(job)
        lent, steps_ms = [], []
        while sender.has_work:
            began = time.perf_counter()
            lent += sender.step().lent
            steps_ms.append((time.perf_counter() - began) * 1000)
        mover.begin(job)
        began = time.perf_counter()
        mover.lend(lent)
        arrived = await mover.finish(job.id)
        took_ms = (time.perf_counter() - began) * 1000
        megabytes = arrived.blocks * sender.block_bytes / 1e6
        print(
            f"{'shared memory' if shared else 'TCP':>13}: {arrived.blocks} blocks of "
            f"{sender.block_bytes} bytes in {took_ms:.1f} ms ({megabytes / took_ms:.2f} GB/s), "
            f"{1000 * took_ms / prompt:.1f} ms for 1,000 tokens; computing them took "
            f"{sum(steps_ms):.0f} ms {arrived.reason}",
            flush=True,
        )
        await mover.close()
        await inbox.stop()


def compare(ways: Sequence[str], results: Sequence[Seen]) -> None:
    """Each way beside the first."""
    base = results[0]
    for way, seen in zip(ways[1:], results[1:], strict=True):
        itl = percentile(seen.gaps_ms, 99) / percentile(base.gaps_ms, 99)
        rate = (seen.tokens / seen.took_s) / (base.tokens / base.took_s)
        print(f"{way} to {ways[0]}: ITL p99 {itl:.2f} times, tokens/s {rate:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", nargs="+", default=["both", "1:1"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--stream", default="32:64", help="streams: prompt and mean output")
    parser.add_argument("--stream-rate", type=float, default=0.4, help="streams a second")
    parser.add_argument("--long", default="512:16", help="long prompts: prompt and output")
    parser.add_argument("--long-rate", type=float, default=0.2, help="long prompts a second")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--warm", type=float, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="HEADRACE_X=1 for all services")
    parser.add_argument("--transfer", action="store_true", help="only measure moving KV")
    args = parser.parse_args()
    if args.transfer:
        asyncio.run(transfer(args))
        return
    results = []
    for way in args.ways:
        results.append(measure(way, args))
        print(told(way, results[-1]), flush=True)
    compare(args.ways, results)


if __name__ == "__main__":
    main()
