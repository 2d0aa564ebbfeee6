"""Three studies that the documentation quotes: prefix caching, goodput, adversary tenants.

Invariant: each says what it compares and with what bound, prints every figure behind its verdict,
and runs the same code as `headrace simulate` does; a verdict that fails is printed as failed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.errors import SettingsError
from headrace.policy.cost_model import PREFILL_CONTEXT_UNIT, CostModel
from headrace.types import Band
from headrace_gateway.policy.virtual_counters import INPUT_WEIGHT, OUTPUT_WEIGHT
from headrace_sim import plots
from headrace_sim.alternatives import ALTERNATIVES, OURS, Alternative
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.kv_cache import KvCache, round_up
from headrace_sim.metrics import Fairness, Slo, Summary, fairness
from headrace_sim.report import table
from headrace_sim.simulation import compare, summarize
from headrace_sim.trace import Trace
from headrace_sim.workload import (
    ClosedLoop,
    Lengths,
    Mix,
    Shape,
    SimTenant,
    Stream,
    Together,
    TraceStream,
)

HIT_SHARE_MIN = 0.95
LOAD_RATIO_MAX = 1.25
GOODPUT_GAIN_MIN = 1.3
KNEE_SHARE = 0.9
"""A way to dispatch is past its knee where fewer requests than these meet their targets."""
NO_WORSE_SHARE = 0.95
GOODPUT_BANDS = (10.0, 60.0, 30.0)
GOODPUT_TENANTS = tuple(SimTenant(f"t{n}", share=1 / (n + 1)) for n in range(8))
RATE_STEPS = (0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 2.0)
BASELINES = ("fcfs", "least-loaded")
BATCH_ROWS = 128
"""Streams that share a step, where the rate a fleet can bear is estimated."""
ADVERSARY_S = 600.0


@dataclass(slots=True)
class Study:
    """What came of a study. `holds`: each claim with whether it held."""

    name: str
    tables: list[Table] = field(default_factory=list)
    holds: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def run(
    name: str,
    trace: Trace | None,
    config: FleetConfig,
    slo: Slo,
    console: Console,
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """Run study `name` and print it. Raises SettingsError."""
    if plot is not None and name != "goodput":
        raise SettingsError("--plot: of the studies only goodput draws something")
    if name == "adversary":
        study = adversary(config)
    elif trace is None:
        raise SettingsError(f"the {name} study replays a trace: name its file")
    elif name == "prefix":
        study = prefix(trace, config, slo)
    else:
        study = goodput(trace, config, slo)
    for each in study.tables:
        console.print(each)
    for note in study.notes:
        console.print(note)
    for claim, held in study.holds.items():
        console.print(f"[{'green' if held else 'red'}]{'holds' if held else 'FAILS'}[/]  {claim}")
    if json_file is not None:
        facts = {"study": study.name, "holds": study.holds, "figures": study.figures}
        json_file.write_text(json.dumps(facts, indent=2, default=asdict) + "\n")
    if plot is not None:
        title = f"{study.name}: {trace.name if trace else 'synthetic'}"
        plots.draw_curves(study.curves, plot, x="requests/s", y="goodput (requests/s)", title=title)


# prefix caching


def one_cache(stream: Stream, tokens: int) -> float:
    """Hit ratio of one least-recently-used cache of `tokens`, a request after the other."""
    cache = KvCache(tokens, plain=True, reports=False)
    hits = total = 0
    for request in stream.start():
        total += request.input_tokens
        needed = round_up(request.input_tokens)
        if needed > tokens:
            continue
        count, found, _ = cache.match(request.blocks)
        hits += min(found, request.input_tokens - 1)
        cache.hold(request.blocks[:count])
        own = max(0, needed - found)
        cache.reserve(own)
        for block in request.blocks[count:]:
            cache.computed(block)
            own -= block[1]
        cache.give_back(own)
        cache.release(request.blocks, int(Band.STANDARD))
    return hits / max(1, total)


def prefix(
    trace: Trace,
    config: FleetConfig,
    slo: Slo,
    ways: Sequence[Alternative] = tuple(ALTERNATIVES.values()),
) -> Study:
    """Does routing find what one cache as large as the whole fleet's would hold, evenly?"""

    def stream() -> Stream:
        return TraceStream(trace, Mix(gateways=config.gateways), seed=config.seed)

    study = Study("prefix")
    best = one_cache(stream(), config.workers * config.cost.kv_tokens)
    fleets = compare(config, ways, stream)
    made = table(
        f"{trace.name}: {len(trace.requests)} requests, {config.workers} workers, "
        f"{config.cost.name}; one cache of that size hits {best:.1%}",
        "dispatch", "hit", "of one cache", "max/mean work", "max/mean busy", "busy", "TTFT mean",
        "p50", "p99", "met",
    )  # fmt: skip
    for fleet in fleets:
        s = summarize(fleet, slo)
        study.figures[s.name] = {"one_cache": best, **asdict(s)}
        ttft = s.bands["standard"].ttft_ms
        made.add_row(
            s.name,
            f"{s.hit_ratio:.1%}",
            f"{s.hit_ratio / max(1e-9, best):.0%}",
            f"{s.work_max_over_mean:.2f}",
            f"{s.busy_max_over_mean:.2f}",
            f"{s.utilisation:.0%}",
            *(f"{ttft[p]:,.0f}" for p in ("mean", "p50", "p99")),
            f"{s.met_share:.1%}",
        )
        if s.name == OURS.name:
            study.holds["hit ratio within 5 % of one cache of the same total size"] = (
                s.hit_ratio >= HIT_SHARE_MIN * best
            )
            study.holds["max/mean work of the workers at most 1.25"] = (
                s.work_max_over_mean <= LOAD_RATIO_MAX
            )
    study.tables.append(made)
    return study


# goodput


def bearable_per_s(trace: Trace, config: FleetConfig, hit_ratio: float) -> float:
    """A rough estimate of the requests per second at which the fleet is full."""
    work = [_work_ms(r.input_tokens, r.output_tokens, config.cost, hit_ratio)
            for r in trace.requests]  # fmt: skip
    return 1000 * config.workers / (sum(work) / len(work))


def _work_ms(input_tokens: int, output_tokens: int, cost: CostModel, hit_ratio: float) -> float:
    """What a request takes of a worker that has BATCH_ROWS streams at a time."""
    computed = input_tokens * (1 - hit_ratio)
    pairs = computed * (input_tokens + input_tokens * hit_ratio) / 2
    prefill = cost.prefill_token_ms * computed + cost.prefill_context_ms * pairs / (
        PREFILL_CONTEXT_UNIT
    )
    row = cost.decode_row_ms + cost.decode_context_ms * input_tokens / 1_000
    rows = min(BATCH_ROWS, cost.max_jobs)
    return prefill + output_tokens * (row + cost.step_ms / rows)


def goodput(
    trace: Trace,
    config: FleetConfig,
    slo: Slo,
    steps: Sequence[float] = RATE_STEPS,
) -> Study:
    """At rising rates, how many requests meet their targets, and does any band or tenant pay?

    Clients say their target of the first token as a deadline; baselines know none. `steps` are
    multiples of the rate that the fleet is estimated to bear. A baseline's knee is the lowest of
    these rates at which more than a tenth of its requests miss their targets.
    """
    first, standard, batch = (int(ms) for ms in slo.ttft_ms)
    mix = Mix(GOODPUT_TENANTS, GOODPUT_BANDS, config.gateways, (first, standard, batch))
    own_per_s = 1000 * len(trace.requests) / trace.span_ms
    full = bearable_per_s(trace, config, hit_ratio=0.2 if trace.requests[0].blocks else 0.0)
    ways = [OURS, *(ALTERNATIVES[name] for name in BASELINES)]
    rows: list[tuple[float, list[Summary]]] = []
    for step in steps:
        rate = step * full / own_per_s

        def stream(rate: float = rate) -> Stream:
            return TraceStream(trace, mix, seed=config.seed, rate=rate)

        fleets = compare(config, ways, stream)
        rows.append((step * full, [summarize(fleet, slo) for fleet in fleets]))
    return _goodput_study(trace, config, rows)


def _goodput_study(
    trace: Trace, config: FleetConfig, rows: list[tuple[float, list[Summary]]]
) -> Study:
    study = Study("goodput")
    names = [s.name for s in rows[0][1]]
    made = table(
        f"{trace.name}: goodput by requests/s on {config.workers} workers, {config.cost.name}",
        "requests/s", *names, "gain", *(f"{n} met i/s/b" for n in names),
    )  # fmt: skip
    for per_s, summaries in rows:
        best = max(s.goodput_per_s for s in summaries[1:])
        made.add_row(
            f"{per_s:.2f}",
            *(f"{s.goodput_per_s:.2f}" for s in summaries),
            f"{summaries[0].goodput_per_s / max(1e-9, best):.2f}",
            *("/".join(f"{g.met_share:.0%}" for g in s.bands.values()) for s in summaries),
        )
        for s in summaries:
            study.curves.setdefault(s.name, []).append((per_s, s.goodput_per_s))
    study.tables.append(made)
    for index, name in enumerate(names[1:], 1):
        knee = next((n for n, (_, ss) in enumerate(rows) if ss[index].met_share < KNEE_SHARE), -1)
        per_s, summaries = rows[knee]
        gain = summaries[0].goodput_per_s / max(1e-9, summaries[index].goodput_per_s)
        claim = f"goodput at least 1.3 times {name}'s at its knee, {per_s:.2f}/s: {gain:.2f}"
        study.holds[claim] = gain >= GOODPUT_GAIN_MIN
    borne = {name: _sustained(rows, n) for n, name in enumerate(names)}
    words = ", ".join(f"{name} {per_s:.2f}/s" for name, per_s in borne.items())
    study.notes.append(f"rate at which {KNEE_SHARE:.0%} meet their targets: {words}")
    study.holds.update(_nobody_pays(rows))
    study.figures["borne_per_s"] = borne
    study.figures["rates"] = [{"per_s": r, "runs": [asdict(s) for s in ss]} for r, ss in rows]
    return study


def _sustained(rows: list[tuple[float, list[Summary]]], index: int) -> float:
    """The rate up to which KNEE_SHARE of the requests meet their targets, between the points."""
    before = (0.0, 1.0)
    for per_s, summaries in rows:
        met = summaries[index].met_share
        if met < KNEE_SHARE:
            part = (before[1] - KNEE_SHARE) / max(1e-9, before[1] - met)
            return before[0] + part * (per_s - before[0])
        before = (per_s, met)
    return before[0]


def _nobody_pays(rows: list[tuple[float, list[Summary]]]) -> dict[str, bool]:
    """No band starves, and no tenant meets fewer targets than in order of arrival."""
    holds = {}
    for per_s, (ours, theirs, *_) in rows:
        starved = [band for band, g in ours.bands.items() if g.requests and not g.complete]
        holds[f"{per_s:.2f}/s: every band gets on {', '.join(starved)}"] = not starved
        worse = [
            tenant
            for tenant, group in ours.tenants.items()
            if group.met < NO_WORSE_SHARE * theirs.tenants[tenant].met
        ]
        claim = f"{per_s:.2f}/s: no tenant does worse than with {theirs.name} {', '.join(worse)}"
        holds[claim] = not worse
    return holds


# adversaries


def adversary(config: FleetConfig, seconds: float = ADVERSARY_S) -> Study:
    """Honest tenants beside three that try to get more than their part; all weigh the same."""
    until_ms = 1000 * seconds
    kv = config.cost.kv_tokens
    honest = Shape(Lengths(kv / 64, 0.5, kv // 8), Lengths(kv / 128, 0.5, kv // 8))
    tiny = Shape(Lengths(10), Lengths(4))
    huge = Shape(Lengths(kv / 4), Lengths(8))
    early = Shape(Lengths(kv / 64, 0.5, kv // 8), Lengths(16))
    seats = 2 * config.workers * min(config.cost.max_jobs, 64)

    def loop(n: int, tenants: tuple[SimTenant, ...], shape: Shape, clients: int) -> ClosedLoop:
        mix = Mix(tenants, gateways=config.gateways)
        return ClosedLoop(
            mix, shape, clients=clients, until_ms=until_ms, seed=config.seed, stream=n
        )

    def stream() -> Stream:
        return Together(
            [
                loop(0, (SimTenant("honest-a"), SimTenant("honest-b")), honest, seats),
                loop(1, (SimTenant("tiny"),), tiny, 1_000),
                loop(2, (SimTenant("huge"),), huge, max(8, seats // 4)),
                loop(3, (SimTenant("early", max_tokens=kv // 4),), early, seats),
            ]
        )

    study = Study("adversary")
    gateway = replace(config.gateway, refuses=False)
    config = replace(config, gateway=gateway)
    running = config.workers * kv
    bound = 2 * max(INPUT_WEIGHT * kv / 4, OUTPUT_WEIGHT * running)
    made = table(
        f"{config.workers} workers, {config.cost.name}: service per tenant over {seconds:.0f} s "
        f"(bound of the gap {bound:,.0f}, allowed twice that)",
        "dispatch", "honest-a", "honest-b", "tiny", "huge", "early", "max gap", "Jain", "shared s",
    )  # fmt: skip
    for fleet in compare(config, [OURS, ALTERNATIVES["fcfs"]], stream):
        result = fairness(fleet.service)
        name = fleet.config.alternative.name
        shares = backlogged_shares(fleet)
        study.figures[name] = {"fairness": asdict(result), "shares": shares, "bound": bound}
        made.add_row(
            name,
            *(
                f"{shares.get(t, 0.0):.2f}"
                for t in ("honest-a", "honest-b", "tiny", "huge", "early")
            ),
            f"{result.gap_max:,.0f}",
            f"{result.jain:.3f}",
            str(result.backlogged_s),
        )
        if fleet.config.alternative is OURS:
            study.holds.update(_fair(result, shares, bound))
    study.tables.append(made)
    return study


def _fair(result: Fairness, shares: dict[str, float], bound: float) -> dict[str, bool]:
    claim = f"no gap above twice the bound: {result.gap_max:,.0f} of {2 * bound:,.0f}"
    gains = {t: share for t, share in shares.items() if not t.startswith("honest")}
    most = max(gains.values(), default=0.0)
    return {
        claim: result.gap_max <= 2 * bound,
        f"no adversary gets more than 1.1 of an even part: {most:.2f}": most <= 1.1,
    }


def backlogged_shares(fleet: Fleet) -> dict[str, float]:
    """Each tenant's service over an even part, in the seconds in which all of them waited."""
    service = fleet.service
    busy = [service.busy_buckets(tenant) for tenant in service.tenants]
    shared = sorted(set.intersection(*busy)) if busy else []
    got = {t: sum(service.served(t, bucket) for bucket in shared) for t in service.tenants}
    even = sum(got.values()) / max(1, len(got))
    return {tenant: served / even for tenant, served in got.items()} if even else {}
