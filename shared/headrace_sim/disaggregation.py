"""The disaggregation study: prompts and streams on workers of their own, or both on each?

Definitions as in goodput.py: a request is *met* if it is complete, its first token came within its
band's TTFT target and the mean gap between its tokens was within the ITL target; a way's *bearable
rate* is the highest tested rate at which KNEE_SHARE of all requests are met. Here the ITL target is
what varies (ITL_TARGETS_MS, the same for all bands), since it is what a split buys: the *crossover*
is the laxest target at which the best split still bears more than the best fleet of workers that do
both. Those are tried with the steps that the cost model allows and with SHORT_STEPS, which trade
the first token for the gaps between the others as a split does.

Invariant: every way gets the same requests at the same times and the same number of workers; one
run of a way at a rate is judged by every target. Admission and deadlines are off, so that nobody is
better for refusing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headrace_sim.alternatives import OURS
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.goodput import KNEE_SHARE, bearable_per_s
from headrace_sim.metrics import Slo
from headrace_sim.report import Study, table
from headrace_sim.simulation import summarize
from headrace_sim.trace import Trace
from headrace_sim.workload import Mix, TraceStream

RATIOS = ((1, 3), (1, 2), (1, 1), (2, 1), (3, 1))
ITL_TARGETS_MS = (10.0, 12.5, 15.0, 17.5, 20.0, 25.0, 30.0, 40.0, 60.0, 100.0)
RATE_STEPS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5)
SHORT_STEPS = (1_024,)
OPEN = replace(OURS, refuses=False, deadlines=False)


class Way(NamedTuple):
    """A fleet: `roles` of its workers, and how many tokens a step may have (0: as modelled)."""

    name: str
    roles: tuple[int, int] = (0, 0)
    step_tokens: int = 0


class Verdict(NamedTuple):
    """Of one way at one rate by one target."""

    met_share: float
    goodput_per_s: float


@dataclass(slots=True)
class Runs:
    """What has been run: verdicts by way, rate and ITL target."""

    verdicts: dict[str, dict[float, dict[float, Verdict]]] = field(default_factory=dict)
    hits: dict[str, float] = field(default_factory=dict)

    def bearable(self, way: Way, itl_ms: float) -> float:
        """The highest tested rate that `way` bore under `itl_ms`; 0 if none."""
        rates = self.verdicts[way.name].items()
        return max((r for r, v in rates if v[itl_ms].met_share >= KNEE_SHARE), default=0.0)

    @property
    def highest(self) -> float:
        """The highest rate that was tested."""
        return max(rate for by_rate in self.verdicts.values() for rate in by_rate)


def ways_of(workers: int, ratios: Sequence[tuple[int, int]] = RATIOS) -> list[Way]:
    """Fleets of `workers`: all do both, then the splits nearest to `ratios`."""
    ways = [Way("both"), *(Way(f"both, steps of {n}", step_tokens=n) for n in SHORT_STEPS)]
    for prefill, decode in ratios:
        count = min(workers - 1, max(1, round(workers * prefill / (prefill + decode))))
        way = Way(f"{count}:{workers - count}", (count, workers - count))
        if way not in ways:
            ways.append(way)
    return ways


def disaggregation(
    trace: Trace,
    config: FleetConfig,
    slo: Slo,
    steps: Sequence[float] = RATE_STEPS,
    targets: Sequence[float] = ITL_TARGETS_MS,
) -> Study:
    """Bearable rates of splits and of workers that do both, by ITL target; see the header."""
    mix = Mix(gateways=config.gateways)
    own_per_s = 1000 * len(trace.requests) / trace.span_ms
    full = bearable_per_s(trace, config, hit_ratio=0.2 if trace.requests[0].blocks else 0.0)
    ways, runs = ways_of(config.workers), Runs()
    for way in ways:
        cost = replace(config.cost, step_tokens=way.step_tokens or config.cost.step_tokens)
        fleet = replace(config, alternative=OPEN, roles=way.roles, cost=cost)
        runs.verdicts[way.name] = {}
        for step in steps:
            per_s = step * full
            stream = TraceStream(trace, mix, seed=config.seed, rate=per_s / own_per_s)
            ran = Fleet(fleet, stream).run()
            verdicts = {}
            for itl_ms in targets:
                judged = summarize(ran, Slo(slo.ttft_ms, (itl_ms, itl_ms, itl_ms)))
                verdicts[itl_ms] = Verdict(judged.met_share, judged.goodput_per_s)
            runs.verdicts[way.name][per_s] = verdicts
            runs.hits[way.name] = judged.hit_ratio
    return _study(trace, config, slo, ways, runs, targets)


def crossover(runs: Runs, ways: Sequence[Way], targets: Sequence[float]) -> float:
    """The laxest target at which the best split bears more than the best that does both; 0: none.

    Only targets that somebody bears at all are looked at.
    """
    found = 0.0
    for itl_ms in sorted(targets):
        split, both = (_best(runs, ways, itl_ms, split=each)[0] for each in (True, False))
        if split > both:
            found = itl_ms
    return found


def _best(runs: Runs, ways: Sequence[Way], itl_ms: float, *, split: bool) -> tuple[float, str]:
    rows = [(runs.bearable(w, itl_ms), w.name) for w in ways if bool(sum(w.roles)) is split]
    return max(rows, key=lambda row: row[0])


def _shown(rate: float, highest: float) -> str:
    """A bearable rate; with a + where nothing higher was tested."""
    return f"{rate:.2f}{'+' if rate == highest else ''}" if rate else "-"


def _study(
    trace: Trace,
    config: FleetConfig,
    slo: Slo,
    ways: Sequence[Way],
    runs: Runs,
    targets: Sequence[float],
) -> Study:
    study = Study("disaggregation")
    t = config.transfer
    first = "/".join(f"{ms:g}" for ms in slo.ttft_ms)
    study.notes.append(
        f"{trace.name}, {len(trace.requests)} requests, {config.workers} workers, "
        f"{config.cost.name}. Met: complete, TTFT within {first} ms, mean ITL within the target. "
        f"A move takes {t.move_ms:g} ms and {t.per_1k_ms:g} ms for each 1,000 tokens of the last "
        "step (assumed)."
    )
    made = table(
        f"Highest tested rate/s at which {KNEE_SHARE:.0%} are met, by ITL target",
        "ITL target", *(way.name for way in ways), "best split to best that does both",
    )  # fmt: skip
    for itl_ms in targets:
        rates = [runs.bearable(way, itl_ms) for way in ways]
        split, _ = _best(runs, ways, itl_ms, split=True)
        both, _ = _best(runs, ways, itl_ms, split=False)
        gain = f"{split / both:.2f}" if both else ("only a split" if split else "nobody")
        made.add_row(f"{itl_ms:g} ms", *(_shown(rate, runs.highest) for rate in rates), gain)
        for way, rate in zip(ways, rates, strict=True):
            study.curves.setdefault(way.name, []).append((itl_ms, rate))
    study.tables.append(made)
    found = crossover(runs, ways, targets)
    study.notes.append(
        f"crossover: a split bears more up to an ITL target of {found:g} ms (of those that were "
        "tried; where both bear the highest tested rate, +, nothing can be said)"
        if found
        else "crossover: at no target does a split bear more"
    )
    study.figures["crossover_itl_ms"] = found
    study.figures["bearable_per_s"] = {
        way.name: {f"{itl:g}": runs.bearable(way, itl) for itl in targets} for way in ways
    }
    study.figures["met_share"] = {
        name: {
            f"{rate:.4f}": {f"{itl:g}": verdict.met_share for itl, verdict in by_target.items()}
            for rate, by_target in by_rate.items()
        }
        for name, by_rate in runs.verdicts.items()
    }
    study.figures["hit_ratio"] = runs.hits
    return study
