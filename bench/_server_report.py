"""From turns to medians, ratios, a table and a picture.

Invariant: a ratio is formed within a round, where both servers were given the same texts minutes
apart, and the median of those is told, with the least and the greatest: a slow quarter of an hour
of the machine then moves both sides. Only what is in the turns is told, so that a file of them can
be reported again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUSY_SHARE_MAX = 0.03
"""Of the machine's CPU time, used by others while a workload ran: beyond it a report says so."""

CELL = 17
"""Columns of a table: a figure, and how many times the baseline's it is."""

Turn = Mapping[str, Any]
"""What one server did with one workload in one round: `round`, `server`, `workload`, figures."""


@dataclass(frozen=True)
class Metric:
    """A figure of a turn, and how a table's head calls it."""

    key: str
    label: str
    digits: int = 1


METRICS = (
    Metric("output_tok_s", "out tok/s"),
    Metric("all_tok_s", "in+out tok/s"),
    Metric("ttft_p50_ms", "TTFT p50 ms", 0),
    Metric("ttft_p99_ms", "p99", 0),
    Metric("itl_p50_ms", "ITL p50 ms"),
    Metric("itl_p99_ms", "p99"),
    Metric("itl_mean_ms", "mean"),
    Metric("cpu_s_per_1k", "CPU s/1k out", 2),
    Metric("peak_mib", "peak MiB", 0),
)
FIGURES = (
    ("output_tok_s", "", "output tokens/s"),
    ("ttft_p50_ms", "ttft_p99_ms", "TTFT ms: • p50, – p99"),
    ("itl_p50_ms", "itl_p99_ms", "ITL ms: • p50, – p99"),
    ("cpu_s_per_1k", "", "CPU s / 1,000 output tokens"),
    ("peak_mib", "", "peak memory MiB"),
)


@dataclass(frozen=True)
class Spread:
    """A figure over rounds: median, least, greatest; NaN of nothing."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        kept = list(values)
        if not kept:
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(kept), min(kept), max(kept))


def order(names: Sequence[str], round_number: int) -> list[str]:
    """Who goes when in a round, from 0 on: one place further each time, so that no one is always
    first after a pause or last on a warm machine."""
    start = round_number % len(names)
    return [*names[start:], *names[:start]]


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def figure_of(turns: Sequence[Turn], workload: str, server: str, key: str) -> dict[int, float]:
    """By round, where there is one."""
    return {
        t["round"]: t[key]
        for t in turns
        if t["workload"] == workload and t["server"] == server and key in t
    }


def ratio(turns: Sequence[Turn], workload: str, server: str, base: str, key: str) -> Spread:
    """`server`'s figure over `base`'s, of rounds that have both."""
    mine, theirs = (figure_of(turns, workload, name, key) for name in (server, base))
    return Spread.of(mine[r] / theirs[r] for r in mine if theirs.get(r))


def summary(turns: Sequence[Turn], base: str) -> dict[str, Any]:
    """Workload → server → figure → median, least, most, ratio to `base` and its spread."""
    found: dict[str, Any] = {}
    for workload in unique(t["workload"] for t in turns):
        for server in unique(t["server"] for t in turns if t["workload"] == workload):
            row = found.setdefault(workload, {}).setdefault(server, {})
            for metric in METRICS:
                values = Spread.of(figure_of(turns, workload, server, metric.key).values())
                to_base = ratio(turns, workload, server, base, metric.key)
                if not math.isnan(values.median):
                    row[metric.key] = {
                        "median": values.median,
                        "least": values.least,
                        "most": values.most,
                    }
                if not math.isnan(to_base.median):
                    row[metric.key] |= {
                        "ratio": to_base.median,
                        "ratio_least": to_base.least,
                        "ratio_most": to_base.most,
                    }
    return found


# --- for people


def table(turns: Sequence[Turn], base: str, says: Mapping[str, str]) -> str:
    """A block for each workload: medians, and behind each how many times `base`'s it is."""
    blocks = []
    for workload, rows in summary(turns, base).items():
        wide = max(map(len, rows)) + 2
        heads = [f"{metric.label:>{CELL - 5}}     " for metric in METRICS]
        lines = [f"{workload}: {says.get(workload, '')}", " " * wide + "".join(heads)]
        for server, row in rows.items():
            cells = [_cell(row.get(metric.key), metric.digits) for metric in METRICS]
            lines.append(f"{server:<{wide}}" + "".join(cells))
        for server, row in rows.items():
            told = row.get("output_tok_s", {})
            if server != base and "ratio" in told:
                lines.append(
                    f"  {server} / {base}: {told['ratio']:.2f} times the tokens/s "
                    f"({told['ratio_least']:.2f} to {told['ratio_most']:.2f} by round)"
                )
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *doubts(turns)])


def _cell(figure: Mapping[str, float] | None, digits: int) -> str:
    if figure is None:
        return f"{'–':>{CELL - 5}}     "
    shown = f"x{figure['ratio']:.2f}" if "ratio" in figure else ""
    return f"{figure['median']:>{CELL - 6},.{digits}f} {shown:<5}"


def doubts(turns: Sequence[Turn]) -> list[str]:
    """What speaks against the figures."""
    found = []
    for turn in turns:
        where = f"! {turn['workload']}, {turn['server']}, round {turn['round'] + 1}:"
        if turn.get("failed"):
            found.append(f"{where} {turn['failed']} requests failed: {turn.get('failures')}")
        if turn.get("prompt_tokens_off"):
            off = turn["prompt_tokens_off"]
            found.append(f"{where} its prompts were {off} tokens off, over all requests")
        if turn.get("cached_tokens") and not turn.get("shares"):
            found.append(f"{where} {turn['cached_tokens']} tokens of unique prompts were cached")
        if turn.get("others_share", 0) > BUSY_SHARE_MAX:
            found.append(f"{where} others had {turn['others_share']:.0%} of the machine")
    return ["\n".join(found)] if found else []


def draw(turns: Sequence[Turn], path: Path) -> None:
    """A row for each of FIGURES, a column for each workload, a place for each server, into a PNG.

    Raises SettingsError where matplotlib is missing.
    """
    from headrace_sim.plots import load_pyplot

    pyplot = load_pyplot()
    workloads, servers = (unique(t[key] for t in turns) for key in ("workload", "server"))
    size = (max(7.0, 2.6 * len(workloads)), 2.3 * len(FIGURES) + 0.5)
    figure, axes = pyplot.subplots(
        len(FIGURES), len(workloads), figsize=size, squeeze=False, layout="constrained"
    )
    colors = pyplot.get_cmap("tab10").colors
    for column, workload in enumerate(workloads):
        axes[0][column].set_title(workload)
        for row, (key, far, label) in enumerate(FIGURES):
            axis = axes[row][column]
            shown = [
                (place, colors[place % len(colors)], near, beyond)
                for place, server in enumerate(servers)
                if (near := _over_rounds(turns, workload, server, key)) is not None
                for beyond in [_over_rounds(turns, workload, server, far)]
            ]
            _ranges(axis, shown) if far else _bars(axis, shown)
            axis.set_xticks([])
            axis.set_xlim(-0.6, len(servers) - 0.4)
            axis.grid(axis="y", alpha=0.3)
            if column == 0:
                axis.set_ylabel(label, fontsize=9)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[i % 10]) for i in range(len(servers))]
    figure.legend(handles, servers, loc="outside upper center", ncols=min(5, len(servers)))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_Shown = tuple[int, Any, Spread, Spread | None]
"""A server's place and color, a figure over the rounds, and the one that goes beyond it."""


def _over_rounds(turns: Sequence[Turn], workload: str, server: str, key: str) -> Spread | None:
    found = Spread.of(figure_of(turns, workload, server, key).values())
    return None if math.isnan(found.median) else found


def _bars(axis: Any, shown: Sequence[_Shown]) -> None:
    """Medians as bars, their spread over rounds as lines."""
    for place, color, value, _ in shown:
        axis.bar(place, value.median, width=0.8, color=color)
        if value.most > value.least:
            spread = [[value.median - value.least], [value.most - value.median]]
            axis.errorbar(place, value.median, yerr=spread, color="black", capsize=3, linewidth=1)
        _write(axis, place, value.most, value.median)
    axis.set_ylim(0, 1.18 * max((value.most for _, _, value, _ in shown), default=0.0) or 1.0)


def _ranges(axis: Any, shown: Sequence[_Shown]) -> None:
    """A dot for the p50, a dash for the p99, on a logarithmic axis: they lie far apart."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    for place, color, near, far in shown:
        axis.plot([place], [near.median], "o", color=color, markersize=7)
        _write(axis, place, near.median, near.median, below=True)
        if far is not None:
            axis.plot([place, place], [near.median, far.median], color=color, linewidth=1.5)
            axis.plot([place - 0.25, place + 0.25], [far.median] * 2, color=color, linewidth=2.5)
            _write(axis, place, far.median, far.median)
    values = [v.median for _, _, near, far in shown for v in (near, far) if v is not None]
    if values:
        axis.set_ylim(max(min(values), 1e-3) / 2, 2 * max(*values, 1e-3))


def _write(axis: Any, place: int, height: float, value: float, *, below: bool = False) -> None:
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    axis.annotate(
        text,
        (place, height),
        xytext=(0, -7 if below else 3),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        fontsize=7,
    )
