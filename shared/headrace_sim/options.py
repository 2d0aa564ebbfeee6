"""From what somebody typed to what is simulated; every mistake names its option.

Invariant: nothing runs before everything has been understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from headrace.cli.common import parse_roles
from headrace.errors import SettingsError
from headrace.types import Band
from headrace_gateway.policy.admission import AdmissionLimits
from headrace_sim import plots, report, studies
from headrace_sim.alternatives import OURS, chosen
from headrace_sim.fleet import Delays, FleetConfig
from headrace_sim.gateway import GatewayConfig
from headrace_sim.metrics import Slo
from headrace_sim.presets import cost_model
from headrace_sim.simulation import compare, summarize
from headrace_sim.trace import Trace, read_trace
from headrace_sim.workload import (
    Lengths,
    Mix,
    PoissonStream,
    Shape,
    SimTenant,
    Stream,
    Surge,
    TraceStream,
)

SYNTHETIC = "synthetic"
SYNTHETIC_REQUESTS = 10_000
TENANTS_MAX = 10_000
GATEWAYS_MIN, GATEWAYS_MAX = 2, 1_000
_SURGE = re.compile(r"([\d.]+)-([\d.]+)x([\d.]+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says, as it says it."""

    what: str
    workers: int
    gateways: int
    cost: str
    rate_scale: float
    rate: float
    requests: int | None
    tenants: str
    bands: str
    deadlines: str
    input_tokens: str
    output_tokens: str
    prefixes: str
    surges: str
    sessions: bool
    seed: int
    compare: str
    slo_ttft_ms: str
    slo_itl_ms: str
    report_ms: float
    queue_jobs: int
    roles: str
    adapt_roles: bool
    plot: Path | None
    json_file: Path | None
    study: str | None


def run(asked: Asked, console: Console) -> None:
    """Simulate, and say what came of it. Raises SettingsError, TraceError."""
    if asked.plot is not None:
        plots.need_matplotlib()
    config, slo = fleet_config(asked), slo_of(asked)
    asked = replace(asked, gateways=config.gateways)
    limit = asked.requests if asked.study else None
    trace = None if asked.what == SYNTHETIC else read_trace(Path(asked.what), limit)
    if asked.study is not None:
        studies.run(asked.study, trace, config, slo, console, asked.plot, asked.json_file)
        return
    ways, stream = chosen(asked.compare), stream_of(asked, trace)
    if not ways:
        raise SettingsError("--compare: names at least one way to dispatch")
    fleets = compare(config, ways, stream, told=lambda name: console.log(name))
    summaries = [summarize(fleet, slo) for fleet in fleets]
    report.show(summaries, console)
    if asked.json_file is not None:
        facts = {"what": asked.what, "seed": asked.seed, "cost": config.cost.name}
        report.write_json(asked.json_file, facts, summaries)
    if asked.plot is not None:
        plots.draw_runs(fleets, asked.plot)


def fleet_config(asked: Asked) -> FleetConfig:
    """Workers, gateways and delays."""
    limits = AdmissionLimits()
    if asked.queue_jobs:
        # as many tokens and streams for each job as by default
        per_job = asked.queue_jobs / limits.queue_jobs_max
        limits = AdmissionLimits(
            queue_jobs_max=asked.queue_jobs,
            queue_work_max=int(limits.queue_work_max * per_job),
            live_jobs_max=max(1, int(limits.live_jobs_max * per_job)),
        )
    cost = cost_model(asked.cost)
    return FleetConfig(
        asked.workers,
        cost,
        gateways=asked.gateways or enough_gateways(asked.workers * cost.max_jobs, limits),
        gateway=GatewayConfig(limits=limits, sessions=asked.sessions),
        delays=Delays(report_ms=asked.report_ms),
        roles=_roles(asked),
        adapts=asked.adapt_roles,
        seed=asked.seed,
    )


def enough_gateways(jobs: int, limits: AdmissionLimits) -> int:
    """How many it takes until no band is refused while `jobs`, all that run at a time, stream."""
    each = limits.ceiling(limits.live_jobs_max, Band.BATCH)
    return min(GATEWAYS_MAX, max(GATEWAYS_MIN, -(-jobs // each)))


def _roles(asked: Asked) -> tuple[int, int]:
    """Raises SettingsError for more roles than workers, or for ways that know none."""
    if not asked.roles:
        return 0, 0
    prefill, decode = parse_roles(asked.roles)
    if prefill + decode > asked.workers:
        raise SettingsError(f"--roles: {asked.roles} are more than --workers {asked.workers}")
    if asked.compare != OURS.name:
        raise SettingsError(f"--roles: only {OURS.name} makes pairs of workers")
    return prefill, decode


def slo_of(asked: Asked) -> Slo:
    return Slo(_three("--slo-ttft-ms", asked.slo_ttft_ms), _three("--slo-itl-ms", asked.slo_itl_ms))


def stream_of(asked: Asked, trace: Trace | None) -> Callable[[], Stream]:
    """A function that makes the requests anew for each run."""
    mix = mix_of(asked)
    if trace is not None:
        replayed = trace
        return _tried(
            lambda: TraceStream(
                replayed, mix, seed=asked.seed, rate=asked.rate_scale, requests=asked.requests
            )
        )
    count, tokens = _numbers("--prefixes", asked.prefixes, 2)
    shape = Shape(
        _lengths("--input-tokens", asked.input_tokens),
        _lengths("--output-tokens", asked.output_tokens),
        int(count),
        int(tokens),
    )
    surges = [_surge(text) for text in filter(None, asked.surges.split(","))]
    return _tried(
        lambda: PoissonStream(
            mix,
            shape,
            per_s=asked.rate,
            requests=asked.requests or SYNTHETIC_REQUESTS,
            surges=surges,
            seed=asked.seed,
        )
    )


def _tried(make: Callable[[], Stream]) -> Callable[[], Stream]:
    """`make`, after it has once said what it finds wrong."""
    make()
    return make


def mix_of(asked: Asked) -> Mix:
    """Tenants, bands and deadlines."""
    first, standard, batch = (int(ms) for ms in _three("--deadlines", asked.deadlines))
    return Mix(
        tenants_of(asked.tenants),
        _three("--bands", asked.bands),
        asked.gateways,
        (first, standard, batch),
    )


def tenants_of(text: str) -> tuple[SimTenant, ...]:
    """`3`, or `name:share:weight,…` where share and weight may be left out."""
    if text.isascii() and text.isdigit() and len(text) < 6:
        if not 1 <= int(text) <= TENANTS_MAX:
            raise SettingsError(f"--tenants: 1 to {TENANTS_MAX}, not {text}")
        return tuple(SimTenant(f"t{n}") for n in range(int(text)))
    found: dict[str, SimTenant] = {}
    for part in text.split(","):
        name, *numbers = part.split(":")
        if not name or len(numbers) > 2 or name in found:
            raise SettingsError(f"--tenants: {part!r} is not a new name:share:weight")
        share, weight = [*(_number("--tenants", each) for each in numbers), 1.0, 1.0][:2]
        if share <= 0 or weight <= 0:
            raise SettingsError(f"--tenants: share and weight of {name} have to be above 0")
        found[name] = SimTenant(name, weight=weight, share=share)
    return tuple(found.values())


def _surge(text: str) -> Surge:
    match = _SURGE.fullmatch(text)
    if not match:
        raise SettingsError(f"--surges: {text!r} is not like 60-90x5")
    begin, end, factor = (_number("--surges", part) for part in match.groups())
    return Surge(1000 * begin, 1000 * end, factor)


def _lengths(option: str, text: str) -> Lengths:
    mean, spread = _numbers(option, text, 2) if ":" in text else (_number(option, text), 0.0)
    if mean < 1 or spread > 5:
        raise SettingsError(f"{option}: a mean of 1 or more and a spread up to 5, not {text!r}")
    return Lengths(mean, spread)


def _numbers(option: str, text: str, count: int, separator: str = ":") -> list[float]:
    parts = text.split(separator)
    if len(parts) != count:
        raise SettingsError(f"{option}: {count} numbers with '{separator}' between, not {text!r}")
    return [_number(option, part) for part in parts]


def _three(option: str, text: str) -> tuple[float, float, float]:
    one, two, three = _numbers(option, text, 3, "/")
    return one, two, three


def _number(option: str, text: str) -> float:
    """From 0 to a trillion."""
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(f"{option}: {text!r} is not a number") from None
    if not 0 <= value <= 1e12:
        raise SettingsError(f"{option}: {text} is not from 0 to 1e12")
    return value
