"""A decoder's whole step as one native call, so that Python's cost does not grow with layers.

Invariant: a program computes what its Decoder computes, with activations in float32 throughout, and
is made only of decoders whose every part the kernels know: `program_of` gives None for all others,
which then run layer by layer through the same Linears and attention. So a new family needs no
native code to work.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from headrace_worker.native.abi import address_of
from headrace_worker.native.angles import AngleTable
from headrace_worker.native.attention import NativeBackend, Placed
from headrace_worker.native.linear import PANEL, NativeLinear
from headrace_worker.sampling.ranking import Floats
from headrace_worker.step_inputs import StepInputs


@dataclass(frozen=True)
class _Parts:
    """A layer's matrices, all known to be native."""

    qkv: NativeLinear
    out: NativeLinear
    gate_up: NativeLinear
    down: NativeLinear


def _parts_of(layer: object) -> _Parts | None:
    """None for a layer that is more, or other, than the kernels' own."""
    if type(layer) is not Layer or type(layer.mlp) is not Mlp:
        return None
    if layer.mlp.activation is not functional.silu:
        return None
    found = (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
    if not all(isinstance(linear, NativeLinear) for linear in found):
        return None
    return _Parts(*(cast(NativeLinear, linear) for linear in found))


def program_of(model: Decoder, backend: AttentionBackend) -> Program | None:
    """The model's step as one call over `backend`; None where it has to go layer by layer."""
    if not isinstance(backend, NativeBackend) or not (model.first and model.last):
        return None
    parts = [_parts_of(layer) for layer in model.layers]
    if any(part is None for part in parts) or not isinstance(model.head, NativeLinear):
        return None
    if model.config.intermediate_size % PANEL or not isinstance(model.embedding, DenseEmbedding):
        return None
    return Program(model, backend, [part for part in parts if part is not None], model.head)


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of a step's M wanted rows: float32 logits [M, vocab], and `tops` [M].

    `tops`: the token of each row's first highest logit, -1 where that is not finite.
    """

    logits: Floats
    tops: NDArray[np.int64]


class Program:
    """One model over one pool."""

    def __init__(
        self, model: Decoder, backend: NativeBackend, parts: list[_Parts], head: NativeLinear
    ) -> None:
        c = model.config
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
        assert model.embedding is not None, "asked before"
        embedding = model.embedding.table
        scale = model.embedding_scale
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
            embedding_bf16=int(embedding.dtype is torch.bfloat16),
            embedding=embedding.data_ptr(),
            layer=(abi.Layer * len(layers))(*layers),
            norm=self._keep(weights_of(model.norm)),
            rotated=self._keep(torch.tensor([r.rotated for r in c.ropes], dtype=torch.int32)),
            head=head.matrix,
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

    def run(self, inputs: StepInputs) -> Scored | None:
        """What comes of the wanted rows; None where there are none."""
        length = max(inputs.lengths)
        for table in self._tables:
            table.reach(length)
        wanted = inputs.wanted_rows
        logits, tops = np.empty((wanted, self._vocab), np.float32), np.empty(wanted, np.int64)
        placed = Placed(inputs.block_tables, inputs.lengths, inputs.query_starts, inputs.slots)
        step = abi.Step(
            address_of(inputs.tokens),
            address_of(inputs.positions),
            self._cos,
            self._sin,
            None if inputs.rows is None else address_of(inputs.rows),
            wanted,
            0,
            address_of(logits),
            address_of(tops),
        )
        self._backend.library.step(self._model, self._backend.pool, placed.batch, step)
        return Scored(logits, tops) if wanted else None
