"""The studies that the documentation quotes: prefix caching, goodput, adversaries, and (in a module
of its own) disaggregation.

Invariant: each says what it compares and with what bound, prints every figure behind its verdict,
and runs the same code as `headrace simulate` does; a verdict that fails is printed as failed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from headrace.errors import SettingsError
from headrace.types import Band
from headrace_gateway.policy.virtual_counters import INPUT_WEIGHT, OUTPUT_WEIGHT
from headrace_sim import plots
from headrace_sim.alternatives import ALTERNATIVES, OURS, Alternative
from headrace_sim.disaggregation import disaggregation
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.goodput import goodput
from headrace_sim.kv_cache import KvCache, round_up
from headrace_sim.metrics import Fairness, Slo, fairness
from headrace_sim.report import Study, table
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
ADVERSARY_S = 600.0


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
    elif name == "disaggregation":
        study = disaggregation(trace, config, slo)
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
