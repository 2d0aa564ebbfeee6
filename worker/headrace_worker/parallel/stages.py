"""Which layers each stage of a pipeline holds.

Invariant: each stage has a layer at least, and the dearest stage is as cheap as whole layers allow:
it sets the pace, as all others wait for it. A layer costs what a token multiplies with in it; the
output head, which comes to the last stage besides, as much. With a vocabulary of 49,152 and a
hidden size of 576, that is eight of SmolLM2's layers. Rejected: equal counts, by which the last
stage of such a model takes half as long again; timing layers at the start, which costs every start
seconds and makes the split depend on what else the machine did then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from headrace_worker.model.config import ModelConfig
from headrace_worker.parallel.shape import Part, Shape, part_of


def parts_of(config: ModelConfig, shape: Shape) -> list[Part]:
    """What each rank holds of a model; every rank comes to the same. Raises ModelError."""
    layers = split(config, shape.pipeline) if shape.pipeline <= config.layers else None
    return [part_of(config, shape, rank, layers) for rank in range(shape.ranks)]


def vocab_runs(parts: Sequence[Part]) -> list[range]:
    """Which tokens the head of each tensor rank of the last stage knows."""
    return [part.vocab for part in parts if part.last]


def costs_of(config: ModelConfig) -> list[int]:
    """Of each layer: how many weights a token is multiplied with."""
    inner = config.hidden_size * config.head_dim
    attention = inner * 2 * (config.heads + config.kv_heads)
    dense = 3 * config.hidden_size * config.intermediate_size
    e = config.experts
    if e is None:
        return [attention + dense] * config.layers
    routed = config.hidden_size * (3 * e.per_token * e.intermediate_size + e.count)
    mixed = set(e.layers)
    return [attention + (routed if i in mixed else dense) for i in range(config.layers)]


def split(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each of `stages` stages."""
    head = config.vocab_size * config.hidden_size
    return split_costs(costs_of(config), stages, head)


def split_costs(costs: Sequence[int], stages: int, head: int) -> list[range]:
    """Runs of layers of these `costs`; the last stage has `head` to do besides.

    Of equally good splits the one whose last stages are the shortest. The linear partition problem
    (Skiena, "The Algorithm Design Manual", 8.5), by bisecting what a stage may cost.
    """
    assert 0 < stages <= len(costs), "each stage has a layer"
    low, high = max(costs), sum(costs) + head
    while low < high:
        middle = (low + high) // 2
        if _filled(costs, stages, head, middle) is None:
            low = middle + 1
        else:
            high = middle
    found = _filled(costs, stages, head, low)
    assert found is not None, "all costs together are enough for a stage"
    return found


def _filled(costs: Sequence[int], stages: int, head: int, limit: int) -> list[range] | None:
    """Stages that take as much as `limit` allows, the first ones first; None if too much is left.

    A stage stops early where later ones would be left without a layer.
    """
    sums = [0, *accumulate(costs)]
    runs, start = [], 0
    for later in range(stages - 1, 0, -1):
        stop = start + 1
        while stop < len(costs) - later and sums[stop + 1] - sums[start] <= limit:
            stop += 1
        runs.append(range(start, stop))
        start = stop
    fits = all(sums[run.stop] - sums[run.start] <= limit for run in runs)
    if not fits or sums[-1] - sums[start] + head > limit:
        return None
    return [*runs, range(start, len(costs))]
