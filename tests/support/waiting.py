"""Builders for jobs that wait in a dispatcher's queue."""

from __future__ import annotations

from headrace.types import Band, Job, Sampling, pack_tokens
from headrace_gateway.policy.fair_queue import FairQueue, Queued


def waiting(
    name: str,
    tenant: str = "t",
    band: Band = Band.STANDARD,
    *,
    arrived_ms: int = 0,
    prompt: int = 4,
    output: int = 8,
    weight: float = 1.0,
    priority: int = 0,
    cached: int = 0,
    ttft_by_ms: int = 0,
    done_by_ms: int = 0,
    logged: int = 0,
    queued_ns: int = 0,
    rescued_from: str = "",
) -> Queued:
    """A job of `prompt` tokens that is expected to make `output` tokens."""
    job = Job(
        id=name,
        model="m",
        tenant=tenant,
        band=band,
        arrived_ms=arrived_ms,
        gateway="g",
        prompt=pack_tokens(range(prompt)),
        sampling=Sampling(max_tokens=output),
        weight=weight,
        priority=priority,
        cached_tokens=cached,
        expected_tokens=output,
        ttft_by_ms=ttft_by_ms,
        done_by_ms=done_by_ms,
        logged=pack_tokens(range(logged)),
    )
    return Queued(job, "intake", "1-0", queued_ns, rescued_from)


def serve(queue: FairQueue, jobs: int = 1) -> list[str]:
    """Hand off the next `jobs` jobs, which then make what was expected; their names in order."""
    names = []
    for _ in range(jobs):
        heads = queue.heads()
        if not heads:
            break
        job = heads[0].job
        queue.take(job.id, len(job.prompt) - job.cached_tokens)
        queue.charge(job.tenant, job.weight, job.band, output_tokens=job.expected_output)
        queue.finished(job.id, job.expected_output)
        names.append(job.id)
    return names
