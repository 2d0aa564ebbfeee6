"""`headrace pull`: fetch a model into the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.common import plain_errors

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str, typer.Argument(help="Alias (smollm2), Hugging Face id (owner/name) or path.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADRACE_CACHE_DIR", help="Where models are kept. Default: ~/.cache/headrace."
    ),
]


@plain_errors
def pull(model: Model = "smollm2", cache_dir: CacheDir = None) -> None:
    """Fetch a model, so that everything else works without a network."""
    from rich.console import Console

    print(fetch(model, Console(stderr=True), cache_dir))


def fetch(model: str, console: Console, cache_dir: Path | None = None) -> Path:
    """`models.pull` with a progress bar on `console`. Raises ModelError."""
    from headrace import models

    if not console.is_terminal:
        return models.pull(model, cache_dir, _lines(console))
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    tasks = {}
    with Progress(
        TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=console
    ) as bar:

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total or None)
            bar.update(tasks[label], completed=done)

        return models.pull(model, cache_dir, show)


def _lines(console: Console) -> Callable[[str, int, int], None]:
    """A line a step, for logs: a bar that moves is for terminals."""
    said: set[str] = set()

    def show(label: str, done: int, total: int) -> None:  # noqa: ARG001  # shape of Progress
        if label not in said:
            said.add(label)
            console.print(f"{label} ({total >> 20} MiB)")

    return show
