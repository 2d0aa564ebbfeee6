"""What of a model divides over devices, and how its layers divide over a pipeline's stages.

Invariant: a split that is not refused here leaves every device something of every layer of its
stage; each refusal names the numbers. It is the rule of the worker's ranks: KV heads are dealt in
runs with their query heads, or replicated evenly; experts, an MLP's columns and the vocabulary's
rows are dealt in runs. Runs may differ by a unit: then the fullest device counts, and sets the
pace. Rejected: refusing what does not divide evenly, which leaves 3 KV heads no second device.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.policy.model_shape import ModelShape


def tensor_refusal(shape: ModelShape, tensor: int) -> str | None:
    """Why the model cannot be split over `tensor` devices; None where it can."""
    sharing, copies = shape.heads // shape.kv_heads, tensor // shape.kv_heads
    if tensor > shape.kv_heads and (tensor % shape.kv_heads or sharing % copies):
        fits = [n for n in range(1, shape.heads + 1) if heads_divide(shape, n)]
        return (
            f"{shape.heads} heads over {tensor} devices: {_why_heads(shape, tensor)}; "
            f"what works: {', '.join(map(str, fits))}"
        )
    if shape.experts and shape.experts < tensor:
        return f"{shape.experts} experts over {tensor} devices: some would hold none"
    dense = len(shape.expert_layers) < shape.layers
    if dense and shape.intermediate_size < tensor:
        return f"MLPs of {shape.intermediate_size} columns over {tensor} devices"
    if shape.vocab_size < tensor:
        return f"a vocabulary of {shape.vocab_size} tokens over {tensor} devices"
    return None


def heads_divide(shape: ModelShape, tensor: int) -> bool:
    """Whether each of `tensor` devices gets query heads together with the KV head they use."""
    if tensor <= shape.kv_heads:
        return True
    sharing = shape.heads // shape.kv_heads
    return not tensor % shape.kv_heads and not sharing % (tensor // shape.kv_heads)


def _why_heads(shape: ModelShape, tensor: int) -> str:
    if tensor % shape.kv_heads:
        return (
            f"its {shape.kv_heads} KV heads would be held {tensor} / {shape.kv_heads} times each, "
            f"which leaves {tensor % shape.kv_heads} over"
        )
    copies, sharing = tensor // shape.kv_heads, shape.heads // shape.kv_heads
    return (
        f"{copies} devices for each of {shape.kv_heads} KV heads would share its {sharing} query "
        f"heads, which leaves {sharing % copies} over"
    )


def pipeline_refusal(shape: ModelShape, pipeline: int) -> str | None:
    """Why the model cannot be split into `pipeline` stages; None where it can."""
    if shape.layers < pipeline:
        return f"{shape.layers} layers over {pipeline} stages: some would have none"
    return None


def unevenness(shape: ModelShape, tensor: int) -> list[str]:
    """Where the fullest device holds more than its share, in words."""
    told = []
    if tensor <= shape.kv_heads and shape.kv_heads % tensor:
        told.append((shape.kv_heads_on(tensor), shape.kv_heads, "KV heads"))
    if shape.experts % tensor:
        told.append((shape.experts_on(tensor), shape.experts, "experts"))
    return [
        f"{whole} {what} over {tensor} devices: the fullest holds {most} and sets the pace"
        for most, whole, what in told
    ]


def replication(shape: ModelShape, tensor: int) -> int:
    """How many of `tensor` devices hold the same KV head."""
    return max(1, tensor // shape.kv_heads)


def split_layers(costs: Sequence[int], stages: int, *, head: int = 0) -> list[range]:
    """`costs` of the layers, in runs, so that the dearest stage is as cheap as it can be.

    `head` is what comes to the last stage besides. Every stage gets a layer. Of equal splits the
    one whose first stages are longest. The linear partition problem (Skiena, "The Algorithm Design
    Manual", 8.5), solved by bisecting what a stage may cost.
    """
    assert 0 < stages <= len(costs), "each stage has a layer"
    low, high = max(costs), sum(costs) + head
    while low < high:
        middle = (low + high) // 2
        if _filled(costs, stages, head, middle) is None:
            low = middle + 1
        else:
            high = middle
    runs = _filled(costs, stages, head, low)
    assert runs is not None, "what everything costs is enough for a stage"
    return runs


def _filled(costs: Sequence[int], stages: int, head: int, limit: int) -> list[range] | None:
    """Stages filled in order up to `limit` each; None where the last one does not hold the rest."""
    runs, start = [], 0
    for stage in range(stages - 1):
        stop, spent = start, 0
        last = len(costs) - (stages - 1 - stage)  # each later stage gets a layer
        while stop < last and (stop == start or spent + costs[stop] <= limit):
            spent += costs[stop]
            stop += 1
        if spent > limit:
            return None
        runs.append(range(start, stop))
        start = stop
    return [*runs, range(start, len(costs))] if sum(costs[start:]) + head <= limit else None
