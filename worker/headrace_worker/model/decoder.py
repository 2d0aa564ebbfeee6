"""A decoder-only transformer: embedding, layers, norm, output head.

Invariant: building one takes all weights; there is no empty state. A family is a subclass that says
what its layers are and what its checkpoints call them; the rest is values in ModelConfig.

A decoder may be one stage of a pipeline: then its config counts that stage's layers, and only the
first stage has the embedding, only the last one the norm and the head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from headrace_worker.attention.interface import Attend
from headrace_worker.model import norms
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.layers import Layer, LayerKind, LayerNames
from headrace_worker.model.rope import Angles
from headrace_worker.model.weights import Weights


class Decoder:
    """What all families are. `dtype`: of embeddings and activations.

    `first`, `last`: whether it has the embedding, the norm and the head.
    """

    layer: ClassVar[LayerKind] = Layer
    names: ClassVar[LayerNames] = LayerNames()

    def __init__(
        self, config: ModelConfig, weights: Weights, *, first: bool = True, last: bool = True
    ) -> None:
        self.config = config
        self.first, self.last = first, last
        hidden = config.hidden_size
        embedding = None
        if first or (last and config.tied):
            embedding = weights.embedding("model.embed_tokens.weight", (config.vocab_size, hidden))
        self.embedding = embedding
        self.layers = [self.layer(config, weights, i, self.names) for i in range(config.layers)]
        if last:
            norm = weights.take("model.norm.weight", (hidden,))
            self.norm = self.last_norm(norm, config.norm_eps)
            self.head = (
                weights.linear(["lm_head"], [config.vocab_size], hidden)
                if embedding is None or not config.tied
                else weights.tied_head(embedding.table)
            )
        self.dtype = weights.dtype
        # rounded to the model's dtype before it multiplies, as the reference does
        scale = torch.tensor(config.embedding_scale).to(self.dtype)
        self.embedding_scale = None if config.embedding_scale == 1 else scale
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
        x = self.through(self.embed(tokens), positions, attend)
        return self.logits(x, rows)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer takes, [N, hidden]."""
        assert self.embedding is not None, "the first stage embeds"
        x = self.embedding(tokens)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def through(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x [N, hidden] through all layers that are here."""
        rotations = [angles(positions) for angles in self.angles]
        for layer in self.layers:
            x = layer(x, rotations, attend)
        return x

    def logits(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """float32 [M, vocab] of `rows` of the last layer's x."""
        if rows is not None:
            x = x[rows]
        return self.head(self.norm(x)).float()
