"""Which model families GGUF files hold, and what llama.cpp calls their tensors.

Invariant: a place says all that tells a stored tensor from the Hugging Face checkpoint's: its name,
the order of its rows, a shift of its values, which expert of a stack it is. The conventions are
those of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from headrace.errors import ModelError
from headrace_worker.loading.gguf_reader import GgufTensor

EXPERTS_MAX = 4096


class Order(Enum):
    """How the rows of a matrix stand in the file."""

    PLAIN = auto()
    QUERY_PAIRS = auto()
    """Each query head's rows as interleaved rotary pairs, where Hugging Face has halves."""
    KEY_PAIRS = auto()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the Hugging Face checkpoint stands: in `tensor`, or one expert of it."""

    tensor: GgufTensor
    expert: int | None = None
    order: Order = Order.PLAIN
    shift: float = 0.0
    """What was added to its values when the file was written."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]


@dataclass(frozen=True, slots=True)
class Family:
    """`kind` is Hugging Face's model_type; `experts` holds the names of gate, up and down."""

    kind: str
    layer: Mapping[str, str]
    paired: bool = False
    shifted_norms: bool = False
    experts: Mapping[str, str] | None = None


_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _LAYER, paired=True),
    "smollm3": Family("smollm3", _LAYER, paired=True),
    "qwen2": Family("qwen2", _LAYER),
    "qwen3": Family("qwen3", _LAYER | _QK_NORMS),
    "qwen3moe": Family(
        "qwen3_moe",
        _LAYER | _QK_NORMS | {"ffn_gate_inp": "mlp.gate"},
        experts={
            "ffn_gate": "mlp.experts.{}.gate_proj",
            "ffn_up": "mlp.experts.{}.up_proj",
            "ffn_down": "mlp.experts.{}.down_proj",
        },
    ),
    "gemma3": Family("gemma3_text", _LAYER | _QK_NORMS | _SANDWICH_NORMS, shifted_norms=True),
    "phi3": Family("phi3", _LAYER | _FUSED),
}
"""By `general.architecture`. Mistral's files say llama, and so do Mixtral's."""

MIXTRAL = Family(
    "mixtral",
    _LAYER | {"ffn_gate_inp": "block_sparse_moe.gate"},
    paired=True,
    experts={
        "ffn_gate": "block_sparse_moe.experts.{}.w1",
        "ffn_up": "block_sparse_moe.experts.{}.w3",
        "ffn_down": "block_sparse_moe.experts.{}.w2",
    },
)

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_TABLES = frozenset({ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS})
"""Rotary tables: they are part of the model's shape."""


def family(name: str, experts: int) -> Family:
    """The family of `general.architecture` = `name`. Raises ModelError with the known ones."""
    if name not in FAMILIES:
        raise ModelError(
            f"architecture {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}",
            code="architecture",
        )
    if experts > EXPERTS_MAX:
        raise ModelError(f"{experts} experts are more than the {EXPERTS_MAX} that are read")
    if not experts:
        return FAMILIES[name]
    found = MIXTRAL if name == "llama" else FAMILIES[name]
    if found.experts is None:
        raise ModelError(f"{name} with {experts} experts is not supported", code="architecture")
    return found


def places(of: Family, tensors: Iterable[GgufTensor], experts: int) -> dict[str, Place]:
    """Every tensor under Hugging Face's name; an unknown one keeps its own, for a later refusal.

    Raises ModelError for a stack of another number of experts, and for two tensors of one name.
    """
    found: dict[str, Place] = {}
    for tensor in tensors:
        if tensor.name in _TABLES or ".attn_rot_embd." in tensor.name:
            continue
        for name, place in _placed(of, tensor, experts):
            if name in found:
                raise ModelError(f"tensor {name} stands twice in the file")
            found[name] = place
    return found


def _placed(of: Family, tensor: GgufTensor, experts: int) -> Iterator[tuple[str, Place]]:
    stem, _, suffix = tensor.name.rpartition(".")
    if stem in _TOP:
        shift = 1.0 if of.shifted_norms and stem.endswith("_norm") else 0.0
        yield f"{_TOP[stem]}.{suffix}", Place(tensor, shift=shift)
        return
    parts = stem.split(".")
    prefix = f"model.layers.{parts[1]}" if len(parts) > 2 and parts[0] == "blk" else ""
    part = parts[2] if prefix else ""
    if prefix and len(parts) == 3 and part in of.layer:
        yield f"{prefix}.{of.layer[part]}.{suffix}", _layer_place(of, part, tensor)
    elif prefix and of.experts and part.removesuffix("_exps") in of.experts:
        of_expert = f"{prefix}.{of.experts[part.removesuffix('_exps')]}.{suffix}"
        if len(parts) == 4:  # files of before 2024 have each expert on its own
            yield of_expert.format(parts[3]), Place(tensor)
            return
        if len(tensor.shape) != 3 or tensor.shape[0] != experts:
            raise ModelError(
                f"tensor {tensor.name} has shape {list(tensor.shape)}, not one of {experts} experts"
            )
        for expert in range(experts):
            yield of_expert.format(expert), Place(tensor, expert)
    else:
        yield tensor.name, Place(tensor)


def _layer_place(of: Family, part: str, tensor: GgufTensor) -> Place:
    orders = {"attn_q": Order.QUERY_PAIRS, "attn_k": Order.KEY_PAIRS} if of.paired else {}
    shift = 1.0 if of.shifted_norms and part.endswith("_norm") else 0.0
    return Place(tensor, order=orders.get(part, Order.PLAIN), shift=shift)
