"""Small versions of the studies, and the command line around them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from headrace.cli import main
from headrace_sim import options, studies
from headrace_sim.alternatives import ALTERNATIVES, Alternative
from headrace_sim.fleet import FleetConfig
from headrace_sim.gateway import GatewayConfig
from headrace_sim.goodput import Trials
from headrace_sim.metrics import Slo, Summary
from headrace_sim.trace import Trace, TraceRequest
from headrace_sim.workload import Mix, TraceStream
from simulation.builders import ROOMY, SMALL

SLO = Slo((300, 1_000, 10_000), (60, 60, 100))


def conversations(count: int = 41, turns: int = 6, gap_ms: float = 90.0) -> Trace:
    """Conversations whose every turn begins with all of the last one, mixed with each other."""
    requests = []
    for n in range(count * turns):
        conversation, turn = n % count, n // count
        blocks = (0, *(1_000 * (conversation + 1) + k for k in range(turn + 1)))
        requests.append(TraceRequest(n * gap_ms, 64 * len(blocks) + 20, 12, blocks))
    return Trace("conversations", 64, tuple(requests))


def test_one_cache_finds_all_that_was_there_before() -> None:
    """Of a turn's blocks all but the last one were there; a small cache has forgotten them."""
    trace = conversations()
    stream = TraceStream(trace, Mix(), seed=0)
    tokens = sum(r.input_tokens for r in trace.requests)
    new = sum({b: 64 for r in trace.requests for b in r.blocks}.values())
    new += 20 * len(trace.requests)
    assert studies.one_cache(stream, 10**9) == pytest.approx(1 - new / tokens, abs=0.001)
    assert studies.one_cache(stream, 2_048) < 0.25


def test_routing_finds_nearly_what_one_cache_would_and_spreads_the_work() -> None:
    """Four workers: ours hits like one cache, round-robin cannot."""
    ways = [ALTERNATIVES[name] for name in ("headrace", "round-robin", "cache-aware")]
    config = FleetConfig(4, replace(ROOMY, kv_tokens=16_384))
    figures = studies.prefix(conversations(gap_ms=25), config, SLO, ways).figures
    ours, spread, herd = (figures[way.name] for way in ways)
    assert ours["hit_ratio"] > 0.85 * ours["one_cache"]
    assert ours["hit_ratio"] > spread["hit_ratio"] + 0.1
    assert ours["work_max_over_mean"] < 1.5 < herd["work_max_over_mean"]


def test_under_overload_more_requests_meet_their_targets_than_in_order_of_arrival() -> None:
    study = studies.goodput(conversations(60, 5), FleetConfig(2, ROOMY), SLO, steps=(1.0, 8.0))
    assert list(study.curves) == ["headrace", "fcfs", "least-loaded"]
    worst = study.figures["rates"][-1]["runs"]
    goodput = {run["name"]: run["goodput_per_s"] for run in worst}
    assert goodput["headrace"] > 1.3 * goodput["fcfs"]
    bands = worst[0]["bands"]
    assert bands["interactive"]["met_share"] > bands["batch"]["met_share"]


def test_the_knee_is_the_highest_tested_rate_that_is_borne() -> None:
    """One way bears up to 7 requests a second and another up to 3; each rate is run once."""
    limits, asked = {"headrace": 7.0, "fcfs": 3.0}, []

    def run(way: Alternative, per_s: float) -> Summary:
        asked.append((way.name, per_s))
        share = 0.95 if per_s <= limits[way.name] else 0.5
        # nothing else of a run is looked at
        return SimpleNamespace(met_share=share, goodput_per_s=share * per_s)  # type: ignore

    ways = tuple(ALTERNATIVES[name] for name in limits)
    tested = Trials(ways, run)
    for way in ways:
        for rate in (2.0, 4.0, 8.0):
            tested.at(way, rate)
        tested.narrow(way, 6)
        assert limits[way.name] - 4 / 2**6 <= tested.bearable(way) <= limits[way.name]
    assert len(set(asked)) == len(asked) == 2 * (3 + 6)
    assert tested.rates() == [2.0, 4.0, 8.0], "those that all ways were run at"
    assert tested.peak(ways[1])[0] == pytest.approx(0.5 * 8)


def test_at_the_knee_everybodys_share_is_told() -> None:
    """Ours bears what it is said to bear; the same requests for all, and who is told what."""
    study = studies.goodput(
        conversations(40, 4), FleetConfig(2, ROOMY), SLO, steps=(1.0, 8.0), bisections=3
    )
    figures = study.figures
    knee = figures["knee_per_s"]
    at_knee = figures["at_knee"]
    assert knee == figures["bearable_per_s"]["headrace"]
    assert at_knee["headrace"]["met_share"] >= 0.9
    assert set(at_knee) == {"headrace", "fcfs", "least-loaded", "headrace, no deadlines"}
    assert len(figures["tested"]["headrace"]) == 5
    requests = {
        name: [g["requests"] for g in run["bands"].values()] for name, run in at_knee.items()
    }
    assert len({tuple(counts) for counts in requests.values()}) == 1, "the same requests for all"
    assert any("told to headrace alone" in note for note in study.notes)
    titles = [str(each.title) for each in study.tables]
    assert sum("by band" in title or "by tenant" in title for title in titles) == 2


def test_adversaries_get_no_more_than_their_part() -> None:
    config = FleetConfig(1, SMALL, gateway=GatewayConfig(), gateways=2)
    study = studies.adversary(config, seconds=25)
    assert all(study.holds.values()), study.holds
    ours, fcfs = study.figures["headrace"]["shares"], study.figures["fcfs"]["shares"]
    assert ours.keys() >= {"honest-a", "honest-b", "tiny", "huge", "early"}
    assert max(fcfs.values()) > 1.5, "in order of arrival somebody gains"


def test_the_command_prints_draws_and_writes(tmp_path: Path) -> None:
    plot, file = tmp_path / "a.png", tmp_path / "a.json"
    command = ["simulate", "synthetic", "-n", "60", "--workers", "2", "--bands", "10/60/30"]
    command += ["--tenants", "a:3:1,b:1:4", "--compare", "headrace,fcfs", "--prefixes", "3:256"]
    result = CliRunner().invoke(main.app, [*command, "--plot", str(plot), "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "60 requests on 2 workers" in result.output
    assert "interactive" in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(file.read_text())["runs"]
    assert [run["name"] for run in runs] == ["headrace", "fcfs"]
    assert sum(group["requests"] for group in runs[0]["bands"].values()) == 60
    assert set(runs[0]["tenants"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.jsonl"], "cannot be read"),
        (["synthetic", "--cost", "gpu-9b"], "neither a preset"),
        (["synthetic", "--bands", "10/90"], "--bands: 3 numbers"),
        (["synthetic", "--bands", "0/0/0"], "a band mix"),
        (["synthetic", "--tenants", "a:1,a:2"], "--tenants"),
        (["synthetic", "--tenants", "0"], "--tenants"),
        (["synthetic", "--compare", "lifo"], "no way to dispatch"),
        (["synthetic", "--compare", ","], "--compare"),
        (["synthetic", "--surges", "soon"], "--surges"),
        (["synthetic", "--rate", "0"], "the rate has to be above 0"),
        (["synthetic", "--input-tokens", "x"], "--input-tokens"),
        (["synthetic", "--study", "prefix"], "replays a trace"),
        (["synthetic", "--study", "adversary", "--plot", "a.png"], "only goodput draws"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_one_line(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(main.app, ["simulate", *arguments])
    assert result.exit_code == 1
    assert told in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_without_matplotlib_a_plot_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main.app, ["simulate", "synthetic", "--plot", "a.png"])
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.output


def test_a_studys_verdicts_are_printed_and_written(tmp_path: Path) -> None:
    console, file = Console(record=True, width=140), tmp_path / "study.json"
    trace = conversations(10, 3)
    options.studies.run("prefix", trace, FleetConfig(2, ROOMY), SLO, console, None, file)
    printed = console.export_text()
    assert "of one cache" in printed
    assert "round-robin" in printed
    facts = json.loads(file.read_text())
    assert facts["study"] == "prefix"
    assert len(facts["holds"]) == 2
