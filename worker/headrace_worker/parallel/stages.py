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

from headrace.policy.splits import split_layers
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
    return split_layers(costs_of(config), stages, head=head)
