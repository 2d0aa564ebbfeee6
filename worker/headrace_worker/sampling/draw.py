"""One index by inverse CDF: the first one whose cumulated weight exceeds u of the whole.

Invariant: what is drawn has weight, and depends on the weights and u alone: every sum here is taken
over one row, in one order, by one thread. Rejected: kernels over the whole batch, which split their
sums by its shape and by the number of threads, so that a row's last bits would depend on its
company; they also walk the whole batch once an operation, where a row stays in the CPU's cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace_worker.sampling.ranking import Floats

BLOCK = 256
"""Weights summed in float32 before the sums are cumulated in float64."""


def draw(weights: Floats, u: float) -> int:
    """An index of unnormalized `weights`, float32 [n], by u from [0, 1). One weight is positive."""
    start, target = 0, None
    if len(weights) > BLOCK:
        sums = np.cumsum(_block_sums(weights), dtype=np.float64)
        target = u * float(sums[-1])
        block = _place(sums, target)
        target -= float(sums[block - 1]) if block else 0.0
        start = block * BLOCK
        weights = weights[start : start + BLOCK]
    sums = np.cumsum(weights, dtype=np.float64)
    return start + _place(sums, u * float(sums[-1]) if target is None else target)


def total(weights: Floats) -> float:
    """The sum of float32 [n], at least as good as float32."""
    sums = _block_sums(weights) if len(weights) > BLOCK else weights
    return float(sums.sum(dtype=np.float64))


def _block_sums(weights: Floats) -> Floats:
    """Sums of BLOCK weights each, of the rest in the last one; float32 [ceil(n / BLOCK)]."""
    blocks, rest = divmod(len(weights), BLOCK)
    sums = np.empty(blocks + bool(rest), np.float32)
    np.add.reduce(weights[: blocks * BLOCK].reshape(blocks, BLOCK), axis=1, out=sums[:blocks])
    if rest:
        sums[-1] = weights[blocks * BLOCK :].sum()
    return sums


def _place(sums: NDArray[np.float64], target: float) -> int:
    # rounding may place a draw on the far end, where there is no weight any more
    inside = min(target, float(np.nextafter(sums[-1], 0)))
    return int(np.searchsorted(sums, inside, side="right"))
