"""Small workers, jobs and fleets for the stories of the simulator."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from headrace.policy.cost_model import CostModel
from headrace.types import Band, Job, Sampling
from headrace_sim.alternatives import ALTERNATIVES, Alternative
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.kv_cache import PrefixBlock
from headrace_sim.sequence import SimSequence
from headrace_sim.worker import SimWorker
from headrace_sim.workload import Lengths, Mix, PoissonStream, Shape, SimTenant, Stream

TRACES = Path(__file__).parents[3] / "shared" / "traces"
BLOCK = 64
SMALL = CostModel(
    step_ms=5.0,
    prefill_token_ms=0.25,
    decode_row_ms=0.5,
    decode_context_ms=0.125,
    prefill_context_ms=0.5,
    kv_tokens=4_096,
    max_jobs=8,
    step_tokens=256,
    name="small",
)
"""Few jobs and little KV, so that everything that can be short is short soon."""
ROOMY = replace(SMALL, kv_tokens=200_000)


class Arrival(NamedTuple):
    at_ms: float
    id: str
    prompt: int
    output: int
    blocks: tuple[PrefixBlock, ...]
    band: Band


class End(NamedTuple):
    """When a job ended, what it found cached at first, how often it was preempted."""

    at_ms: float
    cached: int
    preemptions: int


def job(id: str, prompt: int, output: int, **facts: Any) -> Job:
    facts = {"band": Band.STANDARD, "arrived_ms": 0, "tenant": "t0", **facts}
    return Job(
        id=id,
        model="m",
        gateway="g",
        prompt=array("I", bytes(4 * prompt)),
        sampling=Sampling(max_tokens=output),
        **facts,
    )


def sequence(
    id: str, prompt: int, output: int, blocks: tuple[PrefixBlock, ...] = (), **facts: Any
) -> SimSequence:
    return SimSequence(job(id, prompt, output, **facts), output, blocks)


def arrivals(seed: int, count: int = 60, bands: tuple[Band, ...] = tuple(Band)) -> list[Arrival]:
    """Jobs that come faster than SMALL computes them, many with one of four shared prefixes."""
    rng = Random(seed)
    now, made = 0.0, []
    for n in range(count):
        now += rng.expovariate(1 / 60)
        prefix, blocks = rng.randrange(4), rng.randrange(5)
        named = tuple((1_000 * prefix + k, BLOCK) for k in range(blocks))
        prompt, output = blocks * BLOCK + rng.randrange(5, 300), rng.randrange(1, 120)
        made.append(Arrival(now, f"j{n}", prompt, output, named, rng.choice(bands)))
    return made


def serve(worker: SimWorker, load: list[Arrival]) -> dict[str, End]:
    """All of `load`, with a look at the worker's integrity after every event."""
    ends: dict[str, End] = {}
    coming = list(load)
    while coming or worker.next_ms < math.inf:
        if coming and coming[0].at_ms <= worker.next_ms:
            at_ms, id, prompt, output, blocks, band = coming.pop(0)
            arrived = sequence(id, prompt, output, blocks, band=band, arrived_ms=int(at_ms))
            worker.add(arrived, at_ms)
        else:
            now = worker.next_ms
            for each in worker.advance(now).finished:
                ends[each.job.id] = End(now, each.cached, each.preemptions)
        worker.check_integrity()
    return ends


def stream(
    seed: int = 0,
    *,
    requests: int = 200,
    per_s: float = 20.0,
    bands: tuple[float, float, float] = (10, 60, 30),
    **facts: Any,
) -> Stream:
    """Poisson arrivals of two tenants with short prompts, some of whose prefixes are shared."""
    facts = {"tenants": (SimTenant("a"), SimTenant("b", weight=4)), "gateways": 2, **facts}
    shape = Shape(Lengths(120, 0.6, 600), Lengths(30, 0.6, 150), 3, 128, BLOCK)
    return PoissonStream(
        Mix(bands=bands, **facts), shape, per_s=per_s, requests=requests, seed=seed
    )


def simulate(requests: Stream, way: str | Alternative = "headrace", **facts: Any) -> Fleet:
    alternative = ALTERNATIVES[way] if isinstance(way, str) else way
    facts = {"workers": 3, "cost": ROOMY, "gateways": 2, "check": True, **facts}
    return Fleet(FleetConfig(alternative=alternative, **facts), requests).run()
