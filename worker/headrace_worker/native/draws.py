"""Tokens by the kernels, of all rows of a step at once, in the call that computes it or in another.

Invariant: they are those that sampling/filters.py and sampling/draw.py choose from the same logits
and (seed, position), whatever else is in the call: see csrc/sample.inc.h. What the kernels cannot
do, `can_draw` says before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.types import Sampling
from headrace_worker.native.abi import DRAW_BYTES, DRAW_OPTIONS, DRAW_PLACE, Library
from headrace_worker.sampling.ranking import Floats
from headrace_worker.sampling.weights import VOCAB_MAX, scale_of, weigh

FIRST_TO_FIND = -2
"""In place of the token of the highest logit: where it is not known."""

_GREEDY = DRAW_OPTIONS.pack(1, 0, 0, 0, 0)
_SEEDS = (1 << 64) - 1


def can_draw(sampling: Sampling, vocab_size: int) -> bool:
    """Whether the kernels know all of its filters."""
    return sampling.typical_p >= 1 and vocab_size <= VOCAB_MAX


def options_of(sampling: Sampling, vocab_size: int) -> bytes:
    """What the kernels are told of a job once."""
    s = sampling
    if s.temperature <= 0:
        return _GREEDY
    top_k = s.top_k if s.top_k < vocab_size else 0
    return DRAW_OPTIONS.pack(min(s.top_p, 1), scale_of(s.temperature), max(s.min_p, 0), top_k, 0)


class Draws:
    """The rows of one step whose tokens are to be chosen."""

    __slots__ = ("_packed",)

    def __init__(self) -> None:
        self._packed = bytearray()

    def add(self, options: bytes, seed: int, position: int, row: int, top: int) -> None:
        """`top`: the token of the row's first highest logit, which is finite, or FIRST_TO_FIND."""
        self._packed += options
        self._packed += DRAW_PLACE.pack(seed & _SEEDS, position, row, top)

    def __len__(self) -> int:
        return len(self._packed) // DRAW_BYTES

    @property
    def packed(self) -> bytearray:
        """What the kernels read, and write tokens to."""
        return self._packed

    def tokens(self) -> dict[int, int]:
        """What was drawn, by row; -1 where a row has no finite maximum."""
        words = np.frombuffer(self._packed, np.int64).reshape(len(self), -1)
        return dict(words[:, -2:].tolist())

    def run(self, library: Library, logits: Floats) -> dict[int, int]:
        """The tokens by row of `logits`, float32 [M, vocab], contiguous."""
        if not self._packed:
            return {}
        library.sample(logits, self._packed)
        return self.tokens()


def tops_of(library: Library, logits: Floats) -> Sequence[int]:
    """Of float32 [M, vocab]: the index of each row's first highest number; -1 if not finite."""
    draws = Draws()
    for row in range(len(logits)):
        draws.add(_GREEDY, 0, 0, row, FIRST_TO_FIND)
    return list(draws.run(library, logits).values())


def weigh_by(
    library: Library | None, logits: Floats, best: np.float32, temperature: float, out: Floats
) -> Floats:
    """`weigh`, by the kernels where they are; of contiguous float32 [n], into `out`."""
    if library is None:
        return weigh(logits, best, temperature, out)
    library.weigh(logits, float(best), float(scale_of(temperature)), out)
    return out
