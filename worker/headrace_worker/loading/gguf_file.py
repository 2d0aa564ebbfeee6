"""Models in llama.cpp's GGUF format, quantized or not.

Invariant: what leaves here looks as if it came from a Hugging Face checkpoint: its names, shapes
and row order. llama.cpp stores the rows of q and k in the order of interleaved rotary pairs; they
are put back to halves, since the model rotates halves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from headrace.errors import ModelError
from headrace_worker.loading import tokenizer
from headrace_worker.loading.source import TokenizerFacts, need
from headrace_worker.model import ModelConfig, architecture, rope
from headrace_worker.model.config import Rope

_LAYER_NAMES = {
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
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"

TYPES = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}
)
"""Tensor types that are read; each is dequantized as the file is loaded."""


class _PlainReader(GGUFReader):
    """Reads through a plain view of the mapped file.

    Each vocabulary entry is a slice, and slicing a memmap makes a Python object of it: 2 to 4 s for
    50,000 entries, which is most of a worker's start.
    """

    @property  # type: ignore[override]  # theirs is typed a memmap
    def data(self) -> NDArray[Any]:
        return self._data

    @data.setter
    def data(self, mapped: NDArray[Any]) -> None:
        self._data = mapped.view(np.ndarray)


class GgufSource:
    """An opened GGUF file. Raises ModelError when it is not one, or cannot be run."""

    def __init__(self, path: Path) -> None:
        self.files: tuple[Path, ...] = (path,)
        try:
            self._reader = _PlainReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path.name} is not a readable GGUF file: {error}") from error
        self._metadata: dict[str, Any] = {
            key: field.contents() for key, field in self._reader.fields.items()
        }
        kind = str(self._metadata.get("general.architecture"))
        architecture(kind)
        self._tensors = {_name(tensor.name): tensor for tensor in self._reader.tensors}
        self._check_types()
        self.config = self._config(kind)

    def _check_types(self) -> None:
        for tensor in self._tensors.values():
            if tensor.tensor_type.name not in TYPES:
                raise ModelError(
                    f"tensor {tensor.name} has type {tensor.tensor_type.name}, which is not "
                    f"supported; supported: {', '.join(sorted(TYPES))}",
                    code="tensor_type",
                )

    def _config(self, kind: str) -> ModelConfig:
        facts, where = self._metadata, self.files[0].name

        def integer(key: str, default: int | None = None) -> int:
            name = f"{kind}.{key}"
            if default is not None and name not in facts:
                return default
            return int(need(facts, name, int, where))

        heads = integer("attention.head_count")
        hidden = integer("embedding_length")
        head_dim = integer("attention.key_length", hidden // heads)
        for key in ("expert_count", "attention.sliding_window"):
            if integer(key, 0):
                raise ModelError(f"{where}: {kind}.{key} is not supported")
        if facts.get(f"{kind}.rope.scaling.type", "none") != "none":
            raise ModelError(f"{where}: {kind}.rope.scaling.type is not supported")
        rotated = integer("rope.dimension_count", head_dim)
        return ModelConfig(
            architecture=kind,
            vocab_size=integer("vocab_size", int(self._shape("model.embed_tokens.weight")[0])),
            hidden_size=hidden,
            intermediate_size=integer("feed_forward_length"),
            layers=integer("block_count"),
            heads=heads,
            kv_heads=integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            norm_eps=need(facts, f"{kind}.attention.layer_norm_rms_epsilon", float, where),
            context_tokens=integer("context_length"),
            tied="lm_head.weight" not in self._tensors,
            ropes=(
                Rope(
                    self._frequencies(rotated, float(facts.get(f"{kind}.rope.freq_base", 10_000.0)))
                ),
            ),
        )

    def _frequencies(self, rotated: int, theta: float) -> tuple[float, ...]:
        frequencies = rope.frequencies(rotated, theta)
        if _ROPE_FACTORS in self._tensors:  # how llama.cpp stores Llama 3.1's scaling
            frequencies = frequencies / self._dequantized(_ROPE_FACTORS)
        return tuple(frequencies.tolist())

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise ModelError(f"{self.files[0].name}: tensor {name} is missing")
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def index(self) -> list[str]:
        return sorted(
            f"{t.name} {t.tensor_type.name} {list(t.shape)}" for t in self._reader.tensors
        )

    def names(self) -> set[str]:
        return set(self._tensors) - {_ROPE_FACTORS}

    def largest_values(self) -> int:
        return max(int(tensor.n_elements) for tensor in self._tensors.values())

    def read(self, name: str) -> Tensor:
        values = self._dequantized(name)
        if name.endswith("q_proj.weight"):
            return _halves(values, self.config.heads)
        if name.endswith("k_proj.weight"):
            return _halves(values, self.config.kv_heads)
        return values

    def _dequantized(self, name: str) -> Tensor:
        tensor, shape = self._tensors[name], self._shape(name)
        convert: Callable[[Any, GGMLQuantizationType], NDArray[np.float32]] = dequantize
        with warnings.catch_warnings():
            # quantized blocks hold scales that overflow float16 on purpose in no valid file
            warnings.simplefilter("ignore", RuntimeWarning)
            values = convert(tensor.data, tensor.tensor_type)
        # the reader maps the file read-only, so float32 data has to be copied out of it
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True)).reshape(shape)

    def tokenizer(self) -> TokenizerFacts:
        return tokenizer.from_gguf(self._metadata)


def _name(name: str) -> str:
    """Hugging Face's name for llama.cpp's; an unknown one stays, and is refused as unexpected."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (pair, which of it) order to (which of the pair, pair) order."""
    rows, columns = weight.shape
    paired = weight.view(heads, rows // heads // 2, 2, columns)
    return paired.transpose(1, 2).reshape(rows, columns)
