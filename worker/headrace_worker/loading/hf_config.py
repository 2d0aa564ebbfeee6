"""What a Hugging Face config.json says, as a ModelConfig.

Invariant: a value that would change the computation is either computed or stops the load by name,
and what a file leaves out has the value that transformers gives it for that family. Both spellings
of rotary settings are read: `rope_parameters`, and the older `rope_theta` with `rope_scaling`.

Rejected: reading through transformers' own config classes, which needs the library in every worker
and takes what its current version takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.errors import ModelError
from headrace_worker.loading.hf_rope import read_rope, rope_rules, yarn_context
from headrace_worker.loading.source import need
from headrace_worker.model import ModelConfig, architecture
from headrace_worker.model.config import NO_ROPE, Activation, Experts, Rope

WHERE = "config.json"

_ACTIVATIONS = {"silu": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None},
    "smollm3": {"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rope_theta": 1_000_000.0},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {"sliding_window": 4096},
    "phi3": {"num_key_value_heads": None, "original_max_position_embeddings": 4096},
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "tie_word_embeddings": True,
    },
}
"""What config.json may leave out, where it is not the same for all. Gemma's files say little."""

_BIASED = frozenset({"llama", "smollm3", "qwen3", "qwen3_moe", "gemma3_text"})
"""Families whose `attention_bias` gives biases to q, k, v and o."""

_MAY_SLIDE = frozenset({"smollm3", "qwen2", "qwen3", "qwen3_moe"})
"""Families that have a window only where `use_sliding_window` says so."""

_LAYER_TYPED = frozenset({"qwen2", "qwen3", "smollm3", "gemma3_text"})
"""Families whose `layer_types` say which layers have a window."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "use_bidirectional_attention": (False, None),
    "rope_interleaved": (False, None),
}
"""Keys that change the computation, with the values that do not."""

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class HfConfig:
    """`prefixed`: the text part of a larger model, whose weights have a prefix."""

    model: ModelConfig
    prefixed: bool


def read_config(facts: Mapping[str, Any]) -> HfConfig:
    """The shape of the model that config.json's `facts` describe.

    Raises ModelError for an architecture that is not known, and for a value that is missing, of
    the wrong type or not supported, by name.
    """
    text = _text_facts(facts)
    kind = str(text.get("model_type"))
    architecture(kind)
    reading = _Reading(kind, _DEFAULTS.get(kind, {}) | dict(text))
    return HfConfig(reading.config(), text is not facts)


def _text_facts(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gemma 3 with eyes keeps its language model's settings in `text_config`."""
    if facts.get("model_type") != "gemma3":
        return facts
    text = facts.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(f"{WHERE}: a gemma3 model needs text_config")
    shared = ("tie_word_embeddings", "quantization_config", "compression_config")
    return (
        {key: facts[key] for key in shared if key in facts} | text | {"model_type": "gemma3_text"}
    )


class _Reading:
    """One config.json's facts, defaults filled in."""

    def __init__(self, kind: str, facts: dict[str, Any]) -> None:
        self.kind, self.facts = kind, facts

    def integer(self, key: str, default: int | None = None) -> int:
        if default is not None and self.facts.get(key) is None:
            return default
        return int(need(self.facts, key, int, WHERE))

    def size(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise ModelError(f"{WHERE}: {key} is {value}, expected at least 1")
        return value

    def number(self, key: str) -> float:
        return need(self.facts, key, float, WHERE)

    def refuse(self, key: str, why: str = "is not supported") -> ModelError:
        return ModelError(f"{WHERE}: {key} = {self.facts[key]!r} {why}")

    def config(self) -> ModelConfig:
        facts, gemma = self.facts, self.kind == "gemma3_text"
        self._check_refused()
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        head_dim = self.size("head_dim", hidden // heads)
        layers = self.size("num_hidden_layers")
        context = self.size("max_position_embeddings")
        if self.kind not in ("gemma3_text", "phi3"):  # Phi's yarn is another name of LongRoPE
            context = yarn_context(rope_rules(facts), context)
        types = self._layer_types(layers)
        ropes, layer_ropes = self._ropes(head_dim, types)
        attention_bias = self.kind in _BIASED and bool(facts.get("attention_bias"))
        return ModelConfig(
            architecture=self.kind,
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=self._kv_heads(heads),
            head_dim=head_dim,
            norm_eps=self.number("rms_norm_eps"),
            context_tokens=context,
            tied=bool(facts.get("tie_word_embeddings", False)),
            ropes=ropes,
            layer_ropes=layer_ropes,
            windows=self._windows(types, context),
            attention_scale=self.number("query_pre_attn_scalar") ** -0.5 if gemma else 0.0,
            activation=self._activation(),
            qkv_bias=attention_bias or self.kind == "qwen2",
            out_bias=attention_bias,
            mlp_bias=bool(facts.get("mlp_bias")),
            qk_norm=self.kind in ("qwen3", "qwen3_moe", "gemma3_text"),
            embedding_scale=float(hidden**0.5) if gemma else 1.0,
            experts=self._experts(layers),
        )

    def _check_refused(self) -> None:
        refused = dict(_REFUSED)
        if self.kind not in _BIASED | {"qwen2"}:  # qwen2 has its biases whatever this says
            refused["attention_bias"] = (False, None)
        if self.kind not in ("llama", "smollm3"):
            refused["mlp_bias"] = (False, None)
        if self.kind == "llama":
            refused["sliding_window"] = (None,)
        for key, allowed in refused.items():
            if self.facts.get(key) not in allowed:
                raise self.refuse(key)

    def _kv_heads(self, heads: int) -> int:
        key = "num_key_value_heads"
        if key in self.facts and self.facts[key] is None:
            return heads
        return self.size(key)

    def _activation(self) -> Activation:
        key = "hidden_activation" if self.kind == "gemma3_text" else "hidden_act"
        name = self.facts.get(key, "silu")
        if name not in _ACTIVATIONS:
            raise self.refuse(key, f"is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def _layer_types(self, layers: int) -> list[str]:
        """For each layer, whether its rows see a window or all."""
        usual = self._usual_types(layers)
        named = self.facts.get("layer_types")
        if named is None:
            return usual
        if not isinstance(named, list) or len(named) != layers:
            raise self.refuse("layer_types", f"does not name {layers} layers")
        unknown = sorted({str(name) for name in named} - {_SLIDING, _FULL})
        if unknown:
            raise ModelError(f"{WHERE}: layer_types {', '.join(unknown)} are not supported")
        if self.kind not in _LAYER_TYPED and named != usual:
            raise self.refuse("layer_types", f"is not supported for {self.kind}")
        return named

    def _usual_types(self, layers: int) -> list[str]:
        kind, window = self.kind, self._window()
        if not window:
            sliding = [False] * layers
        elif kind in ("qwen2", "qwen3"):
            first = self.integer("max_window_layers")
            sliding = [i >= first for i in range(layers)]
        elif kind == "smollm3":
            sliding = [not has_rope for has_rope in self._has_rope(layers)]
        elif kind == "gemma3_text":
            pattern = self.size("sliding_window_pattern")
            sliding = [(i + 1) % pattern != 0 for i in range(layers)]
        else:
            sliding = [True] * layers
        return [_SLIDING if has_window else _FULL for has_window in sliding]

    def _window(self) -> int:
        """The window in tokens; 0 for none."""
        if self.kind in _MAY_SLIDE and not self.facts.get("use_sliding_window"):
            return 0
        return self.integer("sliding_window", 0)

    def _windows(self, types: list[str], context: int) -> tuple[int, ...]:
        window = self._window()
        if _SLIDING in types and not window:
            raise ModelError(f"{WHERE}: layer_types has {_SLIDING} and there is no sliding_window")
        if _SLIDING not in types or window >= context:
            return ()
        return tuple(window if name == _SLIDING else 0 for name in types)

    def _has_rope(self, layers: int) -> list[bool]:
        """SmolLM3: 1 in `no_rope_layers` means that the layer has one."""
        named = self.facts.get("no_rope_layers")
        if named is None:
            interval = self.size("no_rope_layer_interval", 4)
            return [(i + 1) % interval != 0 for i in range(layers)]
        if not isinstance(named, list) or len(named) < layers:
            raise self.refuse("no_rope_layers", f"does not name {layers} layers")
        return [bool(has_rope) for has_rope in named[:layers]]

    def _ropes(self, head_dim: int, types: list[str]) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
        """The rotary tables, and which of them each layer uses."""
        if self.kind == "gemma3_text":
            return self._local_and_global_ropes(head_dim, types)
        ropes = (
            read_rope(rope_rules(self.facts), self.facts, head_dim, partial=self.kind == "phi3"),
        )
        if self.kind != "smollm3":
            return ropes, ()
        return ropes, tuple(0 if has else NO_ROPE for has in self._has_rope(len(types)))

    def _local_and_global_ropes(
        self, head_dim: int, types: list[str]
    ) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
        facts = self.facts
        nested = facts.get("rope_parameters")
        if nested is None:
            far = {"rope_theta": facts["rope_theta"]} | (facts.get("rope_scaling") or {})
            near = {"rope_theta": facts["rope_local_base_freq"]}
        elif isinstance(nested, dict) and isinstance(nested.get(_FULL), dict):
            far = {"rope_theta": facts["rope_theta"]} | nested[_FULL]
            near = {"rope_theta": facts["rope_local_base_freq"]} | (nested.get(_SLIDING) or {})
        else:
            raise self.refuse("rope_parameters", f"has no {_FULL}")
        ropes = tuple(read_rope(rules, facts, head_dim, partial=False) for rules in (far, near))
        return ropes, tuple(int(name == _SLIDING) for name in types)

    def _experts(self, layers: int) -> Experts | None:
        facts = self.facts
        if self.kind == "mixtral":
            inner, chosen = self.integer("intermediate_size"), list(range(layers))
            normalized = True
        elif self.kind == "qwen3_moe":
            step, dense = self.size("decoder_sparse_step", 1), facts.get("mlp_only_layers") or ()
            inner = self.size("moe_intermediate_size")
            chosen = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
            normalized = bool(facts.get("norm_topk_prob", False))
        else:
            return None
        # transformers writes either name
        key = "num_experts" if "num_experts" in facts else "num_local_experts"
        count = self.integer(key)
        if not count or not chosen:
            return None
        return Experts(tuple(chosen), count, self.integer("num_experts_per_tok"), inner, normalized)
