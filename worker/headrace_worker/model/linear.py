"""A linear layer without bias, in the form its machine multiplies fastest.

Invariant: packing changes where the weights stand in memory, not what is multiplied. In bfloat16
oneDNN otherwise re-orders the whole weight matrix at every call; packed once, a decode step of a
135M model takes two thirds of the time. The packed form is what torch's own compiler emits; where
this build of torch lacks it, the plain form stays.

Rejected: torch.compile, whose start-up costs a minute and a compiler; float32 packing, which
measured slower at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def _packing() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """(pack, multiply) of oneDNN's prepacked bfloat16 linear, where it exists."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        pack = torch.ops.mkldnn._reorder_linear_weight.default
        multiply = torch.ops.mkldnn._linear_pointwise.default
        probe = pack(torch.zeros(16, 16, dtype=torch.bfloat16), None)
        multiply(torch.zeros(1, 16, dtype=torch.bfloat16), probe, None, "none", [], "")
    except (AttributeError, RuntimeError):  # another build or version of torch
        return None
    return pack, multiply


_PACKING = _packing()


class Linear(nn.Module):
    """y [N, out] = x [N, in] @ weight [out, in] transposed."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._multiply: Callable[..., Tensor] | None = None
        if _PACKING is not None and weight.dtype is torch.bfloat16 and weight.device.type == "cpu":
            pack, self._multiply = _PACKING
            weight = pack(weight.contiguous(), None)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self._multiply is not None:
            return self._multiply(x, self.weight, None, "none", [], "")
        return functional.linear(x, self.weight)
