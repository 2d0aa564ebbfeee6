"""What computes an engine's steps, and where their KV lies: this process, or several ranks.

Invariant: an engine sees blocks and steps, whatever holds and computes them; what cannot work
together is refused here, before anything is allocated.
"""

from __future__ import annotations

from headrace.errors import SettingsError
from headrace_worker.attention.choice import Wanted, make_attention
from headrace_worker.engine_config import EngineConfig
from headrace_worker.executor import Executor, Steps
from headrace_worker.kv.traffic import Kv
from headrace_worker.loading import LoadedModel
from headrace_worker.parallel.ranks import Ranks


def machine_of(
    loaded: LoadedModel, blocks: int, config: EngineConfig, ranks: Ranks | None
) -> tuple[Kv, Steps]:
    """Where KV lies and who computes. Raises SettingsError."""
    wanted = Wanted(blocks, config.kv_dtype, config.attention, config.max_running)
    if ranks is not None:
        if config.attention == "flash" and ranks.share_memory:
            raise SettingsError(
                "HEADRACE_ATTENTION=flash: these ranks share their KV in the host's memory, where "
                "flash-attn does not read; HEADRACE_RANK_LINKS=torch lets each keep its own"
            )
        return ranks.open(loaded, wanted), ranks
    machine = make_attention(loaded.model, loaded.config, loaded.dtype, wanted, loaded.device)
    steps = Executor(loaded.model, machine.backend, loaded.device, machine.graphs)
    return machine.pool, steps
