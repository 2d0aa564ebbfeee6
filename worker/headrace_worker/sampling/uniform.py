"""Randomness from (seed, output position) alone.

Invariant: the number drawn for a token depends on nothing else, so that a job continues with the
same choices on another worker, in another batch, after any preemption. Rejected: a generator per
sequence, whose state would have to travel with the job.

Source: SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014) used as a counter-based hash: its finalizer, with Stafford's constants "Mix13", over
the mixed seed plus the position times the golden gamma, and once more for each number of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


NUMBERS = 4
"""Numbers for one token: enough choices of 32 for a million of them."""


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """NUMBERS in [0, 1) per (seed, position), float64 [M, NUMBERS]. Seeds count modulo 2**64."""
    seed = np.array([s & _MASK for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    # arrays wrap silently, which is what the hash wants
    mixed = _mix(_mix(seed + _GAMMA) + (position + np.uint64(1)) * _GAMMA)
    each = _mix(mixed[:, None] + np.arange(1, NUMBERS + 1, dtype=np.uint64) * _GAMMA)
    return (each >> np.uint64(11)).astype(np.float64) * 2.0**-53
