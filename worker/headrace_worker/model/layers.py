"""Layers that families share: attention with its projections, the gated MLP, the pre-norm block.

Sources: Ainslie et al., "GQA", 2023; Shazeer, "GLU Variants Improve Transformer", 2020.

Invariant: a layer knows nothing of sequences. It gets N tokens in a row; who attends to whom is the
attention backend's business. The weights of q, k, v and of gate, up are one multiplication each.

None of these is an nn.Module: at batch 1 a step is hundreds of small operations, and a module's
wrapped calls and attribute look-ups cost a twentieth of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headrace_worker.attention.interface import Attend
from headrace_worker.model import norms, rope
from headrace_worker.model.config import NO_ROPE, Activation, ModelConfig
from headrace_worker.model.experts import Experts
from headrace_worker.model.linear import Linear
from headrace_worker.model.weights import Weights

Rotations = Sequence[tuple[Tensor, Tensor]]
"""Cosines and sines of a step's positions, by rotary table."""

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class LayerNames:
    """What a family's checkpoints call a layer's matrices, below `model.layers.N.`."""

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    expert_gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"


def stacked(
    weights: Weights,
    prefix: str,
    names: tuple[str, ...],
    outs: Sequence[int],
    columns: int,
    *,
    bias: bool,
) -> Linear:
    """One Linear over matrices of `outs` rows, whether a checkpoint has them apart or as one."""
    rows = outs if len(names) == len(outs) else [sum(outs)]
    return weights.linear([f"{prefix}.{name}" for name in names], rows, columns, bias=bias)


class Attention:
    """Rotary grouped-query attention of one layer, its output projection kept apart."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        index: int,
        names: LayerNames,
        norm: norms.NormKind,
    ) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.heads, self.head_dim = config.heads, config.head_dim
        self.rotated_heads = config.heads + config.kv_heads
        self.all_heads = config.heads + 2 * config.kv_heads
        q_size, kv_size = config.heads * self.head_dim, config.kv_heads * self.head_dim
        self.qkv = stacked(
            weights,
            prefix,
            names.qkv,
            [q_size, kv_size, kv_size],
            config.hidden_size,
            bias=config.qkv_bias,
        )
        self.out = weights.linear(
            [f"{prefix}.{names.out}"], [config.hidden_size], q_size, bias=config.out_bias
        )
        self.qk_norm = self._qk_norm(config, weights, prefix, norm) if config.qk_norm else None
        self.rope = config.rope_of(index)
        whole = self.rope == NO_ROPE or config.ropes[self.rope].rotated == self.head_dim
        self.rotate = rope.rotate if whole else rope.rotate_part

    def _qk_norm(
        self, config: ModelConfig, weights: Weights, prefix: str, norm: norms.NormKind
    ) -> norms.Norm:
        rows = [
            weights.take(f"{prefix}.self_attn.{name}_norm.weight", (self.head_dim,)).expand(
                heads, -1
            )
            for name, heads in (("q", config.heads), ("k", config.kv_heads))
        ]
        return norm(torch.cat(rows), config.norm_eps)

    def __call__(self, x: Tensor, rotations: Rotations, attend: Attend) -> Tensor:
        """x [N, hidden] → [N, heads * head_dim], what `out` takes."""
        qkv = self.qkv(x).view(-1, self.all_heads, self.head_dim)
        qk = qkv[:, : self.rotated_heads]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if self.rope != NO_ROPE:
            cos, sin = rotations[self.rope]
            qk = self.rotate(qk, cos, sin)
        return attend(
            self.index, qk[:, : self.heads], qk[:, self.heads :], qkv[:, self.rotated_heads :]
        )


class Mlp:
    """The gated MLP. A Linear to its caller."""

    def __init__(
        self, config: ModelConfig, weights: Weights, prefix: str, names: LayerNames
    ) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = stacked(
            weights, prefix, names.gate_up, [inner, inner], hidden, bias=config.mlp_bias
        )
        self.down = weights.linear(
            [f"{prefix}.{names.down}"], [hidden], inner, bias=config.mlp_bias
        )
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down.added(self.activation(gate) * up, residual)


def feed_forward(
    config: ModelConfig, weights: Weights, index: int, names: LayerNames
) -> Mlp | Experts:
    """The layer's mixture of experts where it has one, else its MLP."""
    prefix = f"model.layers.{index}"
    e = config.experts
    if e is None or index not in e.layers:
        return Mlp(config, weights, prefix, names)
    return Experts(
        e,
        weights,
        config.hidden_size,
        ACTIVATIONS[config.activation],
        router=f"{prefix}.{names.router}",
        experts=f"{prefix}.{names.experts}",
        gate_up=names.expert_gate_up,
        down=names.expert_down,
    )


class LayerKind(Protocol):
    """How a family builds a layer."""

    def __call__(
        self, config: ModelConfig, weights: Weights, index: int, names: LayerNames, /
    ) -> Callable[[Tensor, Rotations, Attend], Tensor]:
        """The layer: (x [N, hidden], rotations, attend) → [N, hidden]."""
        ...


class Layer:
    """One transformer block of the common kind: a norm before attention and before the MLP."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, names: LayerNames
    ) -> None:
        prefix, hidden, eps = f"model.layers.{index}", (config.hidden_size,), config.norm_eps
        self.attention_norm = norms.plain(
            weights.take(f"{prefix}.input_layernorm.weight", hidden), eps
        )
        self.attention = Attention(config, weights, index, names, norms.plain)
        self.mlp_norm = norms.plain(
            weights.take(f"{prefix}.post_attention_layernorm.weight", hidden), eps
        )
        self.mlp = feed_forward(config, weights, index, names)

    def __call__(self, x: Tensor, rotations: Rotations, attend: Attend) -> Tensor:
        """x [N, hidden] → [N, hidden]."""
        attention = self.attention
        x = attention.out.added(attention(self.attention_norm(x), rotations, attend), x)
        return self.mlp.added(self.mlp_norm(x), x)
