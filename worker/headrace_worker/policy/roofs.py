"""What a step touches and multiplies, and how fast it could be at most on a machine.

Invariant: a ceiling is a bound of what is counted here alone: weights once a step in the format in
which they are kept, KV once, products of matrices and of attention. A step takes at least as long
as reading takes, and as multiplying takes (Williams et al., "Roofline", 2009). What is read again,
rounded, moved or waited for is what a measured step is behind its ceiling by.
Rejected: the planner's figures from data sheets (`headrace.policy.limits`): here both rates are
what this machine was seen to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.policy.model_shape import ModelShape, Precision

ATTENTION_FLOPS = 4
"""Per number of a query and token that it sees: two for q · k, two for what is mixed."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What numbers take here: all layers' weights, the head's, one token's KV in one layer."""

    layers_bytes: int
    head_bytes: int
    kv_layer_bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of step: `rows` decode after `held` tokens each, or a prompt's first `chunk`."""

    name: str
    rows: int = 0
    held: int = 0
    chunk: int = 0

    @property
    def tokens(self) -> int:
        """How many a step computes."""
        return self.rows + self.chunk


@dataclass(frozen=True, slots=True)
class Work:
    """What one step has to do at least."""

    weight_bytes: float
    kv_bytes: float
    flops: float

    @property
    def size_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Ceiling:
    """At most so many tokens a second, because of `by`."""

    tokens_per_s: float
    by: str


def work_of(shape: ModelShape, kept: Kept, phase: Phase) -> Work:
    """One step of `phase`. A prompt's chunk and each decoding row go through the head once."""
    share = _experts_share(shape, phase.tokens)
    weights = kept.layers_bytes * share + kept.head_bytes
    seen, attended = 0, 0.0
    for layer in range(shape.layers):
        held = shape.seen_tokens(layer, phase.held + 1)
        seen += phase.rows * held + phase.chunk
        attended += phase.rows * held + _pairs(phase.chunk, shape.seen_tokens(layer, phase.chunk))
    active = sum(shape.layer_active(layer) for layer in range(shape.layers))
    heads = phase.rows + min(1, phase.chunk)
    flops = 2.0 * phase.tokens * active + 2.0 * heads * shape.embedding_values
    flops += ATTENTION_FLOPS * shape.heads * shape.head_dim * attended
    return Work(weights, seen * kept.kv_layer_bytes, flops)


def _pairs(chunk: int, window: int) -> float:
    """Of queries and keys in a prompt's first `chunk` tokens, each seeing at most `window`."""
    return window * (window + 1) / 2 + (chunk - window) * window


def _experts_share(shape: ModelShape, tokens: int) -> float:
    """How much of the layers' weights a step over `tokens` reads: not all experts are reached."""
    how = Precision()
    whole = sum(shape.layer_bytes(layer, 1, how) for layer in range(shape.layers))
    read = sum(shape.layer_read_bytes(layer, 1, how, tokens) for layer in range(shape.layers))
    return read / whole


def ceiling(work: Work, tokens: int, bandwidth: float, flops_per_s: float) -> Ceiling:
    """`bandwidth` in bytes a second. What a step's `tokens` cannot exceed."""
    reading_s, multiplying_s = work.size_bytes / bandwidth, work.flops / flops_per_s
    if reading_s >= multiplying_s:
        return Ceiling(tokens / reading_s, "memory bandwidth")
    return Ceiling(tokens / multiplying_s, "arithmetic")
