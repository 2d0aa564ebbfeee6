"""Ten times more work than the fleet can do: who keeps what, and is anything lost or untrue.

    python -m bench overload [--workers 2] [--factor 10] [--seconds 180] [--json overload.json]

Real services and a real model. First, interactive requests one at a time: their TTFT alone. Then
the capacity: a closed loop of the same mix that keeps all workers busy; 1x is what it completes a
second. Then interactive requests by themselves, at the rate and the Poisson times that they have
later: their unloaded TTFT, in which they meet each other and nobody else. Then the requests of all
at Poisson times, `--factor` times as many, 10 % interactive, 60 % standard and 30 % batch;
interactive requests are small, so that their own share of the work stays well below the capacity
(it is printed). Nobody retries. At the end, probes of each band, four a second, find when that band
is admitted again, which is held against the retry-after that the last refused clients were told.
Then everything accepted is waited for. Retry-after is also held against the overload itself: when
was a request of the same band admitted next, be it whose it may.

It shows: TTFT of each band, refusals and how fast they answer, whether all that was accepted came
complete, how truthful retry-after is, and what every process took of the CPU. The load generator
runs on the same cores: its lag and CPU stand below the tables. `--set HEADRACE_X=…` changes a
setting of all services.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench._fleet import Fleet, settings_of
from bench._load import (
    BANDS,
    Answer,
    Ask,
    Client,
    Lag,
    closed_loop,
    open_loop,
    parse_shape,
    percentile,
    poisson,
    run,
    spread,
)

MIX = (0.1, 0.6, 0.3)
PROBE_EVERY_S = 0.25
REFUSED_WITHIN_S = 0.5
"""Refusals in the last moments of the overload are held against the probes; the places that earlier
ones would have had went to who came between."""


@dataclass
class Run:
    """What the experiment gathers."""

    args: argparse.Namespace
    shapes: list[tuple[int, int]]
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, band: int) -> Ask:
        prompt, output = self.shapes[band]
        return Ask(prompt, output, band)

    def draw(self, dice: random.Random) -> Ask:
        return self.ask(dice.choices(range(3), MIX)[0])


async def alone(client: Client, bench: Run) -> None:
    """Interactive requests, one at a time."""
    answers = [await client.send(bench.ask(0)) for _ in range(bench.args.alone + 3)][3:]
    bench.facts["alone_ttft_ms"] = spread(a.ttft_ms for a in answers if a.complete)


async def unloaded(client: Client, bench: Run, rate: float, dice: random.Random) -> None:
    """Interactive requests, `rate` a second, without the others."""
    plan = [(at_s, bench.ask(0)) for at_s in poisson(rate, bench.args.unloaded, dice)]
    answers = await asyncio.gather(*await open_loop(plan, client.send, Lag()))
    bench.facts["unloaded_ttft_ms"] = spread(a.ttft_ms for a in answers if a.complete)
    bench.facts["unloaded_incomplete"] = sum(not a.complete for a in answers)


async def capacity(client: Client, bench: Run, dice: random.Random) -> float:
    """Requests of the mix that the fleet completes a second when it has enough of them."""
    args = bench.args
    streams = args.streams or args.workers * 20
    began = time.perf_counter()
    answers = await closed_loop(
        streams, lambda: bench.draw(dice), client.send, args.warm_up + args.capacity_seconds
    )
    # the beginning fills the batches, the end empties them
    since, until = began + args.warm_up, began + args.warm_up + args.capacity_seconds
    inside = [a for a in answers if a.complete and since <= a.end_s < until]
    rate = len(inside) / args.capacity_seconds
    tokens = sum(a.tokens for a in inside) / args.capacity_seconds
    bench.facts["capacity"] = {"requests_per_s": rate, "output_tokens_per_s": tokens}
    return rate


def work_of(shape: tuple[int, int]) -> int:
    """As virtual token counters weigh it."""
    return shape[0] + 2 * shape[1]


async def overload(
    client: Client, bench: Run, rate: float, dice: random.Random, lag: Lag
) -> list[Answer]:
    """The overload, the probes behind it, and the wait for what was accepted."""
    args = bench.args
    plan = [(at_s, bench.draw(dice)) for at_s in poisson(rate, args.seconds, dice)]
    began, cpu = time.perf_counter(), time.process_time()
    tasks = await open_loop(plan, client.send, lag)
    end_s = time.perf_counter()
    bench.facts["generator"] = {
        "cpu_share": (time.process_time() - cpu) / (end_s - began),
        "lag_ms": spread(lag.values),
    }
    bench.facts["span_s"] = [began, end_s]
    probes = await probe_all(client, bench, tasks, end_s)
    try:
        async with asyncio.timeout(args.drain):
            answers = list(await asyncio.gather(*tasks))
    except TimeoutError:
        answers = [task.result() for task in tasks if task.done() and not task.cancelled()]
    bench.facts["drained_s"] = time.perf_counter() - end_s
    bench.facts["never_ended"] = len(tasks) - len(answers)
    bench.facts["probes"] = probes
    return answers


async def probe_all(
    client: Client, bench: Run, tasks: list[asyncio.Task[Answer]], end_s: float
) -> list[dict[str, Any]]:
    done = [task.result() for task in tasks if task.done()]
    waits = []
    for band in range(3):
        refused = [
            a
            for a in done
            if a.status == 429 and a.ask.band == band and a.end_s > end_s - REFUSED_WITHIN_S
        ]
        waits.append(probe(client, bench, band, refused))
    return list(await asyncio.gather(*waits))


async def probe(client: Client, bench: Run, band: int, refused: list[Answer]) -> dict[str, Any]:
    """When a request of `band` is admitted again; what those refused last had been told."""
    found: dict[str, Any] = {"band": BANDS[band], "refused": len(refused)}
    if not refused:
        return found
    until = time.perf_counter() + bench.args.drain
    while time.perf_counter() < until:
        sent, answer = time.perf_counter(), Answer(bench.ask(band), 0.0)
        task = asyncio.create_task(client.send(answer.ask, answer=answer))
        while not answer.status and not task.done():
            await asyncio.sleep(0.002)
        if answer.admitted:
            break
        await asyncio.sleep(max(0.0, sent + PROBE_EVERY_S - time.perf_counter()))
    else:
        return found
    told = [a.retry_after_ms for a in refused]
    ratios = [a.retry_after_ms / max(1.0, (sent - a.head_s) * 1000) for a in refused]
    found |= {
        "told_ms": spread(told),
        "true_ms": spread((sent - a.head_s) * 1000 for a in refused),
        "told_over_true": spread(ratios),
        "within_2x": sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios),
    }
    await task
    return found


def next_admitted_ms(refused: list[Answer], admitted: list[Answer]) -> list[float]:
    """How long after each refusal somebody was admitted; nothing for those after the last."""
    moments = sorted(a.sent_s for a in admitted)
    at = [(a.head_s, bisect.bisect(moments, a.head_s)) for a in refused]
    return [1000 * (moments[index] - then) for then, index in at if index < len(moments)]


def band_row(bench: Run, answers: list[Answer], band: int) -> dict[str, Any]:
    """One band's figures."""
    began, end = bench.facts["span_s"]
    mine = [a for a in answers if a.ask.band == band]
    admitted = [a for a in mine if a.admitted]
    complete = [a for a in admitted if a.complete]
    during = [a for a in complete if a.end_s <= end]
    refused = [a for a in mine if a.refused]
    thirds = [0, 0, 0]
    for a in during:
        thirds[min(2, int(3 * (a.end_s - began) / (end - began)))] += a.tokens
    return {
        "band": BANDS[band],
        "offered": len(mine),
        "admitted": len(admitted),
        "refused": len(refused),
        "completed": len(complete),
        "missing": len(mine) - len(refused) - len(complete),
        "ttft_ms": spread(a.ttft_ms for a in complete),
        "tokens": sum(a.tokens for a in complete),
        "tokens_during": sum(a.tokens for a in during),
        "tokens_by_third": thirds,
        "refusal_ms": spread((a.head_s - a.sent_s) * 1000 for a in refused),
        "retry_after_ms": spread(a.retry_after_ms for a in refused if a.retry_after_ms),
        "again_ms": spread(next_admitted_ms(refused, admitted)),
        "missing_how": Counter(a.how or str(a.status) for a in mine if not a.refused)
        - Counter(a.how for a in complete),
    }


def show(bench: Run) -> None:
    f = bench.facts
    alone_ms, unloaded_ms, cap = f["alone_ttft_ms"], f["unloaded_ttft_ms"], f["capacity"]
    for what, ms in (("one at a time", alone_ms), ("without the others", unloaded_ms)):
        print(
            f"interactive TTFT, {what}: p50 {ms['p50']:.0f} ms, p99 {ms['p99']:.0f} ms over "
            f"{ms['count']}"
        )
    print(
        f"capacity (1x): {cap['requests_per_s']:.2f} requests/s, "
        f"{cap['output_tokens_per_s']:.0f} output tokens/s; offered {f['offered_per_s']:.1f}/s; "
        f"interactive alone is {f['interactive_load']:.2f}x"
    )
    print(
        f"{'band':<12}{'offered':>8}{'admitted':>9}{'refused':>8}{'complete':>9}{'missing':>8}"
        f"{'TTFT p50':>10}{'p99 ms':>9}{'tokens by third':>26}{'refusal p50':>13}{'p99 ms':>8}"
    )
    for row in f["bands"]:
        ttft, refusal = row["ttft_ms"], row["refusal_ms"]
        thirds = " ".join(map(str, row["tokens_by_third"]))
        print(
            f"{row['band']:<12}{row['offered']:>8}{row['admitted']:>9}{row['refused']:>8}"
            f"{row['completed']:>9}{row['missing']:>8}{ttft['p50']:>10.0f}{ttft['p99']:>9.0f}"
            f"{thirds:>26}{refusal['p50']:>13.1f}{refusal['p99']:>8.1f}"
        )
        if row["missing"]:
            print(f"  missing: {dict(row['missing_how'])}")
    for row in f["bands"]:
        if row["again_ms"]["count"]:
            told, again = row["retry_after_ms"], row["again_ms"]
            print(
                f"retry-after during the overload, {row['band']}: told {told['mean']:.0f} ms, the "
                f"next was admitted after {again['mean']:.0f} ms (means of {again['count']}; "
                f"medians {told['p50']:.0f} and {again['p50']:.0f})"
            )
    p99_ms = f["bands"][0]["ttft_ms"]["p99"]
    print(
        f"interactive TTFT p99 is {p99_ms / unloaded_ms['p99']:.2f}x its unloaded p99, and "
        f"{p99_ms / alone_ms['p99']:.2f}x that of one at a time"
    )
    for row in f["probes"]:
        if "told_ms" in row:
            print(
                f"retry-after, {row['band']}: told {row['told_ms']['p50']:.0f} ms, admitted again "
                f"after {row['true_ms']['p50']:.0f} ms (medians of {row['refused']}); told / true "
                f"{row['told_over_true']['p50']:.2f}, within 2x {row['within_2x']:.0%}"
            )
        else:
            print(f"retry-after, {row['band']}: {row['refused']} refused in the last moments")
    all_ms, lag = f["refusal_ms"], f["generator"]["lag_ms"]
    print(
        f"refusals of all bands: p50 {all_ms['p50']:.1f} ms, p99 {all_ms['p99']:.1f} ms\n"
        f"everything ended {f['drained_s']:.0f} s after the last arrival, {f['never_ended']} never"
    )
    cpus = ", ".join(f"{name} {share:.2f}" for name, share in f["cpu_shares"].items())
    print(
        f"cores used during the overload: {cpus}, load generator "
        f"{f['generator']['cpu_share']:.2f}; its requests left late by p50 {lag['p50']:.1f}, "
        f"p99 {lag['p99']:.1f} ms"
    )


async def experiment(fleet: Fleet, bench: Run) -> None:
    args, dice = bench.args, random.Random(bench.args.seed)
    async with Client(fleet.urls, fleet.model, args.seed) as client:
        await closed_loop(args.workers * 4, lambda: bench.draw(dice), client.send, 3)
        await alone(client, bench)
        rate = args.rate or await capacity(client, bench, dice)
        if args.rate:
            bench.facts["capacity"] = {"requests_per_s": rate, "output_tokens_per_s": 0.0}
        work = [work_of(shape) * part for shape, part in zip(bench.shapes, MIX, strict=True)]
        bench.facts["offered_per_s"] = rate * args.factor
        bench.facts["interactive_load"] = args.factor * work[0] / sum(work)
        await unloaded(client, bench, rate * args.factor * MIX[0], dice)
        before, began = fleet.cpu(), time.perf_counter()
        watch = asyncio.create_task(cpu_after(fleet, before, began, args.seconds))
        answers = await overload(client, bench, rate * args.factor, dice, Lag())
        bench.facts["cpu_shares"] = await watch
    bench.facts["bands"] = [band_row(bench, answers, band) for band in range(3)]
    bench.facts["refusal_ms"] = spread((a.head_s - a.sent_s) * 1000 for a in answers if a.refused)
    worst = sorted((a for a in answers if a.complete and not a.ask.band), key=lambda a: -a.ttft_ms)
    bench.facts["slowest_interactive"] = [
        [round(a.sent_s - bench.facts["span_s"][0], 1), round(a.ttft_ms)] for a in worst[:10]
    ]
    bench.facts["interactive_ttft_p90_ms"] = percentile([a.ttft_ms for a in worst], 90)


async def cpu_after(
    fleet: Fleet, before: dict[str, float], began: float, seconds: float
) -> dict[str, float]:
    """Cores that each process used from `began` for `seconds`."""
    await asyncio.sleep(seconds)
    took_s = time.perf_counter() - began
    return {name: (now - before[name]) / took_s for name, now in fleet.cpu().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--cache", action="store_true", help="with a cache service")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=0.0, help="1x in requests/s; 0: measure it")
    parser.add_argument("--seconds", type=float, default=180.0, help="of overload")
    parser.add_argument("--capacity-seconds", type=float, default=45.0)
    parser.add_argument("--warm-up", type=float, default=15.0)
    parser.add_argument("--streams", type=int, default=0, help="to measure the capacity with")
    parser.add_argument("--alone", type=int, default=50, help="interactive requests one at a time")
    parser.add_argument(
        "--unloaded",
        type=float,
        default=60.0,
        help="seconds of interactive requests without others",
    )
    parser.add_argument("--drain", type=float, default=900.0, help="longest wait for the accepted")
    parser.add_argument("--interactive", default="96:8", metavar="PROMPT:OUTPUT")
    parser.add_argument("--standard", default="128:64", metavar="PROMPT:OUTPUT")
    parser.add_argument("--batch", default="192:96", metavar="PROMPT:OUTPUT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="HEADRACE_X=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = [parse_shape(text) for text in (args.interactive, args.standard, args.batch)]
    bench = Run(args, shapes)
    with Fleet(
        args.workers,
        model=args.model,
        threads=args.threads,
        cache=args.cache,
        env=settings_of(args.set),
    ) as fleet:
        run(experiment(fleet, bench))
    show(bench)
    if args.json:
        facts = {"arguments": {k: str(v) for k, v in vars(args).items()}} | bench.facts
        args.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
