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

from headrace_worker.native.abi import (
    FORMAT_F32,
    FORMAT_Q4,
    FORMAT_Q8,
    GROUP,
    PANEL,
    Library,
    Matrix,
)
from headrace_worker.native.pages import in_large_pages

if TYPE_CHECKING:  # quantization imports this module
    from headrace_worker.quantization.int4 import Int4Weight


def pack_float32(weight: Tensor) -> Tensor:
    """weight [out, in] → float32 [panels, in, 16]."""
    padded = functional.pad(weight.float(), (0, 0, 0, -len(weight) % PANEL))
    return padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def in_groups(weight: Tensor) -> Tensor:
    """weight [out, in] → float32 [out, groups, GROUP], padded with zeros."""
    padded = functional.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    return padded.view(len(weight), -1, GROUP)


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
        values, scales = library.round_q8(in_groups(weight))
        return cls(library, FORMAT_Q8, library.pack(FORMAT_Q8, values, scales, None), shape, bias)

    @classmethod
    def of_int4(
        cls, library: Library, weight: Int4Weight, columns: int, bias: Tensor | None
    ) -> NativeLinear:
        """`columns`: how many the matrix had before padding."""
        panels = library.pack(FORMAT_Q4, weight.values, weight.scales, weight.zeros)
        return cls(library, FORMAT_Q4, panels, (len(weight.values), columns), bias)

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
