"""Small workers, jobs and fleets for the stories of the simulator."""

from __future__ import annotations

from array import array

from headrace.policy.cost_model import CostModel
from headrace.types import Band, Job, Sampling
from headrace_sim.kv_cache import PrefixBlock
from headrace_sim.sequence import SimSequence

SMALL = CostModel(
    step_ms=5.0,
    prefill_token_ms=0.25,
    decode_row_ms=0.5,
    decode_context_ms=0.125,
    prefill_context_ms=0.5,
    kv_tokens=4_096,
    max_jobs=8,
    step_tokens=256,
    name="small",
)
"""Few jobs, little KV; its terms are exact in binary, so that sums are as well."""


def job(
    id: str,
    prompt: int,
    output: int,
    *,
    band: Band = Band.STANDARD,
    arrived_ms: int = 0,
    tenant: str = "t0",
    virtual: float = 0.0,
) -> Job:
    return Job(
        id=id,
        model="m",
        tenant=tenant,
        band=band,
        arrived_ms=arrived_ms,
        gateway="g",
        prompt=array("I", bytes(4 * prompt)),
        sampling=Sampling(max_tokens=output),
        virtual=virtual,
    )


def sequence(
    id: str, prompt: int, output: int, blocks: tuple[PrefixBlock, ...] = (), **facts: object
) -> SimSequence:
    return SimSequence(job(id, prompt, output, **facts), output, blocks)  # type: ignore[arg-type]
