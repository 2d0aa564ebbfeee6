"""What a model's shape is, whatever file it was read from.

Invariant: a value here says what is computed, never how: two files with equal configurations and
weights give equal logits. Families differ in values where they can and in code where they must.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrace.errors import ModelError

NO_ROPE = -1
"""In `layer_ropes`: this layer's queries and keys carry no position."""


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary table: inverse frequencies in radians per position, scaling applied.

    It rotates the first 2 * len(frequencies) dimensions of a head. `factor` multiplies cosines
    and sines (the attention factor of YaRN and LongRoPE). LongRoPE has two tables: for a served
    context above `short_tokens`, `long_frequencies` take the place of `frequencies`.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    short_tokens: int = 0

    @property
    def rotated(self) -> int:
        """How many dimensions of a head it rotates."""
        return 2 * len(self.frequencies)

    def for_context(self, context_tokens: int) -> tuple[float, ...]:
        """The frequencies for a served context of this many tokens, whatever a sequence's length.

        Rejected: choosing by each sequence's length. Keys in the cache are rotated already, and
        those of a sequence that outgrows the short table would all be wrong.
        """
        long = self.long_frequencies and context_tokens > self.short_tokens
        return self.long_frequencies if long else self.frequencies


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: which layers have one, how many, how many a token goes to.

    `normalized`: the weights of a token's chosen experts are made to sum to 1. `held`: which of the
    `count` experts are here, None for all; others are on other ranks.
    """

    layers: tuple[int, ...]
    count: int
    per_token: int
    intermediate_size: int
    normalized: bool
    held: range | None = None

    @property
    def here(self) -> range:
        """The experts that are here."""
        return range(self.count) if self.held is None else self.held


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention.

    `architecture` is Hugging Face's `model_type`. `ropes` are its rotary tables, `layer_ropes` says
    which of them each layer uses (empty: all the first). `windows`: how many tokens a layer's rows
    see, themselves included, 0 for all (empty: all layers see all). `tied`: the output head is the
    embedding matrix.
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
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    attention_scale: float = 0.0
    """What q · k is multiplied with; 0 stands for 1 / sqrt(head_dim)."""
    activation: Activation = Activation.SILU
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        for rope in self.ropes:
            if not 0 < rope.rotated <= self.head_dim:
                raise ModelError(
                    f"a rotary embedding over {rope.rotated} dimensions does not fit "
                    f"heads of {self.head_dim}"
                )
        for name, values in (("layer_ropes", self.layer_ropes), ("windows", self.windows)):
            if values and len(values) != self.layers:
                raise ModelError(f"{len(values)} {name} for {self.layers} layers")
        if self.experts is not None and not 0 < self.experts.per_token <= self.experts.count:
            raise ModelError(
                f"a token cannot go to {self.experts.per_token} of {self.experts.count} experts"
            )
        if any(not NO_ROPE <= which < len(self.ropes) for which in self.layer_ropes):
            raise ModelError(f"layer_ropes names one of {len(self.ropes)} tables that is not there")

    @property
    def scale(self) -> float:
        """What q · k is multiplied with."""
        return self.attention_scale or float(self.head_dim**-0.5)

    def rope_of(self, layer: int) -> int:
        """The index of the layer's rotary table, or NO_ROPE."""
        return self.layer_ropes[layer] if self.layer_ropes else 0

    def window_of(self, layer: int) -> int:
        """How many tokens the layer's rows see; 0 for all."""
        return self.windows[layer] if self.windows else 0

    @property
    def parameters(self) -> int:
        """How many weights the model has, biases and the norms within attention left out."""
        embedding = self.vocab_size * self.hidden_size
        norms = (2 * self.layers + 1) * self.hidden_size
        routers = 0
        if self.experts is not None:
            routers = len(self.experts.layers) * self.experts.count * self.hidden_size
        return self.linear_values + embedding + norms + routers

    @property
    def linear_values(self) -> int:
        """Weights of all linear layers: attention, MLPs, experts, an output head of its own."""
        out = self.layers * self.heads * self.head_dim * self.hidden_size
        head = 0 if self.tied else self.vocab_size * self.hidden_size
        # an MLP's matrices are of one size, gate and up two of the three
        return self.qkv_values + out + self.gate_up_values * 3 // 2 + head

    @property
    def qkv_values(self) -> int:
        """Weights that make queries, keys and values."""
        return self.layers * self.hidden_size * (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def gate_up_values(self) -> int:
        """Weights of the gates and ups of all MLPs and experts."""
        width = self.layers * self.intermediate_size
        if self.experts is not None:
            e = self.experts
            width += len(e.layers) * (len(e.here) * e.intermediate_size - self.intermediate_size)
        return 2 * self.hidden_size * width

    @property
    def largest_linear_values(self) -> int:
        """Weights of the largest layer that is joined from several matrices."""
        inner = self.intermediate_size
        if self.experts is not None and len(self.experts.layers) == self.layers:
            inner = self.experts.intermediate_size
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.hidden_size * max(2 * inner, qkv)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token's keys and values over all layers are."""
        return 2 * self.layers * self.kv_heads * self.head_dim
