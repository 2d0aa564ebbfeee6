"""The limits of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import SettingsError
from headrace.types import BLOCK_TOKENS
from headrace_worker.attention.choice import AttentionName
from headrace_worker.kv.pool import KvDtype
from headrace_worker.policy.scheduler import CALM_MS


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. Raises SettingsError for a combination that cannot work.

    `kv_tokens`: tokens of KV kept in memory. `max_running`: sequences computed at a time.
    `step_tokens_max`: tokens computed in one step; prompts of lower bands take `lower_prefill_ms`
    of it, while a better band is here or was within the last `calm_ms`. `step_stretch`: how many
    times as long as without prompts a step of streams may take, 0 for any time. `offer_blocks`:
    offer KV blocks to a cache service. `speculation`: guess tokens where that is faster.
    `kv_dtype`: how keys and values are kept, "auto" as the model computes. `attention`: the
    backend.
    """

    kv_tokens: int
    max_running: int = 64
    step_tokens_max: int = 512
    lower_prefill_ms: int = 100
    calm_ms: int = CALM_MS
    step_stretch: float = 0.0
    offer_blocks: bool = True
    speculation: bool = True
    kv_dtype: KvDtype = "auto"
    attention: AttentionName = "auto"

    def __post_init__(self) -> None:
        if self.kv_tokens < 2 * BLOCK_TOKENS:
            raise SettingsError(f"kv_tokens = {self.kv_tokens} is below {2 * BLOCK_TOKENS}")
        if not 0 < self.max_running <= self.step_tokens_max:
            raise SettingsError(
                f"max_running = {self.max_running} has to be from 1 to step_tokens_max = "
                f"{self.step_tokens_max}: each running sequence needs a token a step"
            )
