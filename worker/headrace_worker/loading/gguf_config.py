"""What a GGUF file's metadata says about its model, as a ModelConfig.

Invariant: the same values as Hugging Face's config.json of that model would give. What the format
does not carry has the value that llama.cpp computes with; a setting that would change the
computation and is not implemented stops the load by name. Numbers are bounded before anything is
built from them. A float of 32 bits is read as the shortest decimal that it stands for, which is
what config.json had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.errors import ModelError
from headrace_worker.loading.gguf_names import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Family,
    Place,
)
from headrace_worker.loading.source import need
from headrace_worker.model import ModelConfig, rope
from headrace_worker.model.config import NO_ROPE, Activation, Experts, Rope

SIZE_MAX = 1 << 31
HEAD_DIM_MAX = 1 << 13
_SMOLLM3_NO_ROPE_EVERY = 4
_GEMMA3_PATTERN = 6
_GEMMA3_27B_LAYERS = 62
"""The one size of Gemma 3 that scales attention by hidden / heads instead of the head's size."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.key_length_mla": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
"""Settings that would change the computation, with the values that do not."""

Table = Callable[[str], Tensor | None]
"""A rotary table of the file by its tensor's name, float32 [n]; None where it has none."""


class Facts:
    """The metadata of one model, by keys below its architecture's name."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self._where = metadata, where
        self.architecture = str(metadata.get("general.architecture"))

    def _key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str) -> Any:
        """The value, of whatever type; None where there is none. Equal ones by layer are one."""
        value = self._metadata.get(self._key(key))
        if not isinstance(value, list):
            return value
        if not value or any(entry != value[0] for entry in value):
            raise self.refused(key, "differs by layer, which is not supported")
        return value[0]

    def by_layer(self, key: str) -> list[Any] | None:
        """The value where it is one by layer."""
        value = self._metadata.get(self._key(key))
        return value if isinstance(value, list) else None

    def refused(self, key: str, why: str = "is not supported") -> ModelError:
        value = str(self._metadata.get(self._key(key)))
        return ModelError(f"{self._where}: {self._key(key)} = {value[:80]} {why}")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = SIZE_MAX
    ) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        number = need({self._key(key): value}, self._key(key), float, self._where)
        if number != number // 1 or not least <= number <= most:
            raise self.refused(key, f"is not between {least} and {most}")
        return int(number)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        number = need({self._key(key): value}, self._key(key), float, self._where)
        if not math.isfinite(number) or number <= above:
            raise self.refused(key, f"is not above {above:g}")
        return float(str(np.float32(number)))


def read_config(of: Family, facts: Facts, places: Mapping[str, Place], table: Table) -> ModelConfig:
    """The model's shape. Raises ModelError for what is missing, absurd or not supported."""
    _check_neutral(facts)
    embedding = places.get("model.embed_tokens.weight")
    if embedding is None:
        raise ModelError("the file has no tensor token_embd.weight")
    heads, hidden = facts.integer("attention.head_count"), facts.integer("embedding_length")
    head_dim = facts.integer("attention.key_length", hidden // heads, most=HEAD_DIM_MAX)
    if facts.integer("attention.value_length", head_dim) != head_dim:
        raise facts.refused("attention.value_length", f"is not the {head_dim} of the keys")
    layers = facts.integer("block_count", most=len(places))
    context = _context(facts)
    windows = _windows(of, facts, layers)
    gemma = of.kind == "gemma3_text"
    ropes, layer_ropes = _ropes(of, facts, head_dim, layers, windows, table)
    mistral = of.kind == "llama" and any(windows)
    return ModelConfig(
        architecture="mistral" if mistral else of.kind,
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=facts.integer("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=facts.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=facts.number("attention.layer_norm_rms_epsilon"),
        context_tokens=context,
        tied="lm_head.weight" not in places,
        ropes=ropes,
        layer_ropes=layer_ropes,
        windows=windows if 0 < max(windows) < context else (),
        attention_scale=_attention_scale(of, facts, hidden, heads, head_dim, layers),
        activation=Activation.GELU_TANH if gemma else Activation.SILU,
        qkv_bias=_has_bias(places, "self_attn.q_proj"),
        out_bias=_has_bias(places, "self_attn.o_proj"),
        mlp_bias=_has_bias(places, "mlp.down_proj"),
        qk_norm="model.layers.0.self_attn.q_norm.weight" in places,
        embedding_scale=float(hidden**0.5) if gemma else 1.0,
        experts=_experts(of, facts, places, layers),
    )


def _check_neutral(facts: Facts) -> None:
    for key, allowed in _NEUTRAL.items():
        value = facts.get(key)
        if value is not None and value not in allowed:
            raise facts.refused(key)


def _has_bias(places: Mapping[str, Place], name: str) -> bool:
    return f"model.layers.0.{name}.bias" in places


def _attention_scale(
    of: Family, facts: Facts, hidden: int, heads: int, head_dim: int, layers: int
) -> float:
    if facts.get("attention.scale"):
        return facts.number("attention.scale")
    if of.kind != "gemma3_text":
        return 0.0
    size = hidden // heads if layers == _GEMMA3_27B_LAYERS else head_dim
    return float(size**-0.5)


def _windows(of: Family, facts: Facts, layers: int) -> tuple[int, ...]:
    """The window of each layer in tokens, 0 for none."""
    key = "attention.sliding_window"
    window = facts.integer(key, 0, least=0)
    if not window:
        return (0,) * layers
    if of.kind in ("llama", "mixtral", "phi3"):
        return (window,) * layers
    if of.kind != "gemma3_text":
        raise facts.refused(key)
    key = "attention.sliding_window_pattern"
    sliding = facts.by_layer(key)
    if sliding is None:
        pattern = facts.integer(key, _GEMMA3_PATTERN)
        sliding = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if len(sliding) != layers:
        raise facts.refused(key, f"does not say it for {layers} layers")
    return tuple(window if has else 0 for has in sliding)


def _context(facts: Facts) -> int:
    """The context in tokens: what the file declares, or what YaRN makes of the original one."""
    declared = facts.integer("context_length")
    if facts.get("rope.scaling.type") != "yarn":
        return declared
    original = facts.integer("rope.scaling.original_context_length", declared)
    return max(declared, int(original * facts.number("rope.scaling.factor", 1.0)))


def _ropes(
    of: Family,
    facts: Facts,
    head_dim: int,
    layers: int,
    windows: tuple[int, ...],
    table: Table,
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """The rotary tables, and which of them each layer uses."""
    least = head_dim if of.paired else 2  # the rows of a paired head are re-ordered as one
    rotated = facts.integer("rope.dimension_count", head_dim, least=least, most=head_dim)
    if rotated % 2:
        raise facts.refused("rope.dimension_count", "is odd")
    theta = facts.number("rope.freq_base", 10_000.0, above=1.0)
    usual = _rope(facts, rotated, theta, table)
    if of.kind == "smollm3":
        every = _SMOLLM3_NO_ROPE_EVERY
        return (usual,), tuple(NO_ROPE if (i + 1) % every == 0 else 0 for i in range(layers))
    if of.kind != "gemma3_text":
        return (usual,), ()
    local = rope.plain(rotated, facts.number("rope.freq_base_swa", 10_000.0, above=1.0))
    return (usual, local), tuple(int(window > 0) for window in windows)


def _rope(facts: Facts, rotated: int, theta: float, table: Table) -> Rope:
    kind = facts.get("rope.scaling.type")
    factor = facts.get("rope.scaling.factor") or facts.get("rope.scale_linear")
    long, short = table(LONG_FACTORS), table(SHORT_FACTORS)
    if long is not None and short is not None:
        return _longrope(facts, rotated, theta, long, short)
    if kind == "yarn":
        return _yarn(facts, rotated, theta)
    if kind not in (None, "none", "linear"):
        known = "none, linear, yarn, and longrope with its tables"
        raise facts.refused("rope.scaling.type", f"is not supported; supported: {known}")
    factors = table(ROPE_FACTORS)
    if factors is not None:  # how llama.cpp stores Llama 3.1's scaling
        if factor and factor != 1 and kind != "none":
            raise ModelError(f"{ROPE_FACTORS} beside a rope.scaling.factor is not supported")
        if len(factors) != rotated // 2 or not bool((factors > 0).all()):
            raise ModelError(f"{ROPE_FACTORS} holds no {rotated // 2} factors above 0")
        return Rope(tuple((rope.frequencies(rotated, theta) / factors).tolist()))
    if factor and kind != "none":
        key = "rope.scaling.factor" if facts.get("rope.scaling.factor") else "rope.scale_linear"
        return rope.linear(rotated, theta, facts.number(key))
    return rope.plain(rotated, theta)


def _yarn(facts: Facts, rotated: int, theta: float) -> Rope:
    factor = facts.number("rope.scaling.factor", 1.0)
    attention = facts.number(
        "rope.scaling.yarn_attn_factor", rope.yarn_attention_factor(factor)
    ) * facts.number("rope.scaling.attn_factor", 1.0)
    return rope.yarn(
        rotated,
        theta,
        factor=factor,
        original_tokens=facts.integer(
            "rope.scaling.original_context_length", facts.integer("context_length")
        ),
        attention_factor=attention,
        beta_fast=facts.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=facts.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _longrope(facts: Facts, rotated: int, theta: float, long: Tensor, short: Tensor) -> Rope:
    context = facts.integer("context_length")
    original = facts.integer("rope.scaling.original_context_length", context, least=2)
    implied = rope.longrope_attention_factor(context / original, original)
    for name, factors in ((LONG_FACTORS, long), (SHORT_FACTORS, short)):
        if not bool(torch.isfinite(factors).all()) or not bool((factors > 0).all()):
            raise ModelError(f"{name} holds factors that are not above 0")
    return rope.longrope(
        rotated,
        theta,
        short=short.tolist(),
        long=long.tolist(),
        original_tokens=original,
        attention_factor=facts.number("rope.scaling.attn_factor", implied),
    )


def _experts(of: Family, facts: Facts, places: Mapping[str, Place], layers: int) -> Experts | None:
    if of.experts is None:
        return None
    count = facts.integer("expert_count")
    router = of.layer["ffn_gate_inp"]
    chosen = [i for i in range(layers) if f"model.layers.{i}.{router}.weight" in places]
    key = "feed_forward_length" if of.kind == "mixtral" else "expert_feed_forward_length"
    return Experts(
        layers=tuple(chosen),
        count=count,
        per_token=facts.integer("expert_used_count", most=count),
        intermediate_size=facts.integer(key),
        normalized=facts.get("expert_weights_norm") is not False,
    )
