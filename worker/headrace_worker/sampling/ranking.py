"""The highest of many values, without sorting them all.

Invariant: the order is (value falling, index rising), so that ties, which bfloat16 logits have
plenty of, fall the same way every time; what comes out is a prefix of that order, whichever way it
was found. Rejected: a partial sort such as `topk`, which takes any of the equal ones at its end.

The values are cut into strips of equal width; what stands at one place of all strips is a column.
`count` columns whose peak reaches a threshold hold at least `count` values that do, so everything
below the `count`-th highest peak can be left out before anything is sorted. One sweep finds the
peaks, one finds the values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

STRIPS_MAX = 64
"""Values to a column: the peaks are this many times fewer than the values."""

CANDIDATES = 256
"""Values looked at first where it is not known how many are needed."""

_WIDEN = 8


def rows_of(logits: Tensor | Floats) -> Floats:
    """Float32 [M, vocab] as numpy has it, the same memory where that is possible."""
    values = logits.numpy(force=True) if isinstance(logits, Tensor) else logits
    rows: Floats = np.ascontiguousarray(values)
    return rows


def leading(values: Floats, count: int) -> Indices:
    """Indices of the `count` highest of float32 [n], in their order; -inf is never among them.

    Fewer where fewer are finite. No value is NaN.
    """
    threshold = _threshold(values, count)
    found = np.flatnonzero(values > threshold if np.isneginf(threshold) else values >= threshold)
    ordered: Indices = found[_order(values[found])[:count]]
    return ordered


def reaching(values: Floats, weights: Floats, target: float) -> Indices:
    """The fewest of the highest `values` whose `weights` together reach `target`; indices, rising.

    Both float32 [n], no value NaN. All whose value is finite where those do not reach it.
    """
    count = CANDIDATES
    while True:
        order = leading(values, count)
        sums = np.cumsum(weights[order], dtype=np.float64)
        needed = int(np.searchsorted(sums, target)) + 1
        if needed <= len(order) or len(order) < count or count >= len(values):
            kept: Indices = np.sort(order[:needed])
            return kept
        count *= _WIDEN


def _threshold(values: Floats, count: int) -> np.float32:
    """What the `count` highest of `values` reach, if there are so many; -inf for no threshold."""
    # twice as many columns as are wanted: with fewer, a column would often hold two of the highest
    strips = min(STRIPS_MAX, len(values) // (2 * count))
    if strips < 2:
        return np.float32(-np.inf)
    width = len(values) // strips
    peaks = np.maximum.reduce(values[: width * strips].reshape(strips, width), axis=0)
    threshold: np.float32 = np.partition(peaks, width - count)[width - count]
    return threshold


def _order(values: Floats) -> Indices:
    """Indices of float32 [n] by falling value, equal ones rising."""
    # value and index in one integer: numpy sorts those many times faster than it sorts stably.
    # Adding zero makes -0.0 the equal of 0.0.
    bits = (values + np.float32(0)).view(np.int32)
    # the bits of negative floats fall as the numbers rise
    rising = bits ^ ((bits >> 31) & 0x7FFF_FFFF)
    keys = (~rising).astype(np.int64) << 32
    keys |= np.arange(len(values))
    keys.sort()
    keys &= 0xFFFF_FFFF
    return keys
