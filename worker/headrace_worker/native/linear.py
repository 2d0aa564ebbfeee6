"""Linear layers by the native kernels: weights packed once, in float32, 8 or 4 bits.

Invariant: a row's result does not depend on the rows beside it, bit for bit. 8 bits: weights and
activations in groups of 32 columns, each with its scale, as llama.cpp's Q8_0, but both multiplied
with a Hadamard matrix before they are rounded (and the weights divided by 32, so that the product
stays): it spreads an outlier over its group. 4 bits: the same weights as quantization/int4.py,
multiplied with activations in 8 bits. Products within a group are summed as integers, groups in
float32 in the order of the columns, in one run or in several: see order.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from headrace_worker.native.abi import FORMAT_F32, FORMAT_Q4, FORMAT_Q8, Library, Matrix
from headrace_worker.native.pages import in_large_pages

if TYPE_CHECKING:  # quantization imports this module
    from headrace_worker.quantization.int4 import Int4Weight

PANEL, GROUP = 16, 32
LEVELS = 127
_SCALE_MIN = 1e-30
_STORED_ZERO = 128
"""What a weight of 0 is stored as: the processor multiplies unsigned by signed bytes."""


def pack_float32(weight: Tensor) -> Tensor:
    """weight [out, in] → float32 [panels, in, 16]."""
    padded = functional.pad(weight.float(), (0, 0, 0, -len(weight) % PANEL))
    return padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def turned(groups: Tensor) -> Tensor:
    """float32 [..., GROUP] times Sylvester's Hadamard matrix, in the kernels' order of sums."""
    x = groups
    for step in (1, 2, 4, 8, 16):
        pairs = x.reshape(*x.shape[:-1], -1, 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), -2).flatten(-3)
    return x


def quantize_q8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → turned, int8 [out, in padded to groups], float32 scales [out, groups].

    Scales are rounded up to bfloat16, so that no weight is cut off.
    """
    padded = functional.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    groups = turned(padded.view(len(weight), -1, GROUP)) / GROUP
    exact = (groups.abs().amax(-1) / LEVELS).clamp_min_(_SCALE_MIN)
    scales = exact.bfloat16().float()
    low = scales < exact
    scales[low] = (scales[low].view(torch.int32) + (1 << 16)).view(torch.float32)
    values = (groups / scales[..., None]).round_().to(torch.int8)
    return values.view(padded.shape), scales


def _panels(values: Tensor, parts: int) -> Tensor:
    """uint8 [out, in] → [panels, groups, parts, 16, GROUP / parts], out padded with zeros."""
    out, columns = values.shape
    padded = functional.pad(values, (0, 0, 0, -out % PANEL))
    shape = (-1, PANEL, columns // GROUP, parts, GROUP // parts)
    return padded.view(shape).permute(0, 2, 3, 1, 4)


def _factors(values: Tensor) -> Tensor:
    """float32 [out, groups] that bfloat16 holds → bytes [panels, groups, 32]."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % PANEL))
    panels = padded.view(-1, PANEL, values.shape[1]).transpose(1, 2)
    return panels.bfloat16().contiguous().view(torch.uint8)


def pack_q8(values: Tensor, scales: Tensor) -> Tensor:
    """As `quantize_q8` gives them → uint8 [panels, groups, 544]."""
    stored = (values.to(torch.int16) + _STORED_ZERO).to(torch.uint8)
    weights = _panels(stored, 8).flatten(2)
    return torch.cat((weights, _factors(scales)), -1).contiguous()


def pack_q4(weight: Int4Weight) -> Tensor:
    """→ uint8 [panels, groups, 320]; column c of a group in the low half, c + 16 in the high."""
    halves = _panels(weight.values, 8)
    weights = (halves[:, :, :4] | (halves[:, :, 4:] << 4)).flatten(2)
    return torch.cat((weights, _factors(weight.scales), _factors(weight.zeros)), -1).contiguous()


class NativeLinear:
    """A Linear that the kernels multiply."""

    def __init__(
        self,
        library: Library,
        format_number: int,
        panels: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> None:
        """`shape`: (outs, columns) of the matrix; bias [out] in any dtype."""
        self._library = library
        self._panels = panels = in_large_pages(panels)
        self._bias = None if bias is None else bias.float().contiguous()
        self.outs = shape[0]
        self.weight_bytes = panels.nbytes + (0 if bias is None else bias.nbytes)
        self.matrix = Matrix(
            format=format_number,
            outs=shape[0],
            columns=shape[1],
            panels=panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
        )
        """Points into this object's tensors."""

    def cut(self, columns: tuple[int, ...]) -> None:
        """Sums the columns in runs that end there (0, 1 or 3, between groups) and at the last."""
        assert len(columns) in (0, 1, 3) and not any(c % GROUP for c in columns), "see order.py"
        unit = 1 if self.matrix.format == FORMAT_F32 else GROUP
        self.matrix.cuts = len(columns)
        for i, column in enumerate(columns):
            self.matrix.cut[i] = column // unit

    @classmethod
    def of_float32(cls, library: Library, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """weight [out, in], kept as exact as it is in float32."""
        shape = (weight.shape[0], weight.shape[1])
        return cls(library, FORMAT_F32, pack_float32(weight), shape, bias)

    @classmethod
    def of_int8(cls, library: Library, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """weight [out, in], best in float32."""
        shape = (weight.shape[0], weight.shape[1])
        return cls(library, FORMAT_Q8, pack_q8(*quantize_q8(weight)), shape, bias)

    @classmethod
    def of_int4(
        cls, library: Library, weight: Int4Weight, columns: int, bias: Tensor | None
    ) -> NativeLinear:
        """`columns`: how many the matrix had before padding."""
        return cls(library, FORMAT_Q4, pack_q4(weight), (len(weight.values), columns), bias)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float().contiguous()
        out = wide.new_empty((len(x), self.outs))
        self._library.linear(self.matrix, wide, None, out)
        return out.to(x.dtype)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        wide, base = x.float().contiguous(), residual.float().contiguous()
        out = torch.empty_like(base)
        self._library.linear(self.matrix, wide, base, out)
        return out.to(residual.dtype)
