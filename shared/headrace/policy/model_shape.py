"""A model's shape as numbers: what its weights and KV weigh, whole and on a device of a split.

Invariant: counts are exact, biases and norms included, so that a model's total is the one that its
publisher states. Everything here follows from a config.json; no weight is needed. A worker makes a
shape of the configuration that it would load (`headrace_worker.describe`), so that planner and
worker cannot read a file differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from headrace.errors import ModelError
from headrace.types import BLOCK_TOKENS

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
QUANTIZATIONS = ("none", "int8", "int4")
KV_DTYPES = ("auto", "int8")
NARROW = 2048
"""int4 keeps gate and up of models narrower than this in int8, as the worker does."""

UNIT_MAX = 64
"""Columns of MLPs and rows of the vocabulary are dealt to devices in units of this many."""
UNITS_EACH = 8
"""Smaller units are dealt where a device would have fewer than so many."""

INT8_BYTES = 1 + 2 / 32
"""Per weight: one and a share of its group's scale; without native kernels scales take less."""
INT4_BYTES = 0.5 + 4 / 32
"""Per weight: a half and a share of its group's scale and zero point."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights and KV are kept. `dtype`: of activations and of what is not quantized."""

    dtype: str = "bfloat16"
    quantization: str = "none"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, tuple(ITEM_BYTES)),
            ("quantization", self.quantization, QUANTIZATIONS),
            ("kv_dtype", self.kv_dtype, KV_DTYPES),
        ):
            if value not in known:
                raise ModelError(f"{name} {value!r} is not one of {', '.join(known)}")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LayerPart:
    """Weights of one layer on one device, as counts. `plain`: never quantized."""

    qkv: int
    out: int
    gate_up: int
    down: int
    plain: int

    @property
    def values(self) -> int:
        return self.qkv + self.out + self.gate_up + self.down + self.plain


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer; see the worker's ModelConfig for what the fields mean.

    `expert_layers` are the layers whose MLP is a mixture of `experts` of `expert_size` columns, of
    which a token goes to `experts_per_token`. `windows`: tokens seen by layer, 0 for all; empty
    where every layer sees all. `norms`: of hidden size, in each layer.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    tied: bool
    windows: tuple[int, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    expert_layers: tuple[int, ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0

    def facts(self) -> dict[str, Any]:
        """As what JSON can hold; `of_facts` reads it."""
        return asdict(self)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> ModelShape:
        """Raises ModelError for facts that `facts` did not make."""
        names = {field.name for field in fields(cls)}
        if set(facts) != names:
            odd = ", ".join(sorted(names ^ set(facts)))
            raise ModelError(f"a model's shape has other fields than these: {odd}")
        lists = {"windows": tuple(facts["windows"]), "expert_layers": tuple(facts["expert_layers"])}
        return cls(**{**facts, **lists})

    # --- counts

    @property
    def embedding_values(self) -> int:
        return self.vocab_size * self.hidden_size

    def kv_heads_on(self, tensor: int) -> int:
        """KV heads that the fullest of `tensor` devices holds: its run, or one that others hold."""
        return -(-self.kv_heads // tensor)

    def heads_on(self, tensor: int) -> int:
        """Query heads on the fullest device: those of its KV heads, or its share of one's."""
        if tensor <= self.kv_heads:
            return self.kv_heads_on(tensor) * (self.heads // self.kv_heads)
        return -(-self.heads // tensor)

    def columns_on(self, tensor: int) -> int:
        """An MLP's inner columns on the fullest device."""
        largest = min(UNIT_MAX, self.intermediate_size & -self.intermediate_size)
        return _fullest(self.intermediate_size, tensor, largest)

    def vocab_on(self, tensor: int) -> int:
        """Rows of the vocabulary on the fullest device."""
        return _fullest(self.vocab_size, tensor, UNIT_MAX)

    def experts_on(self, tensor: int) -> int:
        """Experts of a layer on the fullest device."""
        return -(-self.experts // tensor)

    def layer_part(self, layer: int, tensor: int = 1) -> LayerPart:
        """What one of `tensor` devices holds of a layer, the fullest one where they differ."""
        hidden, dim = self.hidden_size, self.head_dim
        q, kv = self.heads_on(tensor) * dim, 2 * self.kv_heads_on(tensor) * dim
        plain = self.norms * hidden
        plain += 2 * dim if self.qk_norm else 0
        plain += (q + kv) * self.qkv_bias + hidden * self.out_bias
        if layer in self.expert_layers:
            inner = self.experts_on(tensor) * self.expert_size
            plain += self.experts * hidden  # the router is everywhere
        else:
            inner = self.columns_on(tensor)
            plain += (2 * inner + hidden) * self.mlp_bias
        return LayerPart(hidden * (q + kv), q * hidden, 2 * hidden * inner, hidden * inner, plain)

    @property
    def parameters(self) -> int:
        """All weights; an output head that is the embedding counts once."""
        layers = sum(self.layer_part(i).values for i in range(self.layers))
        head = 0 if self.tied else self.embedding_values
        return self.embedding_values + layers + self.hidden_size + head

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: embedding rows left out, the head counted."""
        return sum(self.layer_active(i) for i in range(self.layers)) + self.embedding_values

    def layer_active(self, layer: int, tensor: int = 1) -> int:
        """Weights of a layer on one of `tensor` devices that a token is multiplied with."""
        part = self.layer_part(layer, tensor)
        if layer not in self.expert_layers:
            return part.values
        experts = part.gate_up + part.down
        return part.values - experts + 3 * self._routed_inner(tensor) * self.hidden_size

    def layer_cost(self, layer: int) -> int:
        """What the workers' pipelines weigh a layer by: its matrices, of experts those of a token.

        In the same unit the output head costs as many as the vocabulary times the hidden size.
        """
        part = self.layer_part(layer)
        if layer not in self.expert_layers:
            return part.values - part.plain
        routed = 3 * self.experts_per_token * self.expert_size + self.experts
        return part.qkv + part.out + routed * self.hidden_size

    def _routed_inner(self, tensor: int) -> int:
        return -(-self.experts_per_token * self.expert_size // tensor)

    def experts_touched(self, tokens: int) -> float:
        """Of a layer's experts, how many `tokens` reach on average if all are as likely."""
        missed = (1 - self.experts_per_token / self.experts) ** tokens
        return self.experts * (1 - missed)

    # --- bytes

    def layer_bytes(self, layer: int, tensor: int, how: Precision) -> int:
        """What a layer's weights take on one of `tensor` devices."""
        part = self.layer_part(layer, tensor)
        return int(part.plain * how.item_bytes + self._linear_bytes(part, how))

    def _linear_bytes(self, part: LayerPart, how: Precision) -> float:
        linear = part.values - part.plain
        if how.quantization == "none":
            return linear * how.item_bytes
        if how.quantization == "int8":
            return linear * INT8_BYTES
        eight = part.qkv + (part.gate_up if self.hidden_size < NARROW else 0)
        return eight * INT8_BYTES + (linear - eight) * INT4_BYTES

    def layer_read_bytes(self, layer: int, tensor: int, how: Precision, tokens: int) -> int:
        """What a step over `tokens` tokens reads of them: of experts, those that are reached."""
        whole = self.layer_bytes(layer, tensor, how)
        if layer not in self.expert_layers:
            return whole
        part = self.layer_part(layer, tensor)
        experts = self._linear_bytes(LayerPart(0, 0, part.gate_up, part.down, 0), how)
        return int(whole - experts * (1 - self.experts_touched(tokens) / self.experts))

    def embedding_bytes(self, tensor: int, how: Precision) -> int:
        return self.vocab_on(tensor) * self.hidden_size * how.item_bytes

    def head_bytes(self, tensor: int, how: Precision) -> int:
        """The output head's own copy of what it multiplies with."""
        each = how.item_bytes if how.quantization == "none" else INT8_BYTES
        return int(self.vocab_on(tensor) * self.hidden_size * each)

    def kv_layer_bytes(self, tensor: int, how: Precision) -> int:
        """One token's keys and values of one layer on one of `tensor` devices."""
        numbers = 2 * self.kv_heads_on(tensor)
        if how.kv_dtype == "int8":
            return numbers * (self.head_dim + how.item_bytes)
        return numbers * self.head_dim * how.item_bytes

    def seen_tokens(self, layer: int, held: int) -> int:
        """How many of a sequence's `held` tokens the layer's newest row attends to."""
        window = self.windows[layer] if self.windows else 0
        return min(held, window) if window else held


def _fullest(total: int, parts: int, unit: int) -> int:
    """The longest of `parts` runs of `total`, dealt in units: halved while a run has too few."""
    while unit > 1 and total < unit * parts * UNITS_EACH:
        unit //= 2
    units = -(-total // unit)
    return min(total, -(-units // parts) * unit)


def whole_blocks(tokens: int) -> int:
    """`tokens` rounded down to whole blocks."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS
