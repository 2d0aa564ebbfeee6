"""Pictures of runs: how TTFT and ITL are distributed per band, service over time, goodput curves.

Invariant: drawn from records alone, so that every way to dispatch is drawn alike. matplotlib is
asked for only here, as nothing else of Headrace needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.errors import SettingsError
from headrace.types import Band
from headrace_sim.fleet import Fleet
from headrace_sim.metrics import Outcome

POINTS_MAX = 400


def load_pyplot() -> Any:
    """matplotlib for files alone. Raises SettingsError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise SettingsError(
            "plots need matplotlib: pip install matplotlib, or do without --plot"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def need_matplotlib() -> None:
    """Raises SettingsError now rather than after minutes of simulation."""
    load_pyplot()


def draw_runs(fleets: Sequence[Fleet], path: Path) -> None:
    """TTFT and mean ITL per band as cumulative shares, a column for each band, into a PNG."""
    pyplot = load_pyplot()
    bands = sorted({band for fleet in fleets for band in fleet.records.band})
    figure, axes = pyplot.subplots(
        2, len(bands), figsize=(5 * len(bands), 7), squeeze=False, layout="constrained"
    )
    for column, band in enumerate(bands):
        for fleet in fleets:
            records = fleet.records
            rows = [
                row
                for row in range(len(records))
                if records.band[row] == band and records.outcome[row] == Outcome.COMPLETE
            ]
            name = fleet.config.alternative.name
            _cumulative(axes[0][column], [records.ttft_ms[row] for row in rows], name)
            _cumulative(axes[1][column], [records.itl_ms(row) for row in rows], name)
        axes[0][column].set_title(Band(band).label)
        axes[0][column].set_xlabel("TTFT (ms)")
        axes[1][column].set_xlabel("mean ITL (ms)")
    axes[0][0].set_ylabel("share of complete requests")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cumulative(axis: Any, values: list[float], name: str) -> None:
    values = sorted(value for value in values if value > 0)
    if not values:
        return
    step = max(1, len(values) // POINTS_MAX)
    kept = values[::step]
    axis.plot(kept, [(n * step + 1) / len(values) for n in range(len(kept))], label=name)
    axis.set_xscale("log")
    axis.grid(alpha=0.3)


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    x: str,
    y: str,
    title: str,
) -> None:
    """Named lines of (x, y) into a PNG."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name, points in curves.items():
        axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
