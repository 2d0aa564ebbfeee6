"""From a path to a model ready to run.

Order of checks: what the file is, whether its architecture and tokenizer are known, whether it fits
into memory; then the weights are read, one tensor at a time, so that the peak is the model plus
one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.errors import ModelError
from headrace.types import ModelRecord
from headrace_worker.loading import memory
from headrace_worker.loading.fingerprint import fingerprint
from headrace_worker.loading.gguf_file import GgufSource
from headrace_worker.loading.hf_folder import HfSource
from headrace_worker.loading.source import Source
from headrace_worker.model import Llama, ModelConfig, architecture
from headrace_worker.model.linear import DenseLinear, Linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, what gateways need to know of it, and its shape."""

    model: Llama
    record: ModelRecord
    config: ModelConfig

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_model(path: Path, name: str, dtype: str = "auto") -> LoadedModel:
    """Reads the GGUF file or Hugging Face folder at `path`, to be served as `name`.

    `dtype`: "float32", "bfloat16" or "auto". Raises ModelError, saying what is wrong and what
    would work.
    """
    kind = resolve_dtype(dtype)
    source = _open(path)
    facts = source.tokenizer()
    config = source.config
    _check_memory(source, kind)
    weights = _Weights(source, kind)
    model = architecture(config.architecture)(config, weights)
    weights.check_all_taken()
    model.eval()
    record = ModelRecord(
        name=name,
        fingerprint=fingerprint(config, kind, source.files, source.index()),
        architecture=config.architecture,
        context_tokens=config.context_tokens,
        vocab_size=config.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        add_bos=facts.add_bos,
        bos_token_id=facts.bos_token_id,
        chat_template=facts.chat_template,
        template_tokens=facts.template_tokens,
        tokenizer_json=facts.json,
    )
    return LoadedModel(model, record, config)


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype; "auto" is bfloat16 where the CPU multiplies it natively."""
    if name == "auto":
        return torch.bfloat16 if _native_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _native_bfloat16() -> bool:
    try:
        words = set(_CPUINFO.read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


def _open(path: Path) -> Source:
    if path.is_dir():
        return HfSource(path)
    if path.suffix == ".gguf":
        return GgufSource(path)
    raise ModelError(f"{path} is neither a .gguf file nor a folder with a config.json")


def _check_memory(source: Source, dtype: torch.dtype) -> None:
    config = source.config
    # packing keeps the head apart from the embedding it is tied to
    values = config.parameters + config.vocab_size * config.hidden_size * config.tied
    rope_values = 2 * config.context_tokens * config.head_dim
    working = source.largest_values() * (4 + dtype.itemsize)
    memory.require(
        (values + rope_values) * dtype.itemsize + working,
        f"a model of {config.parameters / 1e6:,.0f}M parameters in {str(dtype)[6:]}",
        "use a smaller model" + (", or HEADRACE_DTYPE=bfloat16" if dtype is torch.float32 else ""),
    )


class _Weights:
    """Hands a source's tensors to a model, each checked, converted and handed out once."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self._left = source.names()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._left:
            raise ModelError(f"tensor {name} is missing")
        self._left.remove(name)
        tensor = self._source.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
        return tensor.to(self._dtype)

    def linear(
        self, names: Sequence[str], outs: Sequence[int], columns: int, *, bias: bool = False
    ) -> Linear:
        parts = [
            self.take(f"{name}.weight", (rows, columns))
            for name, rows in zip(names, outs, strict=True)
        ]
        biases = [
            self.take(f"{name}.bias", (rows,))
            for name, rows in zip(names, outs, strict=True)
            if bias
        ]
        return DenseLinear(torch.cat(parts), torch.cat(biases) if bias else None)

    def tied_head(self, embedding: Tensor) -> Linear:
        return DenseLinear(embedding)

    def check_all_taken(self) -> None:
        """A weight that nobody asked for means another model than the one that was built."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise ModelError(f"{len(self._left)} tensors have no place in this model: {some}")
