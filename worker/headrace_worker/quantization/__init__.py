"""Which matrix gets which number of bits, when a model is loaded quantized.

Invariant: the choice looks at a matrix's role, its width and its own weights, never at activations
or a text: loading stays one pass over the file, one matrix at a time.

int8: all linear layers. int4: all but the output head, and but those where 4 bits cost more than
they may. Measured on SmolLM2 with weights that were not in 4 bits before, all in int4 costs 19 % of
perplexity: 9 of them by q, k and v (6 by v alone), 5 by gate and up, 2 by down, 1 by the attention
output. So the stack of q, k and v, a tenth of a model with grouped queries, is int8, and in models
narrower than `NARROW` columns, where fewer errors average out, gate and up are int8 too: 2 to 4 %
are left. A matrix that int4 holds almost exactly (see `EXACT_ERROR`), as those of a 4-bit GGUF, is
int4 whatever its role. The head costs 5 % in int4, nothing in int8. Embeddings, norms and routers
of experts keep the model's dtype.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from headrace_worker import native
from headrace_worker.model.linear import DenseLinear
from headrace_worker.native.abi import Library
from headrace_worker.native.linear import NativeLinear
from headrace_worker.quantization.int4 import Int4Linear, quantize_weight
from headrace_worker.quantization.int8 import Int8Linear

Quantization = Literal["none", "int8", "int4"]
AnyLinear = DenseLinear | Int8Linear | Int4Linear | NativeLinear
MODES: tuple[Quantization, ...] = ("none", "int8", "int4")

NARROW = 2048
EXACT_ERROR = 0.01
"""Int4Weight.error up to which nothing is lost."""


class Role(Enum):
    """What a matrix does in a model, as far as rounding it matters."""

    QKV = "qkv"
    GATE_UP = "gate_up"
    HEAD = "head"
    OTHER = "other"

    @classmethod
    def of(cls, name: str) -> Role:
        """The role of a stack of matrices whose first has this name in a checkpoint."""
        return _ROLES.get(name.rsplit(".", 1)[-1], cls.OTHER)


_ROLES = {
    "q_proj": Role.QKV,
    "qkv_proj": Role.QKV,
    "gate_proj": Role.GATE_UP,
    "gate_up_proj": Role.GATE_UP,
    "w1": Role.GATE_UP,
    "lm_head": Role.HEAD,
}


def make_linear(
    mode: Quantization, weight: Tensor, bias: Tensor | None, role: Role, dtype: torch.dtype
) -> AnyLinear:
    """A Linear over weight [out, in], best in float32, and bias [out], for inputs of `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    library = native.library()
    if mode == "none":
        if library is not None and dtype is torch.float32:
            return NativeLinear.of_float32(library, weight, bias)
        return DenseLinear(weight.to(dtype), bias)
    if mode == "int8" or role is Role.HEAD:
        return _int8(library, weight, bias)
    quantized = quantize_weight(weight, library)
    spared = role is Role.QKV or (role is Role.GATE_UP and weight.shape[1] < NARROW)
    if spared and quantized.error > EXACT_ERROR:
        return _int8(library, weight, bias)
    if library is not None:
        return NativeLinear.of_int4(library, quantized, weight.shape[1], bias)
    return Int4Linear(quantized, weight.shape[1], bias)


def _int8(library: Library | None, weight: Tensor, bias: Tensor | None) -> AnyLinear:
    if library is not None:
        return NativeLinear.of_int8(library, weight, bias)
    return Int8Linear(weight, bias)


__all__ = ["MODES", "AnyLinear", "Quantization", "Role", "make_linear"]
