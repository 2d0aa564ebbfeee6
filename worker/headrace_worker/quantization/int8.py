"""Linear layers in 8 bits: weights per output channel, activations per token, both symmetric.

Invariant: a row's result depends on that row alone, bit for bit, in whatever batch it stands. Every
sum runs over integers that fit the type that holds them (float32 below 2**24 for the rotation,
int32 for the product), so no order of summation can change it; what is left is elementwise.

Both operands are rotated first: each run of 64 columns is multiplied with a Hadamard matrix H, the
activations with H and the weights with H / 64, so the product stays the same. That spreads the few
channels which are many times larger than the rest and would leave 8 bits to nobody else; without
it SmolLM2 loses 4.5 % of perplexity, with it 0.5 %. Rotating whole rows gains nothing more.
Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.

The product is oneDNN's s8 x s8 with the weights packed once, scaled by channel on the way out. One
core with AMX, all layers of SmolLM2, milliseconds at 1 / 32 / 256 rows: bfloat16 22 / 25 / 56,
this 12 / 18 / 53, the same through u8 and a zero point 13 / 18 / 54, `_int_mm` 19 / 24 / 99,
`_weight_int8pack_mm` (float activations) 15 / 99 / 674. Rotating and rounding the activations and
scaling the results bring it to 20 / 37 / 159: ahead of bfloat16 at one row, level at eight, behind
from there on.

Rejected: a static scale per layer (needs calibration data), quantize_per_channel (three times
slower than its parts), two int8 digits per activation (as exact as 16 bits, twice the products),
weighing columns by the norm of their weights before rounding (gains nothing that can be told).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from headrace_worker.probing import one_thread

LEVELS = 127
"""The largest magnitude; -128 stays unused, so that negating is exact."""

_BLOCK_MAX = 64
_EXACT_MAX = 2.0**24
"""Integers up to this, and their sums, are exact in float32."""
_ROW_MAX_MIN = 1e-30
"""Rows below are taken for zero: their scale's inverse would overflow."""
_WEIGHT_ROWS = 4096
"""Rows of a matrix that are quantized at a time, so that a large one costs no second copy."""
_EXACT_COLUMNS = 1024
"""How many products of 127 * 127 float32 sums exactly."""


def block_of(columns: int) -> int:
    """How many columns are rotated together: the power of two, up to 64, that divides them."""
    return min(columns & -columns, _BLOCK_MAX)


@lru_cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix of -1 and 1, symmetric, its square `size` times the identity."""
    if size == 1:
        return torch.ones(1, 1)
    half = _hadamard(size // 2)
    return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)))


def rotate(x: Tensor) -> Tensor:
    """x [N, columns] float32 times the Hadamard matrix; integers up to 2**24 / block stay exact."""
    block = block_of(x.shape[1])
    return torch.mm(x.reshape(-1, block), _hadamard(block)).view(x.shape)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → rotated, int8 [out, in], and the float32 scales [out] of its rows."""
    out, columns = weight.shape
    values = torch.empty(out, columns, dtype=torch.int8)
    scales = torch.empty(out)
    for start in range(0, out, _WEIGHT_ROWS):
        rows = slice(start, start + _WEIGHT_ROWS)
        rotated = rotate(weight[rows].float()) / block_of(columns)
        scale = rotated.abs().amax(1, keepdim=True).clamp_min_(_ROW_MAX_MIN) / LEVELS
        values[rows] = (rotated / scale).round_().to(torch.int8)
        scales[rows] = scale[:, 0]
    return values, scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, in] → rotated, int8 [N, in], and the float32 scales [N, 1] of its rows.

    A row with a NaN or an infinity gets a scale of NaN. The rotation sees the row in steps of its
    largest magnitude / 2**18 (for blocks of 64), which moves what int8 rounds by a sixtieth of a
    step at most.
    """
    wide = x.to(torch.float32, copy=True)
    largest = wide.abs().amax(1, keepdim=True).clamp_min_(_ROW_MAX_MIN)
    steps = (_EXACT_MAX / block_of(x.shape[1])) / largest
    rotated = rotate(wide.mul_(steps).round_())
    largest = rotated.abs().amax(1, keepdim=True).clamp_min_(1.0)
    values = rotated.mul_(LEVELS / largest).round_().to(torch.int8)
    return values, largest.div_(steps).div_(LEVELS)


class _Packed:
    """oneDNN's product: weights packed once, int32 sums, scaled by channel into float32."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack.default(values, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int64)
        self._multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = self._multiply(
            x, 1.0, 0, self._weight, self._scales, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return product


class _Plain:
    """The same numbers wherever torch runs: float32 products of so few columns that none rounds."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self._values, self._scales = values, scales

    def __call__(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), len(self._scales), dtype=torch.int32)
        for start in range(0, x.shape[1], _EXACT_COLUMNS):
            columns = slice(start, start + _EXACT_COLUMNS)
            part = torch.mm(x[:, columns].float(), self._values[:, columns].float().t())
            total += part.to(torch.int32)
        return total.float().mul_(self._scales)


def _packs_exactly() -> bool:
    """Whether this torch has the packed product and this processor sums it without saturating.

    Without VNNI, oneDNN adds pairs of products in 16 bits.
    """
    x = torch.full((2, 256), LEVELS, dtype=torch.int8)
    x[1, ::3] = -LEVELS
    weight, scales = torch.cat((x, -x)), torch.ones(4)
    try:
        with one_thread():
            return torch.equal(_Packed(weight, scales)(x), _Plain(weight, scales)(x))
    except (AttributeError, RuntimeError):  # another build or version of torch
        return False


_PRODUCT: type[_Packed | _Plain] = _Packed if _packs_exactly() else _Plain


class Int8Linear:
    """A Linear with int8 weights that rounds its input to int8, row by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in], best in float32; bias [out] in the dtype of results."""
        values, scales = quantize_weight(weight)
        self._product = _PRODUCT(values, scales)
        self._bias = bias
        self.weight_bytes = values.nbytes + scales.nbytes + (0 if bias is None else bias.nbytes)

    def _wide(self, x: Tensor) -> Tensor:
        values, scales = quantize_rows(x)
        product = self._product(values).mul_(scales)
        return product if self._bias is None else product.add_(self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._wide(x).to(x.dtype)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._wide(x).add_(residual).to(residual.dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What Int8Linear computes, by dequantizing both operands: float64 [N, out]."""
    x_values, x_scales = quantize_rows(x)
    w_values, w_scales = quantize_weight(weight)
    wide = x_values.double() * x_scales.double()
    product = wide @ (w_values.double() * w_scales.double()[:, None]).t()
    return product if bias is None else product + bias.double()
