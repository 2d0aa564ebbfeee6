"""What the commands share: one-line errors, where things lie, and the file of a running fleet.

Nothing heavy is imported here or at the top of a command: `headrace --help` must be instant.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from headrace.errors import HeadraceError, SettingsError

P = ParamSpec("P")
R = TypeVar("R")

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)i?b?", re.IGNORECASE)
_ROLES = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


class CommandError(HeadraceError):
    """A command cannot do what it was asked; the message is all that the user needs."""

    code = "command_failed"


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Errors raised on purpose become one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except HeadraceError as error:
            print(f"headrace: {error.message}", file=sys.stderr)
            raise typer.Exit(1) from error

    return run


def data_dir_default() -> Path:
    """`headrace` in the user's data directory (XDG)."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "headrace"


DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADRACE_DATA_DIR",
        help="Where accepted requests are kept. Default: ~/.local/share/headrace.",
    ),
]


def data_dir_of(given: Path | None) -> Path:
    return (given or data_dir_default()).expanduser().resolve()


def parse_size(text: str) -> int:
    """Bytes from `4096`, `256M`, `2GiB`: powers of 1024. Raises SettingsError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise SettingsError(f"{text!r} is not a size: write it like 4096, 256M or 2G")
    return int(match[1]) << (10 * " kmgt".index(match[2].lower() or " "))


def parse_roles(text: str) -> tuple[int, int]:
    """How many compute prompts and how many decode, from `2:1`. Raises SettingsError."""
    match = _ROLES.fullmatch(text.strip())
    if not match:
        raise SettingsError(f"{text!r} is no split of roles: write it like 1:1 or 2:6")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True)
class RunFile:
    """What a running `headrace up` leaves in its data directory for the other commands."""

    pid: int
    redis_url: str
    http_url: str
    model: str
    started_ms: int
    processes: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Atomically; readable by this user only, as the URL may hold a password."""
        part = folder / "run.json.part"
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file, indent=2)
        part.replace(place(folder))

    @classmethod
    def read(cls, folder: Path) -> RunFile | None:
        """The fleet that runs on `folder`, or None. What a killed one left does not count."""
        try:
            facts = cls(**json.loads(place(folder).read_text()))
            os.kill(facts.pid, 0)
        except (OSError, ValueError, TypeError):
            return None
        return facts


def place(folder: Path) -> Path:
    return folder / "run.json"
