"""What a model's shape is, whatever file it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention.

    `rope_frequencies` are the head_dim / 2 inverse frequencies in radians per position, scaling
    applied. `tied`: the output head is the embedding matrix.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    context_tokens: int
    tied: bool
    rope_frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        if len(self.rope_frequencies) * 2 != self.head_dim:
            raise ModelError(
                f"rotary embedding over {len(self.rope_frequencies) * 2} of {self.head_dim} head "
                "dimensions is not supported: all of them only"
            )

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        kv_size = self.kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.heads * self.head_dim + kv_size)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token's keys and values over all layers are."""
        return 2 * self.layers * self.kv_heads * self.head_dim
