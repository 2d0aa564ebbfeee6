"""`headrace simulate`: how a fleet would do, without a fleet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.cli.common import plain_errors

PIPE_COLUMNS = 140

What = Annotated[
    str,
    typer.Argument(
        metavar="TRACE|synthetic",
        help="A trace file (Mooncake JSON lines or Azure CSV), or `synthetic`.",
    ),
]
Workers = Annotated[int, typer.Option("--workers", "-w", min=1, max=10_000)]
Gateways = Annotated[
    int,
    typer.Option(min=0, max=1_000, help="0: enough for the streams of all workers, at least 2."),
]
Cost = Annotated[
    str,
    typer.Option(help="A worker's cost model: a file of `headrace bench calibrate`, or a preset "
                      "(cpu-small, gpu-8b: assumed, not measured)."),
]  # fmt: skip
RateScale = Annotated[float, typer.Option(help="Replays the trace so many times as fast.")]
Rate = Annotated[float, typer.Option(help="Synthetic requests per second.")]
Requests = Annotated[
    int | None, typer.Option("--requests", "-n", min=1, help="Repeats or cuts the trace.")
]
Tenants = Annotated[
    str,
    typer.Option(help="Tenants as name:share:weight, with commas: `a:3:1,b:1:4`; or how many."),
]
Bands = Annotated[str, typer.Option(help="Percent interactive/standard/batch.")]
Deadlines = Annotated[
    str, typer.Option(help="First token within so many ms, by band: `2000/0/0`; 0 is none.")
]
Input = Annotated[str, typer.Option(help="Synthetic prompts: mean tokens and spread, `1024:0.8`.")]
Output = Annotated[str, typer.Option(help="Synthetic outputs: mean tokens and spread, `256:0.8`.")]
Prefixes = Annotated[
    str, typer.Option(help="Synthetic shared prefixes, their number and tokens: `20:2048`.")
]
Surges = Annotated[
    str, typer.Option(help="Synthetic surges as from_s-to_s x factor: `60-90x5,120-130x10`.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same run.")]
Compare = Annotated[
    str, typer.Option(help="Ways to dispatch, with commas, or `all`. Default: ours alone.")
]
TtftSlo = Annotated[str, typer.Option(help="Target of the first token in ms, by band.")]
ItlSlo = Annotated[str, typer.Option(help="Target of the mean time between tokens in ms, by band.")]
ReportMs = Annotated[
    float, typer.Option(min=10, help="How often workers report. Longer is faster to simulate.")
]
Sessions = Annotated[
    bool, typer.Option("--sessions", help="Clients say which conversation they continue.")
]
QueueJobs = Annotated[
    int, typer.Option(min=0, help="Jobs that may wait. 0: the services' default, 1,024.")
]
Roles = Annotated[
    str,
    typer.Option(help="P:D: how many workers compute prompts and how many decode; others do both."),
]
AdaptRoles = Annotated[bool, typer.Option(help="Workers change sides as load asks for it.")]
Plot = Annotated[Path | None, typer.Option(help="Draws TTFT and ITL into a PNG.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Writes every figure.")]
Study = Annotated[
    Literal["prefix", "goodput", "adversary", "disaggregation"] | None,
    typer.Option(help="One of the studies that the docs quote, instead of a single run."),
]


@plain_errors
def simulate(
    what: What,
    workers: Workers = 16,
    gateways: Gateways = 0,
    cost: Cost = "gpu-8b",
    rate_scale: RateScale = 1.0,
    rate: Rate = 10.0,
    requests: Requests = None,
    tenants: Tenants = "1",
    bands: Bands = "0/100/0",
    deadlines: Deadlines = "0/0/0",
    input_tokens: Input = "1024:0.8",
    output_tokens: Output = "256:0.8",
    prefixes: Prefixes = "0:0",
    surges: Surges = "",
    sessions: Sessions = False,
    seed: Seed = 0,
    compare: Compare = "headrace",
    slo_ttft_ms: TtftSlo = "2000/10000/60000",
    slo_itl_ms: ItlSlo = "100/150/300",
    report_ms: ReportMs = 250.0,
    queue_jobs: QueueJobs = 0,
    roles: Roles = "",
    adapt_roles: AdaptRoles = False,
    plot: Plot = None,
    json_file: JsonFile = None,
    study: Study = None,
) -> None:
    """Replay a trace, or a synthetic load, on a simulated fleet of the services' own policies.

    How many workers does it need at three times its rate? And what do other ways make of it?

        headrace simulate trace.jsonl --rate-scale 3 --workers 24 --bands 10/60/30

        headrace simulate trace.jsonl --workers 16 --compare all --plot ways.png
    """
    from rich.console import Console

    from headrace_sim.options import Asked, run

    asked = Asked(
        what=what,
        workers=workers,
        gateways=gateways,
        cost=cost,
        rate_scale=rate_scale,
        rate=rate,
        requests=requests,
        tenants=tenants,
        bands=bands,
        deadlines=deadlines,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        prefixes=prefixes,
        surges=surges,
        sessions=sessions,
        seed=seed,
        compare=compare,
        slo_ttft_ms=slo_ttft_ms,
        slo_itl_ms=slo_itl_ms,
        report_ms=report_ms,
        queue_jobs=queue_jobs,
        roles=roles,
        adapt_roles=adapt_roles,
        plot=plot,
        json_file=json_file,
        study=study,
    )
    # tables in a file or a pipe need not fit 80 columns
    run(asked, Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS))
