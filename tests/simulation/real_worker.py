"""The worker's own scheduler in the simulator's time: the slow truth that SimWorker is held to."""

from __future__ import annotations

from headrace.policy.cost_model import CostModel, attended
from headrace.policy.priority import TARGET_MS
from headrace.types import BLOCK_TOKENS
from headrace_sim.scheduler import LOWER_PREFILL_MS
from headrace_worker.policy.blocks import BlockPool
from headrace_worker.policy.pace import STRETCH, Pace
from headrace_worker.policy.plan import Plan
from headrace_worker.policy.scheduler import Scheduler
from headrace_worker.policy.sequence import Sequence
from simulation.builders import BLOCK, Arrival, End


def serve_really(cost: CostModel, load: list[Arrival]) -> dict[str, End]:
    """`load` on the real scheduler, each of whose steps takes what `cost` says."""
    pool = BlockPool(cost.kv_tokens // BLOCK_TOKENS)
    pace = Pace(STRETCH)
    scheduler = Scheduler(
        pool, running_max=cost.max_jobs, step_tokens_max=cost.step_tokens, pace=pace
    )
    ends: dict[str, End] = {}
    coming, now = list(load), 0.0
    while coming or scheduler.waiting or scheduler.running:
        if not scheduler.waiting and not scheduler.running:
            now = max(now, coming[0].at_ms)
        while coming and coming[0].at_ms <= now:
            scheduler.add(_sequence(coming.pop(0), len(load) - len(coming)))
        lower = pace.tokens_within(LOWER_PREFILL_MS)
        plan = scheduler.schedule(now, lower_prefill_tokens=lower)
        took_ms = _duration_ms(plan, cost)
        prompts = sum(item.count for item in plan.items if item.count > 1)
        pace.note(prompts, sum(item.count == 1 for item in plan.items), took_ms)
        now += took_ms
        for outcome in scheduler.apply(plan, [[7] if i.samples else [] for i in plan.items]):
            if outcome.ending:
                ended = outcome.sequence
                cached = len(ended.cached_blocks or ()) * BLOCK_TOKENS
                ends[ended.id] = End(now, cached, ended.preemptions)
    return ends


def _sequence(arrival: Arrival, order: int) -> Sequence:
    shared = [block * BLOCK + n for block, size in arrival.blocks for n in range(size)]
    own = [10**7 + order * 10**4 + n for n in range(arrival.prompt - len(shared))]
    return Sequence(
        arrival.id,
        shared + own,
        root=b"root",
        tokens_max=arrival.prompt + arrival.output,
        band=arrival.band,
        due_ms=int(arrival.at_ms) + TARGET_MS[arrival.band],
        arrived_ms=int(arrival.at_ms),
        added_ms=arrival.at_ms,
        order=order,
    )


def _duration_ms(plan: Plan, cost: CostModel) -> float:
    prefill = rows = context = 0
    pairs = 0.0
    for item in plan.items:
        if item.sequence.output_tokens and item.count == item.sequence.pending == 1:
            rows, context = rows + 1, context + item.sequence.known
        else:
            prefill += item.count
            pairs += attended(item.start, item.count)
    return cost.step_duration_ms(prefill, rows, context, pairs)
