"""A decoder's whole step as one native call, so that Python's cost does not grow with layers.

A rank's part of a model is one call too: a stage begins with what the one before made, and tensor
ranks add up within the call (see sums.py).

Invariant: a program computes what its Decoder computes, with activations in float32 throughout, and
is made only of decoders whose every part the kernels know: `program_of` gives None for all others,
which then run layer by layer through the same Linears and attention. So a new family needs no
native code to work. Ranks that compute together all have one or none, as what they say to each
other differs: what decides are facts of the whole model and of all its parts, and that all have
kernels or none, which rank 0 asks (see parallel/ranks.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from headrace_worker.attention.interface import AttentionBackend
from headrace_worker.model import Decoder
from headrace_worker.model.layers import Layer, Mlp
from headrace_worker.model.linear import DenseEmbedding
from headrace_worker.model.norms import weights_of
from headrace_worker.native import abi
from headrace_worker.native.abi import PANEL, address_of
from headrace_worker.native.angles import AngleTable
from headrace_worker.native.attention import NativeBackend, Placed
from headrace_worker.native.linear import NativeLinear
from headrace_worker.native.sums import lender_of
from headrace_worker.parallel.collective import Group
from headrace_worker.parallel.shape import Part
from headrace_worker.parallel.sharded import SummedEmbedding, SummedLinear
from headrace_worker.sampling.ranking import Floats
from headrace_worker.step_inputs import StepInputs


@dataclass(frozen=True)
class Split:
    """What a rank computes: one of `parts`, with the others of its stage in `group`."""

    parts: Sequence[Part]
    group: Group

    @property
    def adds_up(self) -> bool:
        return self.group.size > 1

    def suits(self) -> bool:
        """Whether every rank can have a program, if its layers are of a kind that can."""
        whole = self.parts[0].whole
        return whole.experts is None and not any(len(p.inner) % PANEL for p in self.parts)


@dataclass(frozen=True)
class _Parts:
    """A layer's matrices, all known to be native."""

    qkv: NativeLinear
    out: NativeLinear
    gate_up: NativeLinear
    down: NativeLinear


def _parts_of(layer: object, adds_up: bool) -> _Parts | None:
    """None for a layer that is more, or other, than the kernels' own.

    `adds_up`: its ranks do, behind the matrices that narrow.
    """
    if type(layer) is not Layer or type(layer.mlp) is not Mlp:
        return None
    if layer.mlp.activation is not functional.silu:
        return None
    narrow = [layer.attention.out, layer.mlp.down]
    if any(isinstance(linear, SummedLinear) is not adds_up for linear in narrow):
        return None
    out, down = (w.inner if isinstance(w, SummedLinear) else w for w in narrow)
    found = (layer.attention.qkv, out, layer.mlp.gate_up, down)
    if not all(isinstance(linear, NativeLinear) for linear in found):
        return None
    return _Parts(*(cast(NativeLinear, linear) for linear in found))


def program_of(
    model: Decoder, backend: AttentionBackend, split: Split | None = None
) -> Program | None:
    """The model's step as one call over `backend`; None where it has to go layer by layer.

    `split`: for a rank's part.
    """
    if not isinstance(backend, NativeBackend):
        return None
    if model.config.intermediate_size % PANEL or (split is not None and not split.suits()):
        return None
    adds_up = split is not None and split.adds_up
    parts = [_parts_of(layer, adds_up) for layer in model.layers]
    if any(part is None for part in parts):
        return None
    embedding = SummedEmbedding if adds_up else DenseEmbedding
    if model.first and not isinstance(model.embedding, embedding):
        return None
    if model.last and not isinstance(model.head, NativeLinear):
        return None
    return Program(model, backend, [part for part in parts if part is not None], split)


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of a step's M wanted rows: float32 logits [M, vocab], and `tops` [M].

    `tops`: the token of each row's first highest logit, -1 where that is not finite. `drawn`:
    tokens by row, where the step was to draw.
    """

    logits: Floats
    tops: NDArray[np.int64]
    drawn: Mapping[int, int] = field(default_factory=dict)


class Program:
    """One model, or a rank's part of one, over one pool."""

    def __init__(
        self,
        model: Decoder,
        backend: NativeBackend,
        parts: list[_Parts],
        split: Split | None = None,
    ) -> None:
        c = model.config
        self._sums = None
        if split is not None and split.adds_up:
            self._sums = lender_of(split.group)
            assert self._sums is not None, "a group of several ranks adds up"
        self._backend = backend
        self._vocab = c.vocab_size
        self._tables = [AngleTable(rope, c.context_tokens) for rope in c.ropes]
        where = np.array([table.addresses for table in self._tables], np.int64).T.copy()
        self._alive: list[object] = [model, where]
        self._cos = address_of(where)
        self._sin = self._cos + 8 * len(self._tables)
        layers = [
            self._layer(cast(Layer, layer), part, c.window_of(i), c.heads)
            for i, (layer, part) in enumerate(zip(model.layers, parts, strict=True))
        ]
        embedding, scale = model.embedding if model.first else None, model.embedding_scale
        first_token = embedding.first if isinstance(embedding, SummedEmbedding) else 0
        self._model = abi.Model(
            hidden=c.hidden_size,
            inner=c.intermediate_size,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            vocab=c.vocab_size,
            layers=c.layers,
            ropes=len(c.ropes),
            eps=c.norm_eps,
            attention_scale=c.scale,
            embedding_scale=1.0 if scale is None else float(scale),
            embedding_bf16=int(embedding is not None and embedding.table.dtype is torch.bfloat16),
            first_token=first_token,
            embedding=None if embedding is None else embedding.table.data_ptr(),
            layer=(abi.Layer * len(layers))(*layers),
            norm=self._keep(weights_of(model.norm)) if model.last else None,
            rotated=self._keep(torch.tensor([r.rotated for r in c.ropes], dtype=torch.int32)),
            head=cast(NativeLinear, model.head).matrix if model.last else abi.Matrix(),
        )

    def _keep(self, tensor: Tensor) -> int:
        """The tensor's address, in float32 unless it holds integers; it stays there."""
        kept = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        self._alive.append(kept)
        return kept.data_ptr()

    def _layer(self, layer: Layer, parts: _Parts, window: int, heads: int) -> abi.Layer:
        attention = layer.attention
        q_norm = k_norm = None
        if attention.qk_norm is not None:
            rows = weights_of(attention.qk_norm)
            q_norm, k_norm = self._keep(rows[0]), self._keep(rows[heads])
        return abi.Layer(
            attention_norm=self._keep(weights_of(layer.attention_norm)),
            mlp_norm=self._keep(weights_of(layer.mlp_norm)),
            q_norm=q_norm,
            k_norm=k_norm,
            qkv=parts.qkv.matrix,
            out=parts.out.matrix,
            gate_up=parts.gate_up.matrix,
            down=parts.down.matrix,
            rope=attention.rope,
            window=window,
        )

    def run(self, inputs: StepInputs, x: Tensor | None = None) -> Scored | None:
        """What comes of the wanted rows; None where there are none. For the last stage.

        `x`, float32 [N, hidden], is what the stage before made, None for the first. Raises
        PeerError.
        """
        wanted = inputs.wanted_rows
        logits, tops = np.empty((wanted, self._vocab), np.float32), np.empty(wanted, np.int64)
        step = self._step(inputs, x, wanted)
        step.logits, step.tops = address_of(logits), address_of(tops)
        draws = inputs.draws
        if draws is None or not len(draws):
            self._compute(inputs, step)
            return Scored(logits, tops) if wanted else None
        held = abi.bytes_of(draws.packed)
        step.draws, step.draw_count = ctypes.addressof(held), len(draws)
        self._compute(inputs, step)
        return Scored(logits, tops, draws.tokens())

    def pass_on(self, inputs: StepInputs, x: Tensor | None) -> Tensor:
        """What a stage before the last one makes, float32 [N, hidden]. Raises PeerError."""
        passed = torch.empty(len(inputs.tokens), self._model.hidden)
        step = self._step(inputs, x, 0)
        step.passed = passed.data_ptr()
        self._compute(inputs, step)
        return passed

    def _step(self, inputs: StepInputs, x: Tensor | None, wanted: int) -> abi.Step:
        assert x is None or x.is_contiguous(), "stages hand on whole tensors"
        return abi.Step(
            address_of(inputs.tokens),
            address_of(inputs.positions),
            self._cos,
            self._sin,
            None if inputs.rows is None else address_of(inputs.rows),
            wanted,
            given=None if x is None else x.data_ptr(),
        )

    def _compute(self, inputs: StepInputs, step: abi.Step) -> None:
        length = max(inputs.lengths)
        for table in self._tables:
            table.reach(length)
        placed = Placed(inputs.block_tables, inputs.lengths, inputs.query_starts, inputs.slots)
        library, pool = self._backend.library, self._backend.pool
        if self._sums is None:
            library.step(self._model, pool, placed.batch, step)
            return
        with self._sums.lent() as step.sums:
            library.step(self._model, pool, placed.batch, step)
