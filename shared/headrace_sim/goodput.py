"""The goodput study: at which rate do users still get what they were promised, and what then?

Definitions, the only ones used here. A request is *met* if it is complete, its first token came
within its band's TTFT target, and the mean gap between its tokens was within its band's ITL target;
whoever is refused or dropped is not met. A way's *bearable rate* (the goodput of DistServe, Zhong
et al., OSDI 2024) is the highest tested rate at which it meets KNEE_SHARE of all requests. The
*knee* is the bearable rate of our dispatcher; what the others make of that very rate is compared
with it. *Peak goodput* is the most met requests a second at any tested rate.

Invariant: at each rate every way gets the same requests at the same times, with the same targets.
Only ours can use a target as a deadline, and is told of them (interactive, standard and batch
requests say their TTFT target); the ones it is compared with have no place for one. How much of the
difference that makes is shown by ours at the knee without deadlines.

Rates are tested on a coarse grid around an estimate, then between the last rate that a way bore and
the next one, halving the span BISECTIONS times. Rejected: the knee of a baseline, where all still
meet most targets and nothing is decided; interpolation between rates, which reports what nobody
has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from rich.table import Table

from headrace.policy.cost_model import PREFILL_CONTEXT_UNIT, CostModel
from headrace_sim.alternatives import ALTERNATIVES, OURS, Alternative
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.metrics import GroupStats, Slo, Summary
from headrace_sim.report import Study, table
from headrace_sim.simulation import summarize
from headrace_sim.trace import Trace
from headrace_sim.workload import Mix, SimTenant, TraceStream

KNEE_SHARE = 0.9
"""Of all requests have to be met where a way bears a rate."""
GOODPUT_GAIN_MIN = 1.3
NO_WORSE_SHARE = 0.95
GOODPUT_BANDS = (10.0, 60.0, 30.0)
GOODPUT_TENANTS = tuple(SimTenant(f"t{n}", share=1 / (n + 1)) for n in range(8))
RATE_STEPS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
BISECTIONS = 4
BASELINES = ("fcfs", "least-loaded")
BATCH_ROWS = 128
"""Streams that share a step, where the rate a fleet can bear is estimated."""
UNTOLD = replace(OURS, name="headrace, no deadlines", deadlines=False)


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


Try = Callable[[Alternative, float], Summary]
"""Runs a way to dispatch at so many requests a second."""


@dataclass(slots=True)
class Trials:
    """What has been tested: runs by way and rate; each is run once."""

    ways: tuple[Alternative, ...]
    run: Try
    runs: dict[str, dict[float, Summary]] = field(default_factory=dict)

    def at(self, way: Alternative, per_s: float) -> Summary:
        known = self.runs.setdefault(way.name, {})
        if per_s not in known:
            known[per_s] = self.run(way, per_s)
        return known[per_s]

    def bearable(self, way: Alternative) -> float:
        """The highest tested rate that `way` bore; 0 if none."""
        runs = self.runs[way.name]
        return max((r for r, s in runs.items() if s.met_share >= KNEE_SHARE), default=0.0)

    def narrow(self, way: Alternative, times: int) -> None:
        """Halve the span between what `way` bore and the next rate, so many times."""
        for _ in range(times):
            low = self.bearable(way)
            high = min((rate for rate in self.runs[way.name] if rate > low), default=None)
            if high is None:
                return  # it bore all: a higher rate has to be asked for
            self.at(way, (low + high) / 2)

    def peak(self, way: Alternative) -> tuple[float, float]:
        """(goodput, rate) where most requests a second were met."""
        return max((s.goodput_per_s, rate) for rate, s in self.runs[way.name].items())

    def rates(self) -> list[float]:
        """Those at which all ways were tested."""
        return sorted(set.intersection(*(set(self.runs[way.name]) for way in self.ways)))


def goodput(
    trace: Trace,
    config: FleetConfig,
    slo: Slo,
    steps: Sequence[float] = RATE_STEPS,
    bisections: int = BISECTIONS,
) -> Study:
    """Goodput of ours and of BASELINES over rising rates; the module's header defines the terms.

    `steps` are the coarse rates, as multiples of the rate that the fleet is estimated to bear;
    `bisections` halve the span around each way's bearable rate.
    """
    first, standard, batch = (int(ms) for ms in slo.ttft_ms)
    mix = Mix(GOODPUT_TENANTS, GOODPUT_BANDS, config.gateways, (first, standard, batch))
    own_per_s = 1000 * len(trace.requests) / trace.span_ms
    full = bearable_per_s(trace, config, hit_ratio=0.2 if trace.requests[0].blocks else 0.0)

    def run(way: Alternative, per_s: float) -> Summary:
        stream = TraceStream(trace, mix, seed=config.seed, rate=per_s / own_per_s)
        return summarize(Fleet(replace(config, alternative=way), stream).run(), slo)

    ways = (OURS, *(ALTERNATIVES[name] for name in BASELINES))
    tested = Trials(ways, run)
    for way in ways:
        for step in steps:
            tested.at(way, step * full)
        tested.narrow(way, bisections)
    knee = tested.bearable(OURS) or min(tested.rates())
    for way in (*ways, UNTOLD):
        tested.at(way, knee)
    return _study(trace, config, tested, knee)


def _study(trace: Trace, config: FleetConfig, tested: Trials, knee: float) -> Study:
    study = Study("goodput")
    where = f"{trace.name}, {config.workers} workers, {config.cost.name}"
    study.notes.extend(
        [
            f"met: complete, TTFT and mean ITL within the band's targets. The knee: the highest "
            f"tested rate at which {OURS.name} meets {KNEE_SHARE:.0%} of all requests.",
            "All ways get the same requests and targets. Deadlines (the TTFT targets) are told "
            f"to {OURS.name} alone, which drops and refuses by them; the others know none. "
            f"`{UNTOLD.name}` is what it does at the knee without them.",
        ]
    )
    for way in tested.ways:
        runs = sorted(tested.runs[way.name].items())
        words = ", ".join(f"{rate:.2f}/s {s.met_share:.1%}" for rate, s in runs)
        study.notes.append(f"{way.name} met: {words}")
        study.curves[way.name] = [(rate, s.goodput_per_s) for rate, s in runs]
    study.tables.append(_by_rate(where, tested))
    study.tables.append(_bearable(tested))
    at_knee = [tested.runs[way.name][knee] for way in (*tested.ways, UNTOLD)]
    study.tables.append(_met_by(f"Met at the knee, {knee:.2f}/s, by band", at_knee, _bands))
    study.tables.append(_met_by(f"Met at the knee, {knee:.2f}/s, by tenant", at_knee, _tenants))
    _judge(study, tested, knee)
    _note_figures(study, tested, knee)
    return study


def _by_rate(where: str, tested: Trials) -> Table:
    names = [way.name for way in tested.ways]
    made = table(
        f"Goodput by requests/s: {where}",
        "requests/s", *names, "gain", *(f"{n} met i/s/b" for n in names),
    )  # fmt: skip
    for rate in tested.rates():
        summaries = [tested.runs[name][rate] for name in names]
        best = max(s.goodput_per_s for s in summaries[1:])
        made.add_row(
            f"{rate:.2f}",
            *(f"{s.goodput_per_s:.2f}" for s in summaries),
            f"{summaries[0].goodput_per_s / max(1e-9, best):.2f}",
            *("/".join(f"{g.met_share:.0%}" for g in s.bands.values()) for s in summaries),
        )
    return made


def _bearable(tested: Trials) -> Table:
    """DistServe's figure, and the peaks."""
    made = table(
        f"Highest tested rate at which {KNEE_SHARE:.0%} are met, and the most met a second",
        "dispatch", "bearable/s", "ours is times", "peak goodput/s", "at", "ours is times",
    )  # fmt: skip
    ours, ours_peak = tested.bearable(OURS), tested.peak(OURS)[0]
    for way in tested.ways:
        rate, (peak, at) = tested.bearable(way), tested.peak(way)
        made.add_row(
            way.name,
            f"{rate:.2f}",
            f"{ours / rate:.2f}" if rate else "none",
            f"{peak:.2f}",
            f"{at:.2f}",
            f"{ours_peak / max(1e-9, peak):.2f}",
        )
    return made


def _bands(summary: Summary) -> dict[str, GroupStats]:
    return summary.bands


def _tenants(summary: Summary) -> dict[str, GroupStats]:
    return summary.tenants


def _met_by(
    title: str, summaries: Sequence[Summary], groups: Callable[[Summary], dict[str, GroupStats]]
) -> Table:
    names = sorted({name for s in summaries for name in groups(s)})
    if groups is _bands:
        names = list(groups(summaries[0]))
    made = table(title, "dispatch", "all", "goodput/s", *names)
    for s in summaries:
        shares = [groups(s)[n].met_share if n in groups(s) else 1.0 for n in names]
        made.add_row(
            s.name,
            f"{s.met_share:.1%}",
            f"{s.goodput_per_s:.2f}",
            *(f"{share:.1%}" for share in shares),
        )
    return made


def _judge(study: Study, tested: Trials, knee: float) -> None:
    """What is claimed at the knee, and that nobody pays for it at any rate."""
    ours = tested.runs[OURS.name][knee]
    for way in tested.ways[1:]:
        theirs = tested.runs[way.name][knee]
        gain = ours.goodput_per_s / max(1e-9, theirs.goodput_per_s)
        claim = f"goodput at the knee, {knee:.2f}/s, at least 1.3 times {way.name}'s: {gain:.2f}"
        study.holds[claim] = gain >= GOODPUT_GAIN_MIN
    reference = tested.ways[1]
    for rate in tested.rates():
        ours, theirs = tested.runs[OURS.name][rate], tested.runs[reference.name][rate]
        starved = [band for band, g in ours.bands.items() if g.requests and not g.complete]
        study.holds[f"{rate:.2f}/s: every band gets on {', '.join(starved)}"] = not starved
        worse = [
            tenant
            for tenant, group in ours.tenants.items()
            if group.met < NO_WORSE_SHARE * theirs.tenants[tenant].met
        ]
        claim = f"{rate:.2f}/s: no tenant does worse than with {reference.name} {', '.join(worse)}"
        study.holds[claim] = not worse


def _note_figures(study: Study, tested: Trials, knee: float) -> None:
    """Everything, for scripts."""
    ways = tested.ways
    study.figures["knee_per_s"] = knee
    study.figures["bearable_per_s"] = {way.name: tested.bearable(way) for way in ways}
    study.figures["peak_goodput_per_s"] = {way.name: tested.peak(way)[0] for way in ways}
    study.figures["at_knee"] = {
        way.name: asdict(tested.runs[way.name][knee]) for way in (*ways, UNTOLD)
    }
    study.figures["tested"] = {
        name: {f"{rate:.4f}": s.met_share for rate, s in sorted(runs.items())}
        for name, runs in tested.runs.items()
    }
    study.figures["rates"] = [
        {"per_s": rate, "runs": [asdict(tested.runs[way.name][rate]) for way in ways]}
        for rate in tested.rates()
    ]
