"""Linear layers: what models call, and the plain one, in the form its machine multiplies fastest;
embeddings.

Invariant: packing changes where the weights stand in memory, not what is multiplied. In bfloat16
oneDNN otherwise re-orders the whole weight matrix at every call; packed once, the multiplications
of a decode step take two thirds of the time. The packed form is what torch's own compiler emits;
where this build of torch lacks it, the plain form stays.

Rejected: torch.compile, whose start-up costs a minute and a compiler; float32 packing, which
measured slower at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headrace_worker.probing import one_thread


@dataclass(frozen=True)
class _Packing:
    """oneDNN's prepacked bfloat16 linear: pack once, then multiply, or multiply and add."""

    pack: Callable[..., Tensor]
    multiply: Callable[..., Tensor]
    multiply_add: Callable[..., Tensor]


def _packing() -> _Packing | None:
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        packing = _Packing(
            torch.ops.mkldnn._reorder_linear_weight.default,
            torch.ops.mkldnn._linear_pointwise.default,
            torch.ops.mkldnn._linear_pointwise.binary,
        )
        with one_thread():
            row = torch.zeros(1, 16, dtype=torch.bfloat16)
            probe = packing.pack(torch.zeros(16, 16, dtype=torch.bfloat16), None)
            packing.multiply(row, probe, None, "none", [], "")
            packing.multiply_add(row, row, probe, None, "add")
    except (AttributeError, RuntimeError):  # another build or version of torch
        return None
    return packing


_PACKING = _packing()


class Linear(Protocol):
    """y [N, out] = x [N, in] @ weight [out, in] transposed, plus a bias if it has one."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] → [N, out]."""
        ...

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [N, out] plus the product, rounded once where the machine can."""
        ...


class DenseLinear:
    """A Linear whose weights stay in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in], bias [out]. Unless it is `packed`, the weight stays the caller's."""
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        bfloat16 = weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
        self._packing = _PACKING if bfloat16 else None
        self.packed = self._packing is not None
        if self._packing is not None:
            weight = self._packing.pack(weight.contiguous(), None)
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._packing is None:
            return functional.linear(x, self._weight, self._bias)
        return self._packing.multiply(x, self._weight, self._bias, "none", [], "")

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._packing is None:
            return residual + functional.linear(x, self._weight, self._bias)
        return self._packing.multiply_add(x, residual, self._weight, self._bias, "add")


class Embedding(Protocol):
    """Rows of `table` [vocab, hidden] by token id."""

    table: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 [N] → [N, hidden]."""
        ...


class DenseEmbedding:
    """An Embedding whose whole table is here."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.table)
