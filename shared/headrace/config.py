"""Settings: one frozen model per service, read from `HEADRACE_…` variables.

Invariant: a bad value stops start-up and names the variable. Each service adds its own fields in
its own `settings.py`.
"""

from __future__ import annotations

import sys
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from headrace.errors import SettingsError

PREFIX = "HEADRACE_"


class ServiceSettings(BaseSettings):
    """What every service has."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    redis_url: str = "redis://127.0.0.1:6379/0"
    otlp_endpoint: str = Field(
        default="", description="base URL of an OTLP/HTTP receiver; empty switches tracing off"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False
    debug: bool = Field(
        default=False, description="check the integrity of what holds state whenever it is idle"
    )


S = TypeVar("S", bound=BaseSettings)


def load(kind: type[S], **overrides: Any) -> S:
    """The settings from the environment. Raises SettingsError naming each bad variable."""
    try:
        return kind(**overrides)
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{'_'.join(str(part) for part in e['loc']).upper()}: {e['msg']}"
            + (f" (got {e['input']!r})" if e["type"] != "missing" else "")
            for e in error.errors()
        )
        raise SettingsError(problems) from error


def load_or_exit(kind: type[S]) -> S:
    """`load`, for a service's `main`: a bad value is said on stderr and ends the process."""
    try:
        return load(kind)
    except SettingsError as error:
        print(f"headrace: bad setting: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error
