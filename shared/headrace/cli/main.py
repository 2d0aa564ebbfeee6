"""`headrace`: the command line. One file a command; each imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace import __version__
from headrace.cli.bench import bench
from headrace.cli.cache import cache
from headrace.cli.chat import chat
from headrace.cli.plan import plan
from headrace.cli.pull import pull
from headrace.cli.simulate import simulate
from headrace.cli.status import status
from headrace.cli.up import up

app = typer.Typer(
    name="headrace",
    help="Serves large language models from a fleet of workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # its callback does the work
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Serves large language models from a fleet of workers."""


for command in (up, chat, status, pull, plan, simulate):
    app.command()(command)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")


if __name__ == "__main__":
    app()
