"""The gateway's settings, from `HEADRACE_…` variables.

Invariant: every limit that a client can run into has a name here. API keys are parsed by
`tenants.py`, not by a validator of this model, so that a start-up message never prints one.
"""

from __future__ import annotations

import secrets

from pydantic import Field, field_validator

from headrace.cache_directory import AUTO
from headrace.config import ServiceSettings
from headrace.errors import SettingsError
from headrace.frames import parse_address
from headrace_gateway.policy.admission import AdmissionLimits


def _new_gateway_id() -> str:
    return f"gw-{secrets.token_hex(4)}"


class GatewaySettings(ServiceSettings):
    """Where the gateway listens, who may call it, and how much of it."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535, description="0 takes a free port")
    gateway_id: str = Field(
        default_factory=_new_gateway_id,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="names this incarnation; two gateways never share one",
    )
    api_keys: str = Field(
        default="",
        repr=False,
        description="`key`, `key:tenant` or `key:tenant:band+band`, comma separated, or `@file` "
        "with one a line; empty lets everyone in as tenant `default`. Behind an entry, after "
        "spaces: `weight=` (the tenant's share), `requests_per_minute=`, `tokens_per_minute=` and "
        "`concurrency=` of the key, over all gateways; `prompt_entries=` and `sharing_group=` of "
        "the tenant; `admin=true` for a key that administers the cache",
    )

    prompt_entries: bool = Field(
        default=False,
        description="tenants that do not say (`prompt_entries=`) get deterministic requests "
        "answered with what was answered before, and share what is being computed",
    )
    cache_url: str = Field(
        default="",
        description="the cache service, tcp://host:port or unix:///path, several with commas, or "
        "`auto` for those that Redis knows; empty: none, so that nothing is kept between requests "
        "and nothing can be administered",
    )
    cache_timeout_ms: int = Field(
        default=200, ge=1, description="a lookup that takes longer is a miss"
    )

    queue_jobs_max: int = Field(
        default=1_024,
        ge=1,
        description="waiting jobs of one model; batch fills 60 %, standard 80 %",
    )
    queue_work_max: int = Field(
        default=4_000_000, ge=1, description="uncached prompt and expected output tokens, likewise"
    )
    live_jobs_max: int = Field(
        default=4_096, ge=1, description="unfinished jobs of one model at this gateway, likewise"
    )
    wait_interactive_ms_max: int = Field(
        default=10_000, ge=1, description="a longer predicted wait refuses the band's requests"
    )
    wait_standard_ms_max: int = Field(default=60_000, ge=1)
    wait_batch_ms_max: int = Field(default=600_000, ge=1)

    body_bytes_max: int = Field(default=4 * 1024 * 1024, ge=1_024, le=16 * 1024 * 1024)
    body_read_ms: int = Field(default=30_000, ge=100)
    prompts_max: int = Field(default=16, ge=1, le=256, description="prompts in one completion")
    jobs_max: int = Field(default=32, ge=1, le=1_024, description="prompts times choices")

    keepalive_ms: int = Field(
        default=10_000, ge=10, description="an SSE comment goes out after this much silence"
    )
    write_ms: int = Field(
        default=30_000, ge=100, description="a client that takes nothing for so long is gone"
    )
    drain_ms: int = Field(
        default=30_000, ge=0, description="how long running streams may go on after SIGTERM"
    )

    websockets_max: int = Field(default=1_024, ge=1)
    ws_lanes_max: int = Field(default=16, ge=1, description="busy lanes of one connection")
    ws_queue_max: int = Field(default=64, ge=1, description="turns waiting in one connection")
    ws_heartbeat_ms: int = Field(default=20_000, ge=100)

    @field_validator("cache_url")
    @classmethod
    def _check_addresses(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",") if name.strip()]
        try:
            for name in [] if names == [AUTO] else names:
                parse_address(name)
        except SettingsError as error:
            raise ValueError(error.message) from error
        return ",".join(names)

    @property
    def admission(self) -> AdmissionLimits:
        """What admission goes by."""
        return AdmissionLimits(
            queue_jobs_max=self.queue_jobs_max,
            queue_work_max=self.queue_work_max,
            live_jobs_max=self.live_jobs_max,
            wait_ms_max=(
                self.wait_interactive_ms_max,
                self.wait_standard_ms_max,
                self.wait_batch_ms_max,
            ),
        )
