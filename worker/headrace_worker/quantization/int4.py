"""Linear layers with 4-bit weights in groups of 32 columns, each with its scale and its zero point.

Invariant: a weight is (q - 8) * scale + zero with q from 0 to 15 and both factors in bfloat16, 5
bits a weight in all, whichever way it is multiplied. A row's result does not depend on what the
other rows hold; how many there are decides between two ways that round differently.

Up to `KERNEL_ROWS_MAX` rows take torch's int4 kernel, in bfloat16 whatever the model's dtype (its
float32 path is 20 times slower). It reads a third of the bytes that bfloat16 weights are, but takes
no matrix instruction, so that more rows are cheaper dequantized first. One core with AMX, all
layers of SmolLM2, milliseconds at 1 / 8 / 64 / 512 rows: bfloat16 22 / 22 / 30 / 122, kernel
7 / 23 / 161 / 1330, dequantizing and multiplying 230 / 230 / 260 / 380.

Smallest and largest weight of a group are exact. Rejected, measured on weights that were not in 4
bits before: clipping by mean squared error, least squares for scale and zero, and rotation, which
all lower the weights' error and raise perplexity (by 7, 4 and 9 %); columns sorted by size, so
that like share a group (20 % worse); groups of 64 (30 % worse). A matrix whose weights already
stand on a grid of at most 16 levels, as a 4-bit GGUF's do, gets that grid back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headrace_worker.probing import one_thread

GROUP = 32
LEVELS = 15
_MIDDLE = 8
_SPANS = range(LEVELS, 4, -1)
"""How many steps may lie between a group's extremes, where the weights stand on a grid."""
_GRID_ERROR_SHARE = 1 / 16
"""A grid is there when its error is below this share of plain rounding's, in mean square."""
_SAMPLED_ROWS = 64
_ROWS_AT_A_TIME = 1024
_SCALE_MIN = 1e-30

KERNEL_ROWS_MAX = 96


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A quantized matrix: values uint8 [out, in], 0 to 15, scales and zeros [out, in / GROUP].

    Columns are padded to whole groups; scales and zeros are float32 that bfloat16 holds. `error`:
    the root mean square of what rounding did, over that of the weights.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    error: float

    def dequantized(self) -> Tensor:
        """float32 [out, in], columns padded."""
        groups = self.values.view(*self.scales.shape, GROUP).float() - _MIDDLE
        return (groups * self.scales[..., None] + self.zeros[..., None]).view(self.values.shape)


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _rounded(groups: Tensor, steps: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales, zeros of groups [..., GROUP] whose extremes are `steps` apart."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = _bfloat16(((high - low) / steps).clamp_min_(_SCALE_MIN))
    zeros = _bfloat16(low + _MIDDLE * scales)
    values = ((groups - zeros) / scales).round_().clamp_(-_MIDDLE, LEVELS - _MIDDLE)
    return values, scales, zeros


def _errors(groups: Tensor, steps: int) -> Tensor:
    """Sum of squares per group, [..., 1]: in halves, so that the kernels come to the same bits."""
    values, scales, zeros = _rounded(groups, steps)
    squares = (values * scales + zeros - groups).pow_(2)
    while (half := squares.shape[-1] // 2) > 0:
        squares = squares[..., :half] + squares[..., half:]
    return squares


def _best_spans(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Per group the steps between its extremes that fit best, and their error."""
    best = _errors(groups, LEVELS)
    spans = torch.full_like(best, LEVELS)
    for steps in _SPANS[1:]:
        errors = _errors(groups, steps)
        better = errors < best * _GRID_ERROR_SHARE
        spans[better] = steps
        best = torch.where(better, errors, best)
    return spans, best


class Rounding(Protocol):
    """Who rounds groups [..., GROUP] float32: torch, or the native kernels, to the same bits."""

    def grid_errors(self, groups: Tensor) -> tuple[float, float]:
        """Squared errors of plain rounding, and of the spans that fit best."""

    def round_q4(
        self, groups: Tensor, *, grid: bool
    ) -> tuple[Tensor, Tensor, Tensor, float, float]:
        """Values, scales and zeros; squared errors, and squares. `grid`: not just LEVELS steps."""


class _ByTorch:
    """The reference of the kernels, which are 20 times as fast."""

    def grid_errors(self, groups: Tensor) -> tuple[float, float]:
        return float(_errors(groups, LEVELS).sum()), float(_best_spans(groups)[1].sum())

    def round_q4(
        self, groups: Tensor, *, grid: bool
    ) -> tuple[Tensor, Tensor, Tensor, float, float]:
        values = torch.empty(groups.shape, dtype=torch.uint8)
        scales, zeros = torch.empty(2, *groups.shape[:-1]).unbind(0)
        lost = total = 0.0
        for start in range(0, len(groups), _ROWS_AT_A_TIME):  # what is between takes as much again
            rows = slice(start, start + _ROWS_AT_A_TIME)
            some = groups[rows]
            found, scale, zero = _rounded(some, _best_spans(some)[0] if grid else LEVELS)
            values[rows] = (found + _MIDDLE).to(torch.uint8)
            scales[rows], zeros[rows] = scale[..., 0], zero[..., 0]
            lost += float(found.mul_(scale).add_(zero).sub_(some).square_().sum())
            total += float(some.square().sum())
        return values, scales, zeros, lost, total


def quantize_weight(weight: Tensor, by: Rounding | None = None) -> Int4Weight:
    """weight [out, in], best in float32, of any shape; `by`: the native kernels, None for torch.

    Weights are taken to stand on a grid where other spans than LEVELS bring their error to nearly
    nothing. That is so for weights that were in 4 bits before, where a group need not use all 16
    levels.
    """
    by = by or _ByTorch()
    out, columns = weight.shape
    missing = -columns % GROUP
    # the last column again: a zero could widen the group's range
    padded = torch.cat((weight, weight[:, -1:].expand(-1, missing)), 1) if missing else weight
    groups = padded.float().view(out, -1, GROUP)
    plain, best = by.grid_errors(groups[:: max(1, out // _SAMPLED_ROWS)])
    values, scales, zeros, lost, total = by.round_q4(groups, grid=best < plain * _GRID_ERROR_SHARE)
    error = (lost / total) ** 0.5 if total else 0.0
    return Int4Weight(values.view(out, -1), scales, zeros, error)


def _pack(values: Tensor, lanes: int) -> Tensor:
    """values uint8 [out, in], out a multiple of `lanes` → uint8 [out, in / 2].

    Per `lanes` rows, a run per column: row i in the low half of a byte, row i + lanes / 2 in the
    high half. That is the layout of torch's kernel for vectors of lanes / 4 float32.
    """
    out, columns = values.shape
    runs = values.view(out // lanes, 2, lanes // 2, columns).permute(0, 3, 1, 2)
    packed: Tensor = runs[:, :, 0] | (runs[:, :, 1] << 4)
    return packed.contiguous().view(out, columns // 2)


@dataclass(frozen=True)
class _Kernel:
    """torch's int4 product, and how many rows its layout takes together."""

    lanes: int
    available: bool

    def multiply(self, x: Tensor, packed: Tensor, factors: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x, packed, GROUP, factors
        )
        return product


def _kernel() -> _Kernel:
    """The kernel whose layout `_pack` writes on this processor, if there is one."""
    values = (torch.arange(128)[:, None] * 7 + torch.arange(GROUP) * 3).remainder(16)
    for lanes in (64, 32):
        try:
            theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(values.int(), 1)
            ours = _pack(values.to(torch.uint8), lanes)
            factors = torch.ones(1, 128, 2, dtype=torch.bfloat16)
            row = torch.ones(1, GROUP, dtype=torch.bfloat16)
            found = _Kernel(lanes, True).multiply(row, ours, factors)
            expected = (values - _MIDDLE + 1).sum(1)
            if torch.equal(theirs, ours) and torch.equal(found[0].long(), expected):
                return _Kernel(lanes, True)
        except (AttributeError, RuntimeError):  # another build or version of torch
            break
    return _Kernel(64, False)


with one_thread():
    _KERNEL = _kernel()


class Int4Linear:
    """A Linear with 4-bit weights; what it multiplies them with stays a float."""

    def __init__(self, weight: Int4Weight, columns: int, bias: Tensor | None = None) -> None:
        """`columns`: how many the matrix had before padding; bias [out] in the results' dtype."""
        self._kernel = _KERNEL
        self._out, padded = weight.values.shape
        self._missing_columns = padded - columns
        rows = (0, 0, 0, -self._out % self._kernel.lanes)
        self._packed = _pack(functional.pad(weight.values, rows), self._kernel.lanes)
        factors = torch.stack((weight.scales, weight.zeros), -1).bfloat16()
        self._factors = functional.pad(factors, (0, 0, *rows)).transpose(0, 1).contiguous()
        self._bias = bias
        self.weight_bytes = self._packed.nbytes + self._factors.nbytes
        self.weight_bytes += 0 if bias is None else bias.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The transposed matrix [in, out], both padded."""
        groups, out, _ = self._factors.shape
        lanes = self._kernel.lanes
        packed = self._packed.view(out // lanes, groups, GROUP, lanes // 2)
        halves = torch.empty((*packed.shape[:3], 2, lanes // 2), dtype=dtype)
        halves[..., 0, :] = packed & 15
        halves[..., 1, :] = packed >> 4
        factors = self._factors.to(dtype).view(groups, 1, out // lanes, lanes, 2)
        scales, zeros = factors.permute(4, 2, 0, 1, 3).unbind(0)
        runs = halves.sub_(_MIDDLE).view(out // lanes, groups, GROUP, lanes)
        weights = torch.addcmul(zeros, runs, scales)
        return weights.permute(1, 2, 0, 3).reshape(groups * GROUP, out)

    def __call__(self, x: Tensor) -> Tensor:
        if self._missing_columns:
            x = functional.pad(x, (0, self._missing_columns))
        if self._kernel.available and len(x) <= KERNEL_ROWS_MAX:
            product = self._kernel.multiply(x.bfloat16(), self._packed, self._factors).to(x.dtype)
        else:
            product = torch.mm(x, self.dequantized(x.dtype))
        product = product[:, : self._out]
        return product if self._bias is None else product + self._bias

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What Int4Linear computes, by dequantizing: float64 [N, out]."""
    dense = quantize_weight(weight).dequantized()[:, : weight.shape[1]]
    product = x.double() @ dense.double().t()
    return product if bias is None else product + bias.double()
