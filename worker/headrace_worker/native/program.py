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
from torch import Tensor
from torch.nn import functional

from headrace_worker.attention.interface import AttentionBackend, AttentionBatch
from headrace_worker.model import Decoder
from headrace_worker.model.layers import Layer, Mlp
from headrace_worker.model.linear import DenseEmbedding
from headrace_worker.model.norms import weights_of
from headrace_worker.model.rope import Angles
from headrace_worker.native import abi
from headrace_worker.native.attention import NativeBackend
from headrace_worker.native.linear import PANEL, NativeLinear
from headrace_worker.probing import one_thread
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


class Program:
    """One model over one pool."""

    def __init__(
        self, model: Decoder, backend: NativeBackend, parts: list[_Parts], head: NativeLinear
    ) -> None:
        c = model.config
        self._backend = backend
        self._vocab = c.vocab_size
        self._alive: list[object] = [model]
        self._angles = [Angles(rope, c.context_tokens, torch.float32) for rope in c.ropes]
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

    def run(self, inputs: StepInputs) -> Tensor | None:
        """Float32 logits of the wanted rows [M, vocab]; None where there are none."""
        slots, positions = torch.from_numpy(inputs.slots), torch.from_numpy(inputs.positions)
        attend = self._backend.prepare(
            AttentionBatch(inputs.block_tables, inputs.lengths, inputs.query_starts, slots)
        )
        with (
            one_thread()
        ):  # a pool of torch's would spin for milliseconds against the kernels' team
            turns = [angles(positions) for angles in self._angles]
        tables = np.array(
            [cos.data_ptr() for cos, _ in turns] + [sin.data_ptr() for _, sin in turns], np.int64
        )
        wanted = inputs.wanted_rows
        logits = torch.empty(wanted, self._vocab)
        at = abi.address_of(tables)
        step = abi.Step(
            tokens=abi.address_of(inputs.tokens),
            cos=at,
            sin=at + 8 * len(turns),
            sampled=None if inputs.rows is None else abi.address_of(inputs.rows),
            sampled_rows=wanted,
            logits=logits.data_ptr(),
        )
        self._backend.library.step(self._model, self._backend.pool, attend.batch, step)
        return logits if wanted else None
