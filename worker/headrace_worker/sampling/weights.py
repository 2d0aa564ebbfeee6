"""What a token weighs in a draw: exp((logit - best) / temperature), the same bits everywhere.

Invariant: a weight comes of single roundings of float32 that every machine makes alike, and is a
multiple of GRID from 0 to 1. So a float64 holds any sum over a vocabulary exactly, and the order in
which it is taken cannot matter: the native kernels (csrc/sample.inc.h), which make the same
roundings, draw the same tokens, however they divide the work.

A token weighs nothing where it is less than half of GRID beside the most probable one: 3e-11.

Rejected: the `exp` of a library, which rounds as its version and the processor like; sums in
float32, whose order would have to be agreed on.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from headrace_worker.sampling.ranking import Floats

TEMPERATURE_MIN = 1e-30
"""Any temperature below it is as good as this one, whose reciprocal is still a float32."""

VOCAB_MAX = 1 << 19
"""Of so many weights every sum is exact: 53 bits above GRID."""
GRID = 2.0**-34

_ROUNDER = np.float32(GRID * (1 << 23))
"""What is added to it has lost what is finer than GRID."""
_LOWEST = np.float32(-64)
"""The exponent of 2 below which everything rounds to 0."""
# of 2 ** f from f = -0.5 to 0.5: of those polynomials of degree 5 that give 1 for 0 the one whose
# largest relative error is least, 9e-8
_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (0.001326472731307149, 0.009671512991189957, 0.05550733581185341,
              0.24022242426872253, 0.6931470036506653, 1.0)
)  # fmt: skip


def scale_of(temperature: float) -> np.float32:
    """What a logit's distance from the best one is multiplied with."""
    return np.float32(math.log2(math.e) / max(temperature, TEMPERATURE_MIN))


def weigh(logits: Floats, best: np.float32, temperature: float, out: Floats | None) -> Floats:
    """The weights, float32 [n], of logits [n] of which none is NaN; into `out` if given.

    The highest logit, `best`, goes first: a tiny temperature must underflow, never overflow.
    """
    fraction = np.subtract(logits, best, out=out)
    fraction *= scale_of(temperature)
    np.maximum(fraction, _LOWEST, out=fraction)
    whole = np.rint(fraction)
    fraction -= whole
    weights = fraction * _POLYNOMIAL[0]
    for coefficient in _POLYNOMIAL[1:-1]:
        weights += coefficient
        weights *= fraction
    weights += _POLYNOMIAL[-1]
    bits = weights.view(np.int32)
    bits += whole.astype(np.int32) << 23
    weights += _ROUNDER
    return np.subtract(weights, _ROUNDER, out=fraction)


def total(weights: NDArray[np.floating]) -> float:
    """Their sum."""
    return float(np.add.reduce(weights, dtype=np.float64))
