"""Gemma 3, text: norms before and after attention and MLP, whose weights count from one.

Source: Gemma Team, "Gemma 3 Technical Report", 2025. Values say the rest: scaled embeddings, local
layers with a window and a rotary base of their own, the scale of attention, norms of queries and
keys, GELU.
"""

from __future__ import annotations

from torch import Tensor

from headrace_worker.attention.interface import Attend
from headrace_worker.model import norms
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.decoder import Decoder
from headrace_worker.model.layers import Attention, LayerNames, Rotations, feed_forward
from headrace_worker.model.weights import Weights


class SandwichLayer:
    """A transformer block that normalizes what attention and the MLP add, too."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, names: LayerNames
    ) -> None:
        prefix, hidden = f"model.layers.{index}", (config.hidden_size,)

        def norm(name: str) -> norms.Norm:
            weight = weights.take(f"{prefix}.{name}_layernorm.weight", hidden)
            return norms.shifted(weight, config.norm_eps)

        self.attention_norm = norm("input")
        self.attention = Attention(config, weights, index, names, norms.shifted)
        self.attention_post_norm = norm("post_attention")
        self.mlp_norm = norm("pre_feedforward")
        self.mlp = feed_forward(config, weights, index, names)
        self.mlp_post_norm = norm("post_feedforward")

    def __call__(self, x: Tensor, rotations: Rotations, attend: Attend) -> Tensor:
        """x [N, hidden] → [N, hidden]."""
        mixed = self.attention(self.attention_norm(x), rotations, attend)
        x = x + self.attention_post_norm(self.attention.out(mixed))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class Gemma3(Decoder):
    """Its layers and its last norm are of Gemma's kind."""

    layer = SandwichLayer

    @staticmethod
    def last_norm(weight: Tensor, eps: float) -> norms.Norm:
        return norms.shifted(weight, eps)
