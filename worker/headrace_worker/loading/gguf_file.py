"""Models in llama.cpp's GGUF format, quantized or not.

Invariant: what leaves here looks as if it came from a Hugging Face checkpoint: its names, shapes
and row order, and values that are numbers. One tensor is dequantized at a time, one expert of a
stack at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from headrace.errors import ModelError
from headrace_worker import native
from headrace_worker.loading import tokenizer
from headrace_worker.loading.gguf_config import Facts, read_config
from headrace_worker.loading.gguf_names import Order, family, places
from headrace_worker.loading.gguf_reader import GgufFile, GgufTensor
from headrace_worker.loading.source import TokenizerFacts
from headrace_worker.model import architecture
from headrace_worker.native.abi import UNPACKED

TYPES = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}
)
"""Tensor types that are read; each is dequantized as the file is loaded."""


FOUR_BITS = frozenset({"Q4_0", "Q4_1"})
"""Grids that quantization/int4.py finds again. Beside them a file has norms and routers in F32."""
_NOT_LAYERS = ("token_embd.weight", "output.weight")


class GgufSource:
    """An opened GGUF file. Raises ModelError when it is not one, or cannot be run."""

    def __init__(self, path: Path) -> None:
        self.files: tuple[Path, ...] = (path,)
        self._file = GgufFile(path)
        facts = Facts(self._file.metadata, path.name)
        experts = facts.integer("expert_count", 0, least=0)
        of = family(facts.architecture, experts)
        architecture(of.kind)
        self._check_whole()
        self._check_types()
        self._places = places(of, self._file.tensors.values(), experts)
        self.config = read_config(of, facts, self._places, self._table)
        kinds = {
            tensor.kind.name
            for tensor in self._file.tensors.values()
            if len(tensor.shape) > 1 and tensor.name not in _NOT_LAYERS
        }
        self.in_four_bits = bool(kinds & FOUR_BITS) and kinds <= FOUR_BITS | {"F32"}

    def _check_whole(self) -> None:
        parts = self._file.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise ModelError(
                f"{self.files[0].name} is one of {parts} parts of a model: merge them into one "
                "file (llama-gguf-split --merge)"
            )

    def _check_types(self) -> None:
        for tensor in self._file.tensors.values():
            if tensor.kind.name not in TYPES:
                raise ModelError(
                    f"tensor {tensor.name} has type {tensor.kind.name}, which is not "
                    f"supported; supported: {', '.join(sorted(TYPES))}",
                    code="tensor_type",
                )

    def index(self) -> list[str]:
        tensors = self._file.tensors.values()
        return sorted(f"{t.name} {t.kind.name} {list(t.shape)}" for t in tensors)

    def names(self) -> set[str]:
        return set(self._places)

    def stored_bytes(self, name: str) -> int:
        place = self._places[name]
        return len(place.tensor.data) // (1 if place.expert is None else place.tensor.shape[0])

    def largest_values(self) -> int:
        return max(math.prod(place.shape) for place in self._places.values())

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        first, count = (0, place.tensor.shape[0]) if place.expert is None else (place.expert, 1)
        values = _dequantized(place.tensor, first, count).reshape(place.shape)
        if place.shift:
            values = values - place.shift
        if place.order is Order.QUERY_PAIRS:
            return _halves(values, self.config.heads, name)
        if place.order is Order.KEY_PAIRS:
            return _halves(values, self.config.kv_heads, name)
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read_part(self, name: str, rows: Sequence[range], columns: range | None) -> Tensor:
        """Of matrices the file's bytes of these rows, and of them the blocks that hold `columns`.

        A block is 32 or 256 columns. Experts of a stack and vectors are read whole and cut.
        """
        place = self._places[name]
        if place.expert is not None or len(place.shape) == 1:
            values = self.read(name)
            part = torch.cat([values[run.start : run.stop] for run in rows])
            return part if columns is None else part[:, columns.start : columns.stop]
        part = torch.cat([_dequantized(place.tensor, run.start, len(run), columns) for run in rows])
        if place.shift:
            part = part - place.shift
        if place.order is Order.PLAIN:
            return part
        heads = self.config.heads if place.order is Order.QUERY_PAIRS else self.config.kv_heads
        size = place.shape[0] // heads
        assert not any(run.start % size or run.stop % size for run in rows), "heads stay whole"
        return _halves(part, len(part) // size, name)

    def _table(self, name: str) -> Tensor | None:
        tensor = self._file.tensors.get(name)
        return None if tensor is None else _dequantized(tensor, 0, tensor.shape[0]).reshape(-1)

    def tokenizer(self) -> TokenizerFacts:
        return tokenizer.from_gguf(self._file.metadata, self.config.vocab_size)


def _dequantized(
    tensor: GgufTensor, first: int, count: int, columns: range | None = None
) -> Tensor:
    """`count` entries of the tensor's first dimension, from `first` on, float32.

    `columns`: which of the last dimension, None for all. Raises ModelError for values that are no
    numbers: what a damaged scale gives.
    """
    stored = tensor.rows(first, count)
    block_values, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    if columns is not None:
        start, stop = columns.start // block_values, -(-columns.stop // block_values)
        stored = np.ascontiguousarray(stored[..., start * block_bytes : stop * block_bytes])
    found = _converted(stored, tensor.kind)
    if found is None:
        raise ModelError(f"tensor {tensor.name} holds values that are no numbers: a damaged file")
    if columns is None:
        return found
    begin = columns.start - start * block_values
    return found[..., begin : begin + len(columns)]


def _converted(stored: NDArray[np.uint8], kind: GGMLQuantizationType) -> Tensor | None:
    """Blocks [..., bytes] → float32 [..., values]; None where some value is no number.

    By the kernels, or by numpy: the same numbers, a dozen times as long.
    """
    library = native.library()
    if library is not None and kind.name in UNPACKED:
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        values = torch.empty(*stored.shape[:-1], stored.shape[-1] // block_bytes * block_values)
        sound = library.unpack(kind.value, stored, stored.size // block_bytes, values)
        return values if sound else None
    convert: Callable[[Any, GGMLQuantizationType], NDArray[np.float32]] = dequantize
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a scale that overflows, told by None
        dense = convert(stored, kind)
    # float32 data is a view of the file, which is mapped read-only
    found = torch.from_numpy(dense if dense.flags.writeable else dense.copy())
    return found if bool(torch.isfinite(found).all()) else None


def _halves(values: Tensor, heads: int, name: str) -> Tensor:
    """Rows of each head from (pair, which of it) order to (which of the pair, pair) order.

    values [rows, columns] of a matrix, or [rows] of its bias.
    """
    rows, *columns = values.shape
    if rows % (2 * heads):
        raise ModelError(f"tensor {name} has {rows} rows, which are no pairs for {heads} heads")
    paired = values.view(heads, rows // heads // 2, 2, *columns)
    return paired.transpose(1, 2).reshape(values.shape)
