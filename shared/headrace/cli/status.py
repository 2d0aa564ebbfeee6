"""`headrace status`: who serves, who waits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.common import CommandError, DataDir, RunFile, data_dir_of, plain_errors

if TYPE_CHECKING:
    from rich.table import Table

KERNELS = ("avx2", "avx512")
"""What a worker says that has them; others say why not."""

RedisUrl = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_REDIS_URL", help="Default: that of the `headrace up` on the data dir."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


@plain_errors
def status(as_json: AsJson = False, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Show workers, gateways and the queue."""
    import asyncio

    folder = data_dir_of(data_dir)
    running = RunFile.read(folder)
    url = redis_url or (running.redis_url if running else None)
    if url is None:
        raise CommandError(
            f"nothing runs on {folder}: start `headrace up`, or name a server with --redis-url"
        )
    facts = asyncio.run(_read(url))
    mine = running if running is not None and running.redis_url == url else None
    facts["http_url"] = mine.http_url if mine else None
    facts["supervisor"] = {"pid": mine.pid, "processes": mine.processes} if mine else None
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


async def _read(url: str) -> dict[str, Any]:
    from headrace import streams
    from headrace.cli.fleet import read_fleet

    try:
        redis = streams.connect(url)
    except ValueError as error:
        raise CommandError(f"{url} is not a Redis URL: {error}") from error
    try:
        return await read_fleet(redis)
    except streams.REDIS_DOWN as error:
        raise CommandError(f"Redis does not answer: {error}") from error
    finally:
        await redis.aclose()


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    if facts["http_url"]:
        console.print(f"Serving at {facts['http_url']}")
    console.print(_models(facts["models"]), _workers(facts["workers"]), _gateways(facts))
    for w in facts["workers"]:
        if w["precision"]:
            console.print(f"{w['id']}: weights and KV in {w['precision']}")
        if w["kernels"] not in ("", *KERNELS):
            console.print(f"{w['id']} computes without native kernels: {w['kernels']}")
    for problem in facts["problems"]:
        console.print(f"[red]{problem}")


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, no_wrap=index == 0)
    return table


def _models(models: list[dict[str, Any]]) -> Table:
    table = _table("Queue", "model", "interactive", "standard", "batch", "reserved KV", "leader")
    for m in models:
        queue = m["queue"] or {}
        bands = [str(queue.get(band, "–")) for band in ("interactive", "standard", "batch")]
        reserved = f"{m['reserved_tokens']}/{m['capacity_tokens']}" if m["queue"] else "–"
        leader = (m["leader"] or "none").partition(":")[0]
        table.add_row(m["name"], *bands, reserved, leader)
    return table


def _workers(workers: list[dict[str, Any]]) -> Table:
    columns = ("id", "model", "pid", "role", "state", "running", "waiting", "free KV")
    table = _table("Workers", *columns)
    for w in workers:
        free = f"{w['free_kv_tokens']}/{w['kv_tokens']}"
        numbers = (str(w["running"]), str(w["waiting"]), free)
        table.add_row(w["id"], w["model"], str(w["pid"]), w["role"], w["state"], *numbers)
    return table


def _gateways(facts: dict[str, Any]) -> Table:
    table = _table("Gateways", "id", "pid", "address")
    for g in facts["gateways"]:
        table.add_row(g["id"], str(g["pid"]), f"{g['host']}:{g['port']}")
    return table
