"""Tiny random models of every family, written as GGUF files as llama.cpp's converter writes them.

Independent of the reader: tensor names come from the `gguf` package's maps, metadata keys from its
writer, row orders from a permutation of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize
from safetensors.numpy import load_file

from worker.builders import TINY, add_gguf_tokenizer, tiny_tokenizer

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0],
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0}
_PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
_GEMMA = {
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 7,
    "sliding_window": 16,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    },
    "tie_word_embeddings": True,
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Family:
    """A shape to test: Hugging Face's model_type, GGUF's architecture, changes to TINY."""

    kind: str
    arch: str
    changes: dict[str, Any] = field(default_factory=dict)

    def folder(self, folder: Path) -> None:
        """A random model of this shape as a Hugging Face folder."""
        from transformers import AutoConfig, AutoModelForCausalLM

        changes = _SPECIAL_IDS | self.changes
        config = AutoConfig.for_model(self.kind, **(TINY | changes))
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # larger than default, so that errors show
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.1)
                else:
                    parameter.uniform_(-0.5, 0.5)
        model.save_pretrained(folder)
        tiny_tokenizer().save(str(folder / "tokenizer.json"))


_SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama-tied": Family("llama", "llama", {"tie_word_embeddings": True}),
    "llama-biased": Family("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": Family("llama", "llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": Family("llama", "llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": Family("llama", "llama", {"rope_parameters": _YARN}),
    "mistral": Family("mistral", "llama", {"sliding_window": 20}),
    "mixtral": Family("mixtral", "llama", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "smollm3": Family("smollm3", "smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "qwen2": Family("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": Family("qwen3", "qwen3", {"head_dim": 24}),
    "qwen3-moe": Family("qwen3_moe", "qwen3moe", _EXPERTS | {"head_dim": 16}),
    "gemma3": Family("gemma3_text", "gemma3", _GEMMA),
    "phi3": Family("phi3", "phi3", {"sliding_window": 24}),
    "phi3-long": Family(
        "phi3", "phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128}
    ),
    "phi3-partial": Family("phi3", "phi3", {"rope_parameters": _PARTIAL}),
}


def write_family(
    path: Path,
    folder: Path,
    arch: str,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    changed: dict[str, Any] | None = None,
    *,
    stacked: bool = True,
) -> None:
    """The model in `folder` as a GGUF file with matrices quantized to `kind`.

    `changed`: metadata by key, put in or in place of what belongs there; None removes it.
    `stacked`: experts in one tensor; else each on its own, as in the first files of Mixtral.
    """
    facts = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, arch)
    add_metadata(writer, facts, arch)
    add_gguf_tokenizer(writer, "gpt-2")
    pairs = writer.kv_data[0]
    for key, value in (changed or {}).items():
        pairs.pop(key, None)
        if value is not None:
            pairs[key] = GGUFValue(value, GGUFValueType.get_type(value))
    stored = load_file(folder / "model.safetensors")
    for name, values in _tensors(facts, stored, arch, stacked=stacked):
        if values.ndim == 1 or values.shape[-1] % 32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: GGUFWriter, facts: dict[str, Any], arch: str) -> None:
    heads, hidden = facts["num_attention_heads"], facts["hidden_size"]
    head_dim = facts.get("head_dim") or hidden // heads
    writer.add_block_count(facts["num_hidden_layers"])
    writer.add_context_length(facts["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(facts["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(facts["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(facts["rms_norm_eps"])
    if facts.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rules = facts["rope_parameters"]
    if arch == "gemma3":
        writer.add_rope_freq_base_swa(rules["sliding_attention"]["rope_theta"])
        rules = rules["full_attention"]
    writer.add_rope_freq_base(rules["rope_theta"])
    _add_rope_scaling(writer, rules, facts, arch)
    if arch in ("llama", "smollm3"):
        writer.add_vocab_size(facts["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(facts["original_max_position_embeddings"])
        writer.add_rope_dimension_count(
            int(rules.get("partial_rotary_factor", 1) * hidden) // heads
        )
        writer.add_sliding_window(facts.get("sliding_window") or 0)
    elif facts.get("sliding_window") and facts["model_type"] in ("mistral", "gemma3_text"):
        writer.add_sliding_window(facts["sliding_window"])
    experts = facts.get("num_local_experts") or facts.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(facts["num_experts_per_tok"])
    if facts.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(facts["moe_intermediate_size"])


def _add_rope_scaling(
    writer: GGUFWriter, rules: dict[str, Any], facts: dict[str, Any], arch: str
) -> None:
    if rules["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rules["factor"])
    elif rules["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rules["factor"])
        writer.add_rope_scaling_orig_ctx_len(rules["original_max_position_embeddings"])
    elif rules["rope_type"] == "longrope":
        original = facts["original_max_position_embeddings"]
        scale = facts["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two rows of a rotary pair side by side."""
    rows = values.shape[0]
    halves = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _tensors(
    facts: dict[str, Any], stored: dict[str, np.ndarray], arch: str, *, stacked: bool
) -> Iterator[tuple[str, np.ndarray]]:
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        facts["num_hidden_layers"],
    )
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in sorted(stored.items(), key=lambda item: _natural(item[0])):
        if arch in ("llama", "smollm3") and ".self_attn.q_proj." in name:
            values = interleaved(values, facts["num_attention_heads"])
        elif arch in ("llama", "smollm3") and ".self_attn.k_proj." in name:
            values = interleaved(values, facts["num_key_value_heads"])
        elif arch == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        if ".experts." in name:
            before, _, after = name.partition(".experts.")
            stacks.setdefault(f"{before}.experts.{after.partition('.')[2]}", []).append(values)
            continue
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped, name
        yield mapped, values
    for name, experts in stacks.items():
        # Mixtral's stacks have a name of their own in the map
        known = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        mapped = names.get_name(name, try_suffixes=(".weight",)) or names.get_name(
            known, try_suffixes=(".weight",)
        )
        assert mapped, name
        if stacked:
            yield mapped, np.stack(experts)
            continue
        for i, values in enumerate(experts):
            yield mapped.replace("_exps.", f".{i}."), values
    yield from _rope_tables(facts)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _rope_tables(facts: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    rules = facts["rope_parameters"]
    if rules.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rules["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rules["short_factor"], np.float32)
    if rules.get("rope_type") == "llama3":
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**facts), "cpu")
        size = 2 * len(scaled)
        plain = 1.0 / (rules["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size))
        yield "rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32)
