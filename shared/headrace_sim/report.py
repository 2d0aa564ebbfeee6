"""Figures for people and for scripts: tables on a console, JSON in a file.

Invariant: both say the same and nothing is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from headrace_sim.metrics import GroupStats, Summary

REASONS_MAX = 6
"""For which requests were refused, of each way to dispatch."""


def table(title: str, *columns: str) -> Table:
    """An empty table in the house's look; the first column is text, the others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        made.add_column(name, no_wrap=index == 0, justify="right" if index else "left")
    return made


@dataclass(slots=True)
class Study:
    """What came of a study. `holds`: each claim with whether it held."""

    name: str
    tables: list[Table] = field(default_factory=list)
    holds: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def show(summaries: Sequence[Summary], console: Console) -> None:
    """A line for each way to dispatch, then its bands, then the tenants of the first."""
    console.print(_overview(summaries))
    console.print(_bands(summaries))
    if any(summary.refusals for summary in summaries):
        console.print(_refusals(summaries))
    if len(summaries[0].tenants) > 1:
        console.print(_tenants(summaries[0]))


def _overview(summaries: Sequence[Summary]) -> Table:
    first = summaries[0]
    made = table(
        f"{first.requests} requests on {first.workers} workers",
        "dispatch", "goodput/s", "met", "refused", "late", "out tok/s", "hit", "busy",
        "max/mean", "preempted", "Jain", "gap",
    )  # fmt: skip
    for s in summaries:
        made.add_row(
            s.name,
            f"{s.goodput_per_s:.2f}",
            f"{s.met_share:.1%}",
            str(s.refused),
            str(s.late),
            f"{s.output_per_s:,.0f}",
            f"{s.hit_ratio:.1%}",
            f"{s.utilisation:.0%}",
            f"{s.work_max_over_mean:.2f}",
            str(s.preemptions),
            f"{s.fairness.jain:.3f}",
            f"{s.fairness.gap_max:,.0f}",
        )
    return made


def _bands(summaries: Sequence[Summary]) -> Table:
    made = table(
        "Times by band (ms)",
        "dispatch", "band", "requests", "met", "refused", "TTFT p50", "p90", "p99", "ITL p50",
        "p99", "wait p99",
    )  # fmt: skip
    for s in summaries:
        for band, group in s.bands.items():
            made.add_row(s.name, band, *_group(group))
    return made


def _refusals(summaries: Sequence[Summary]) -> Table:
    made = table("Why requests were refused", "dispatch", "times", "reason")
    made.columns[-1].justify = "left"
    for s in summaries:
        for reason, times in islice(s.refusals.items(), REASONS_MAX):
            made.add_row(s.name, str(times), reason)
    return made


def _tenants(summary: Summary) -> Table:
    made = table(
        f"Tenants with {summary.name} (ms)",
        "tenant", "requests", "met", "refused", "TTFT p50", "p90", "p99", "ITL p50", "p99",
        "wait p99",
    )  # fmt: skip
    for tenant, group in summary.tenants.items():
        made.add_row(tenant, *_group(group))
    return made


def _group(group: GroupStats) -> list[str]:
    ttft, itl = group.ttft_ms, group.itl_ms
    return [
        str(group.requests),
        f"{group.met_share:.1%}",
        str(group.refused),
        *(f"{ttft[p]:,.0f}" for p in ("p50", "p90", "p99")),
        *(f"{itl[p]:,.1f}" for p in ("p50", "p99")),
        f"{group.wait_ms['p99']:,.0f}",
    ]


def write_json(path: Path, facts: dict[str, Any], summaries: Sequence[Summary]) -> None:
    """`facts` (what was simulated) and every figure."""
    whole = {**facts, "runs": [asdict(summary) for summary in summaries]}
    path.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n")
