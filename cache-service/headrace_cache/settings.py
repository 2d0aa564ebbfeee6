"""The cache service's settings, from `HEADRACE_…` variables."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from headrace.config import ServiceSettings
from headrace.errors import SettingsError
from headrace.frames import parse_address
from headrace_cache.disk import BUDGET_BYTES_MIN
from headrace_cache.policy.names import POLICIES


class CacheSettings(ServiceSettings):
    """What the cache service needs to know.

    Anybody who can reach `cache_listen` can read and write entries: it stays on loopback unless a
    private network is around it.
    """

    cache_listen: str = Field(
        default="tcp://127.0.0.1:7700", description="tcp://host:port or unix:///path"
    )
    cache_address: str = Field(
        default="",
        description="where the fleet reaches this service, as it says so in Redis; empty: where "
        "it listens, by the machine's name if that is on all interfaces",
    )
    redis_url: str = Field(default="", description="told that this service lives; empty: nobody is")
    cache_bytes: int = Field(default=1 << 30, ge=1 << 20, description="budget for all entries")
    cache_policy: str = Field(default="keep-score", description="who leaves: keep-score, lru, …")
    cache_arena_dir: str = Field(
        default="/dev/shm",
        description="memory file system that workers of this host share; empty: none",
    )
    cache_pinned_share: float = Field(
        default=0.5, ge=0, le=1, description="of the budget, that pinned entries may take"
    )
    cache_high_watermark: float = Field(
        default=1.0, gt=0, le=1, description="share of the budget above which entries leave, ..."
    )
    cache_low_watermark: float = Field(
        default=0.98, gt=0, le=1, description="... until no more than this share is taken"
    )
    cache_disk_path: str = Field(default="", description="folder of the disk tier; empty: none")
    cache_disk_bytes: int = Field(
        default=8 << 30, ge=BUDGET_BYTES_MIN, description="budget of its files"
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Prometheus; 0 = off")

    @field_validator("cache_listen", "cache_address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        try:
            if value:
                parse_address(value)
        except SettingsError as error:
            raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _check_watermarks(self) -> CacheSettings:
        if self.cache_low_watermark > self.cache_high_watermark:
            raise ValueError("HEADRACE_CACHE_LOW_WATERMARK exceeds the high one")
        return self

    @field_validator("cache_policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"expected one of {', '.join(POLICIES)}")
        return value
