"""From a path to a model ready to run.

Order of checks: what the file is, whether its architecture and tokenizer are known, whether it fits
into memory; then the weights are read, one tensor at a time, so that the peak is the model plus
one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from headrace.errors import ModelError
from headrace.types import ModelRecord
from headrace_worker import native
from headrace_worker.device import CPU, free_bytes
from headrace_worker.loading import memory
from headrace_worker.loading.fingerprint import fingerprint
from headrace_worker.loading.gguf_file import GgufSource
from headrace_worker.loading.hf_folder import HfSource
from headrace_worker.loading.source import Source, Tensors
from headrace_worker.model import Decoder, ModelConfig, architecture
from headrace_worker.model.linear import DenseEmbedding, DenseLinear, Embedding, Linear
from headrace_worker.model.weights import Weights
from headrace_worker.native.linear import NativeLinear
from headrace_worker.native.order import orders
from headrace_worker.parallel.collective import Group
from headrace_worker.parallel.shape import Part
from headrace_worker.parallel.sharded import ShardedTensors, ShardedWeights
from headrace_worker.quantization import MODES, AnyLinear, Quantization, Role, make_linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class LoadedModel:
    """A model, or a rank's part of one, in memory; what gateways need to know of it; its shape.

    `weight_bytes`: what its weights take, packed as they are. `record` is the whole model's.
    `config` is that of what is here; where that is a part, `part` says of what.
    """

    model: Decoder
    record: ModelRecord
    config: ModelConfig
    quantization: Quantization
    weight_bytes: int
    part: Part | None = None
    device: torch.device = CPU

    @property
    def whole(self) -> ModelConfig:
        """The config of the whole model."""
        return self.config if self.part is None else self.part.whole

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def precision(self) -> str:
        """How weights and KV are kept, for people."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            dtype
            if self.quantization == "none"
            else f"{dtype}, linear layers in {self.quantization}"
        )


Progress = Callable[[int, int], None]
"""Told after each tensor: bytes of the files' weights read so far, and of all of them."""


def load_model(
    path: Path,
    name: str,
    dtype: str = "auto",
    quantization: str = "none",
    *,
    context_tokens: int = 0,
    progress: Progress | None = None,
    part: Callable[[ModelConfig], Part] | None = None,
    group: Group | None = None,
    device: torch.device = CPU,
) -> LoadedModel:
    """Reads the GGUF file or Hugging Face folder at `path`, to be served as `name`.

    `dtype`: "float32", "bfloat16" or "auto". `quantization`: "none", "int8", "int4" or "auto".
    `context_tokens`: how many tokens a sequence may have, 0 for as many as the model can; a model
    with LongRoPE has two sets of rotary factors, and it is this number that decides between them,
    as vLLM does it: the long ones only where it exceeds the context that the model was first
    trained with. `part`: which part of a model of this config to read, None for all of it; it may
    raise ModelError. `group`: the ranks that hold the other parts of the same layers.
    `device`: where weights go. Raises ModelError, saying what is wrong and what would work.
    """
    resolve_dtype(dtype, device, resolve_quantization(quantization, device, dtype))  # or it raises
    source = _open(path)
    mode = resolve_quantization(quantization, device, dtype, in_four_bits=source.in_four_bits)
    kind = resolve_dtype(dtype, device, mode)
    facts = source.tokenizer()
    config = _served(source.config, context_tokens)
    held = None if part is None else part(config)
    tensors: Tensors = source if held is None else ShardedTensors(source, held)
    local = config if held is None else held.config
    memory.require_model(
        local, tensors.largest_values(), str(kind)[6:], mode, free=free_bytes(device)
    )
    weights = _Weights(tensors, kind, mode, progress, device, orders(config, held))
    model = _build(local, weights, held, group)
    weights.check_all_taken()
    if (library := native.library()) is not None:
        library.rest()
    record = ModelRecord(
        name=name,
        fingerprint=fingerprint(config, kind, _rounding(mode), source.files, source.index()),
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
    return LoadedModel(model, record, local, mode, weights.bytes, held, device)


def _build(
    config: ModelConfig, weights: Weights, part: Part | None, group: Group | None
) -> Decoder:
    """The model, or a rank's part of it with the sums over its `group`."""
    kind = architecture(config.architecture)
    if part is None:
        return kind(config, weights)
    if part.tensor > 1:
        assert group is not None, "tensor ranks add up through a group"
        weights = ShardedWeights(weights, part, group)
    return kind(config, weights, first=part.first, last=part.last)


def _rounding(mode: Quantization) -> str:
    """How weights and activations are rounded: the native kernels' formats are their own."""
    return f"{mode} in groups" if mode != "none" and native.library() is not None else mode


def resolve_dtype(
    name: str, device: torch.device = CPU, mode: Quantization = "none"
) -> torch.dtype:
    """The torch dtype; "auto" is bfloat16 on a GPU, where the CPU multiplies it natively, and for
    weights that the native kernels multiply rounded: they keep sums in float32, so that it is
    embeddings and KV that are half as large."""
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16
    if name == "auto":
        rounded = mode != "none" and native.library() is not None
        return torch.bfloat16 if rounded or _native_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_quantization(
    name: str, device: torch.device = CPU, dtype: str = "auto", *, in_four_bits: bool = False
) -> Quantization:
    """`name` itself; "auto" rounds where nothing is said of `dtype` either, the native kernels are
    there and the CPU does not multiply bfloat16 by itself: see ADR 4.

    That is to int4 where the model's file is `in_four_bits`, else to int8. Raises ModelError where
    `name` is no way to quantize, or not on `device`.
    """
    if name == "auto":
        free = dtype == "auto" and device.type == "cpu" and not _native_bfloat16()
        if not free or native.library() is None:
            return "none"
        return "int4" if in_four_bits else "int8"
    if name in MODES and name != "none" and device.type != "cpu":
        raise ModelError(
            f"HEADRACE_QUANTIZATION={name} multiplies with kernels for CPUs, not on {device}"
        )
    for mode in MODES:
        if name == mode:
            return mode
    raise ModelError(f"quantization {name!r} is not one of auto, {', '.join(MODES)}")


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


def _served(config: ModelConfig, context_tokens: int) -> ModelConfig:
    """`config` with its context lowered to `context_tokens`; 0 leaves it."""
    if context_tokens < 0:
        raise ModelError(f"a context of {context_tokens} tokens is negative")
    if context_tokens > config.context_tokens:
        raise ModelError(
            f"a context of {context_tokens} tokens is more than the model's {config.context_tokens}"
        )
    return replace(config, context_tokens=context_tokens or config.context_tokens)


class _Weights:
    """Hands a source's tensors to a model, each checked, converted and handed out once."""

    def __init__(
        self,
        source: Tensors,
        dtype: torch.dtype,
        quantization: Quantization,
        progress: Progress | None,
        device: torch.device,
        cuts: Mapping[str, tuple[int, ...]],
    ) -> None:
        """`cuts`: of the columns of matrices that are no experts, by name: see native/order.py."""
        self._device = device
        self._cuts = cuts
        self._source = source
        self.dtype = dtype
        self._quantization = quantization
        self.bytes = 0
        self._left = source.names()
        self._progress = progress
        self._done_bytes, self._all_bytes = 0, sum(map(source.stored_bytes, self._left))

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._read(name, shape).to(self.dtype).to(self._device)
        self.bytes += tensor.nbytes
        return tensor

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        return DenseEmbedding(self.take(name, shape))

    def total(self, x: Tensor) -> Tensor:
        return x

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as exact as the file has it."""
        if name not in self._left:
            raise ModelError(f"tensor {name} is missing")
        self._left.remove(name)
        tensor = self._source.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}")
        if self._progress is not None:
            self._done_bytes += self._source.stored_bytes(name)
            self._progress(self._done_bytes, self._all_bytes)
        return tensor

    def linear(
        self, names: Sequence[str], outs: Sequence[int], columns: int, *, bias: bool = False
    ) -> Linear:
        parts = [
            self._matrix(f"{name}.weight", (rows, columns))
            for name, rows in zip(names, outs, strict=True)
        ]
        biases = [
            self._read(f"{name}.bias", (rows,))
            for name, rows in zip(names, outs, strict=True)
            if bias
        ]
        role = Role.of(names[0])
        linear = self._linear(torch.cat(parts), torch.cat(biases) if bias else None, role)
        if isinstance(linear, NativeLinear) and ".experts." not in names[0]:
            linear.cut(self._cuts.get(names[0].rsplit(".", 1)[-1], ()))
        return linear

    def router(self, name: str, shape: tuple[int, int]) -> Linear:
        weight, library = self.take(name, shape), native.library()
        if library is None:
            return DenseLinear(weight)
        return NativeLinear.of_float32(library, weight, None)

    def tied_head(self, embedding: Tensor) -> Linear:
        head = self._linear(embedding, None, Role.HEAD)
        if isinstance(head, DenseLinear) and not head.packed:
            self.bytes -= head.weight_bytes  # it is the embedding, counted when it was taken
        return head

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A linear layer's weights: quantized from what the file has, not from what dtype keeps."""
        tensor = self._read(name, shape)
        return tensor.to(self.dtype) if self._quantization == "none" else tensor

    def _linear(self, weight: Tensor, bias: Tensor | None, role: Role) -> AnyLinear:
        bias = None if bias is None else bias.to(self._device)
        weight = weight.to(self._device)
        linear = make_linear(self._quantization, weight, bias, role, self.dtype)
        self.bytes += linear.weight_bytes
        return linear

    def check_all_taken(self) -> None:
        """A weight that nobody asked for means another model than the one that was built."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise ModelError(f"{len(self._left)} tensors have no place in this model: {some}")
