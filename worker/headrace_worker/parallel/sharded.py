"""A rank's part of a model's weights, cut out as they are read, and the sums that join the parts.

Source: Shoeybi et al., "Megatron-LM", 2019.

Invariant: model code is built as ever, from a config and a `Weights` whose numbers are this rank's;
that it is a part, only the layers know that end in a sum over the ranks. Matrices that widen
(q, k, v, gate, up) are cut by rows, those that narrow again (attention output, down) by columns, so
that each half of a block needs one sum, of its own output. Experts are dealt whole and summed once
for all. Embedding and head are cut by the vocabulary's rows: the embedding ends in a sum too, the
head in nobody's: see vocabulary.py.

Tensors are known by their last name, as in `quantization`. Whatever is not listed is whole on every
rank: norms, routers. A bias behind a sum is added by the first rank alone.

Rejected: cutting a loaded model, which needs the whole of it in memory; wrapping layers from
outside after they are built, which would undo packing and quantization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from headrace.errors import ModelError
from headrace_worker.model.linear import Embedding, Linear
from headrace_worker.model.weights import Weights
from headrace_worker.native.linear import NativeLinear
from headrace_worker.parallel.collective import Group
from headrace_worker.parallel.shape import Part

if TYPE_CHECKING:
    from headrace_worker.loading.source import Source  # which imports this module

NARROWING = frozenset({"o_proj", "down_proj"})
"""Matrices whose columns are cut, so that their products have to be summed."""
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r".+\.experts\.(\d+)\..+")


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rows and columns of a stored matrix a rank holds; None: all, of whatever number.

    `row_count`, `column_count`: of the whole matrix.
    """

    rows: tuple[range, ...] | None = None
    row_count: int = 0
    columns: range | None = None
    column_count: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor of `shape` is what this cut is of."""
        if self.columns is not None and (len(shape) != 2 or shape[1] != self.column_count):
            return False
        return self.rows is None or shape[0] == self.row_count

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that is left of `shape`."""
        rows, *columns = shape
        rows = rows if self.rows is None else sum(map(len, self.rows))
        return (rows, *(columns if self.columns is None else [len(self.columns)]))


def cuts_of(part: Part) -> dict[str, Cut]:
    """The cuts of all matrices that are cut, by the last part of their names."""
    whole, size = part.whole, part.whole.head_dim
    q = range(part.heads.start * size, part.heads.stop * size)
    kv = range(part.kv_heads.start * size, part.kv_heads.stop * size)
    q_all, kv_all, inner_all = whole.heads * size, whole.kv_heads * size, whole.intermediate_size
    queries, keys = _rows((q, q_all)), _rows((kv, kv_all))
    wide, vocab = _rows((part.inner, inner_all)), _rows((part.vocab, whole.vocab_size))
    return {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": _rows((q, q_all), (kv, kv_all), (kv, kv_all)),
        "o_proj": Cut(columns=q, column_count=q_all),
        "gate_proj": wide,
        "up_proj": wide,
        "gate_up_proj": _rows((part.inner, inner_all), (part.inner, inner_all)),
        "down_proj": Cut(columns=part.inner, column_count=inner_all),
        "embed_tokens": vocab,
        "lm_head": vocab,
    }


def _rows(*sections: tuple[range, int]) -> Cut:
    """The cut of matrices stacked in one: of each a run, and how many rows it has."""
    runs, start = [], 0
    for run, count in sections:
        runs.append(range(start + run.start, start + run.stop))
        start += count
    return Cut(rows=tuple(runs), row_count=start)


class ShardedTensors:
    """The tensors of one rank, as if its part were a small model in files of its own.

    Layers count from 0. A tensor is in its part, renamed, or it is another rank's; one that belongs
    to no model like this keeps its name, so that loading refuses it as it would without ranks.
    """

    def __init__(self, source: Source, part: Part) -> None:
        self._source, self._part = source, part
        self._cuts = cuts_of(part)
        self._stored = {
            local: name for name in source.names() if (local := self._local(name)) is not None
        }

    def _local(self, name: str) -> str | None:
        """What `name` is called here; None for what other ranks hold."""
        part, whole = self._part, self._part.whole
        if name == _EMBEDDING:
            return name if part.first or (part.last and whole.tied) else None
        if name in (_NORM, _HEAD):
            return name if part.last else None
        layer = _LAYER.fullmatch(name)
        if layer is None or int(layer[1]) >= whole.layers:
            return name
        expert = _EXPERT.fullmatch(name)
        others = (
            int(layer[1]) not in part.layers
            or (name.endswith(".bias") and part.tensor_rank > 0 and _last(name) in NARROWING)
            or (expert is not None and self._elsewhere(int(expert[1])))
        )
        return None if others else f"model.layers.{int(layer[1]) - part.layers.start}.{layer[2]}"

    def _elsewhere(self, expert: int) -> bool:
        e = self._part.whole.experts
        held = self._part.experts
        return e is not None and held is not None and expert < e.count and expert not in held

    def _cut(self, stored: str) -> Cut:
        """Vectors, which are biases or norms, have rows only."""
        last = _last(stored)
        if self._part.tensor == 1 or _EXPERT.fullmatch(stored):
            return Cut()
        if stored.endswith(".bias") and last in NARROWING:
            return Cut()
        return self._cuts.get(last, Cut())

    def names(self) -> set[str]:
        return set(self._stored)

    def read(self, name: str) -> Tensor:
        """The rank's part of the tensor. Raises ModelError for a tensor of another shape."""
        stored = self._stored[name]
        shape, cut = self._source.shape(stored), self._cut(stored)
        if cut == Cut():
            return self._source.read(stored)
        if not cut.fits(shape):
            expected = (
                f"{cut.row_count} rows" if cut.columns is None else f"{cut.column_count} columns"
            )
            raise ModelError(f"tensor {stored} has shape {list(shape)}, not {expected}")
        return self._source.read_part(stored, cut.rows or (range(shape[0]),), cut.columns)

    def stored_bytes(self, name: str) -> int:
        stored = self._stored[name]
        shape = self._source.shape(stored)
        left = math.prod(self._cut(stored).of(shape)) / max(1, math.prod(shape))
        return round(self._source.stored_bytes(stored) * left)

    def largest_values(self) -> int:
        return max(
            math.prod(self._cut(stored).of(self._source.shape(stored)))
            for stored in self._stored.values()
        )


def _last(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.split(".")[-2] if "." in name else name


class SummedLinear:
    """A Linear over some columns of its matrix, whose ranks add up what they have.

    Where the native kernels multiply, sums are of float32 and rounded once, as in one process.
    """

    def __init__(self, inner: Linear, group: Group) -> None:
        self.inner, self._group = inner, group
        self._exact = isinstance(inner, NativeLinear)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float() if self._exact else x
        return self._group.all_reduce(self.inner(wide)).to(x.dtype)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._exact or residual.dtype is torch.float32:  # as one process adds up
            wide = x.float() if self._exact else x
            return (self._group.all_reduce(self.inner(wide)) + residual).to(residual.dtype)
        # one rank brings the residual in: no operation more, and one rounding as ever
        first = self._group.rank == 0
        mine = self.inner.added(x, residual) if first else self.inner(x)
        return self._group.all_reduce(mine)


class SummedEmbedding:
    """An Embedding over a run of the vocabulary: others' tokens are zeros until they are summed."""

    def __init__(self, table: Tensor, vocab: range, group: Group) -> None:
        self.table, self.first = table, vocab.start
        self._group = group

    def __call__(self, tokens: Tensor) -> Tensor:
        places = tokens - self.first
        others = (places < 0) | (places >= len(self.table))
        x = functional.embedding(places.masked_fill(others, 0), self.table)
        return self._group.all_reduce(x.masked_fill_(others[:, None], 0))


class ShardedWeights:
    """Weights of a rank whose tensors are cut already, with the sums that this takes."""

    def __init__(self, inner: Weights, part: Part, group: Group) -> None:
        assert group.size == part.tensor and group.rank == part.tensor_rank, "another rank's part"
        self._inner, self._part, self._group = inner, part, group

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.dtype

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._inner.take(name, shape)

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        table = self._inner.take(name, shape)
        return SummedEmbedding(table, self._part.vocab, self._group)

    def linear(
        self, names: Sequence[str], outs: Sequence[int], columns: int, *, bias: bool = False
    ) -> Linear:
        last = names[0].rsplit(".", 1)[-1]
        if last not in NARROWING or _EXPERT.fullmatch(names[0]):
            return self._inner.linear(names, outs, columns, bias=bias)
        mine = bias and self._group.rank == 0
        return SummedLinear(self._inner.linear(names, outs, columns, bias=mine), self._group)

    def router(self, name: str, shape: tuple[int, int]) -> Linear:
        return self._inner.router(name, shape)

    def tied_head(self, embedding: Tensor) -> Linear:
        return self._inner.tied_head(embedding)

    def total(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(x)
