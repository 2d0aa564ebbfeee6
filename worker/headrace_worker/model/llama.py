"""The Llama family: RMSNorm, rotary grouped-query attention, SwiGLU.

Sources: Touvron et al., "LLaMA", 2023; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019; Ainslie et al., "GQA", 2023; Shazeer, "GLU Variants Improve Transformer",
2020.

Invariant: the model knows nothing of sequences. It gets N tokens in a row, each with its
position; who attends to whom is the attention backend's business. The weights of q, k, v and of
gate, up are fused into one multiplication each at load.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from headrace_worker.attention.interface import Attend
from headrace_worker.model import rope
from headrace_worker.model.config import ModelConfig
from headrace_worker.model.weights import Weights


class Layer:
    """One transformer block.

    Not an nn.Module: at batch 1 a step is hundreds of small operations, and a module's wrapped
    calls and attribute look-ups cost a twentieth of it.
    """

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        self.index = index
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.hidden_size, self.eps = config.hidden_size, config.norm_eps
        prefix, hidden = f"model.layers.{index}", config.hidden_size
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = weights.linear(
            [f"{prefix}.self_attn.{name}_proj" for name in "qkv"],
            [q_size, kv_size, kv_size],
            hidden,
        )
        self.out = weights.linear([f"{prefix}.self_attn.o_proj"], [hidden], q_size)
        self.gate_up = weights.linear(
            [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"],
            [config.intermediate_size] * 2,
            hidden,
        )
        self.down = weights.linear([f"{prefix}.mlp.down_proj"], [hidden], config.intermediate_size)
        self.attention_norm = weights.take(f"{prefix}.input_layernorm.weight", (hidden,))
        self.mlp_norm = weights.take(f"{prefix}.post_attention_layernorm.weight", (hidden,))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [N, hidden] → [N, hidden]."""
        shape = (self.hidden_size,)
        normed = functional.rms_norm(x, shape, self.attention_norm, self.eps)
        qkv = self.qkv(normed).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        rotated = rope.rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        mixed = attend(
            self.index,
            rotated[:, : self.heads],
            rotated[:, self.heads :],
            qkv[:, self.heads + self.kv_heads :],
        )
        x = self.out.added(mixed, x)
        normed = functional.rms_norm(x, shape, self.mlp_norm, self.eps)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return self.down.added(functional.silu(gate) * up, x)


class Llama(nn.Module):
    """Decoder with embedding and head. Building it takes all weights; there is no empty state."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        embedding = weights.take(
            "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
        )
        self.dtype = embedding.dtype
        self.embedding = embedding
        self.layers = [Layer(config, weights, i) for i in range(config.layers)]
        self.norm = weights.take("model.norm.weight", (config.hidden_size,))
        self.head = (
            weights.tied_head(embedding)
            if config.tied
            else weights.linear(["lm_head"], [config.vocab_size], config.hidden_size)
        )
        self.cos, self.sin = rope.tables(
            config.ropes[0].frequencies, config.context_tokens, self.dtype
        )

    def forward(
        self, tokens: Tensor, positions: Tensor, rows: Tensor | None, attend: Attend
    ) -> Tensor:
        """Logits, float32 [M, vocab], of the M sampled `rows` (None: all N).

        tokens, positions: int64 [N]. Keys and values are written through `attend`.
        """
        x = functional.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        if rows is not None:
            x = x[rows]
        x = functional.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.norm_eps)
        logits: Tensor = self.head(x).float()
        return logits
