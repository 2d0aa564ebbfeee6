"""A decoder-only transformer: embedding, layers, norm, output head.

Invariant: building one takes all weights; there is no empty state. A family is a subclass that says
what its layers are and what its checkpoints call them; the rest is values in ModelConfig.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from headrace_worker.attention.interface import Attend
from headrace_worker.model import norms
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.layers import Layer, LayerKind, LayerNames
from headrace_worker.model.rope import Angles
from headrace_worker.model.weights import Weights


class Decoder:
    """What all families are. `dtype`: of embeddings and activations."""

    layer: ClassVar[LayerKind] = Layer
    names: ClassVar[LayerNames] = LayerNames()

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        embedding = weights.take(
            "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
        )
        self.dtype = embedding.dtype
        self.embedding = embedding
        # rounded to the model's dtype before it multiplies, as the reference does
        scale = torch.tensor(config.embedding_scale).to(self.dtype)
        self.embedding_scale = None if config.embedding_scale == 1 else scale
        self.layers = [self.layer(config, weights, i, self.names) for i in range(config.layers)]
        self.norm = self.last_norm(
            weights.take("model.norm.weight", (config.hidden_size,)), config.norm_eps
        )
        self.head = (
            weights.tied_head(embedding)
            if config.tied
            else weights.linear(["lm_head"], [config.vocab_size], config.hidden_size)
        )
        self.angles = [Angles(rope, config.context_tokens, self.dtype) for rope in config.ropes]

    @staticmethod
    def last_norm(weight: Tensor, eps: float) -> norms.Norm:
        """The norm before the output head, of the family's kind."""
        return norms.plain(weight, eps)

    def __call__(
        self, tokens: Tensor, positions: Tensor, rows: Tensor | None, attend: Attend
    ) -> Tensor:
        """Logits, float32 [M, vocab], of the M sampled `rows` (None: all N).

        tokens, positions: int64 [N]. Keys and values are written through `attend`.
        """
        x = functional.embedding(tokens, self.embedding)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        rotations = [angles(positions) for angles in self.angles]
        for layer in self.layers:
            x = layer(x, rotations, attend)
        if rows is not None:
            x = x[rows]
        return self.head(self.norm(x)).float()
