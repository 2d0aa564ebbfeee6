"""A run from its description to its figures, and several ways to dispatch side by side.

Invariant: every alternative gets the same requests at the same times from the same seed; only the
dispatcher, the order in its workers and admission differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.types import Band
from headrace_sim.alternatives import Alternative
from headrace_sim.fleet import Fleet, FleetConfig
from headrace_sim.metrics import PERCENTILES, Outcome, Slo, Summary, by_group, fairness, group_stats
from headrace_sim.workload import Stream


def summarize(fleet: Fleet, slo: Slo, tenants_max: int = 32) -> Summary:
    """The figures of a run; tenants: those with most requests."""
    records = fleet.records
    bands = {
        Band(band).label: group_stats(records, rows, slo)
        for band, rows in sorted(by_group(records.band).items())
    }
    names = {n: name for name, n in records.tenants.items()}
    tenants = sorted(by_group(records.tenant).items(), key=lambda each: -len(each[1]))
    first = min(records.arrived_ms, default=0.0)
    span_s = max(1e-3, (max(records.end_ms, default=0.0) - first) / 1000)
    busy = [worker.busy_ms for worker in fleet.workers.values()]
    complete = [row for row in range(len(records)) if records.outcome[row] == Outcome.COMPLETE]
    prompt = sum(records.prompt_tokens[row] for row in complete)
    counts = [sum(o == outcome for o in records.outcome) for outcome in Outcome]
    met = sum(group.met for group in bands.values())
    return Summary(
        name=fleet.config.alternative.name,
        workers=len(fleet.workers),
        requests=len(records),
        span_s=span_s,
        complete=counts[Outcome.COMPLETE],
        refused=counts[Outcome.REFUSED],
        late=counts[Outcome.LATE],
        too_long=counts[Outcome.TOO_LONG],
        goodput_per_s=met / span_s,
        met_share=met / max(1, len(records)),
        output_per_s=sum(records.output_tokens) / span_s,
        input_per_s=prompt / span_s,
        hit_ratio=sum(records.cached_tokens[row] for row in complete) / max(1, prompt),
        utilisation=sum(busy) / 1000 / span_s / len(busy),
        work_max_over_mean=_unevenness(
            [worker.prefill_tokens + worker.output_tokens for worker in fleet.workers.values()]
        ),
        busy_max_over_mean=_unevenness(busy),
        preemptions=sum(worker.scheduler.preemptions for worker in fleet.workers.values()),
        fairness=fairness(fleet.service, tenants_max),
        bands=bands,
        tenants={
            names[tenant]: group_stats(records, rows, slo) for tenant, rows in tenants[:tenants_max]
        },
        itl_ms={
            Band(band).label: {f"p{p}": fleet.gaps.percentile(band, p) for p in PERCENTILES}
            for band in sorted(set(records.band))
        },
        refusals=dict(sum((g.refusals for g in fleet.gateways), Counter()).most_common()),
    )


def _unevenness(loads: Sequence[float]) -> float:
    """The largest over the mean."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) > 0 else 1.0


def compare(
    config: FleetConfig,
    alternatives: Sequence[Alternative],
    stream: Callable[[], Stream],
    told: Callable[[str], None] = lambda _line: None,
) -> list[Fleet]:
    """A run of each alternative over what `stream` makes anew for each."""
    fleets = []
    for alternative in alternatives:
        told(alternative.name)
        fleets.append(Fleet(replace(config, alternative=alternative), stream()).run())
    return fleets
