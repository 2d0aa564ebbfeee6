"""How fast one worker is, learned from its reports.

Invariant: a figure is 0 until enough was seen. A report says how long engine steps took and what
they did, prompts and output together; least squares over the recent reports tell the two apart:
`busy = prefill * a + output * b`, with sums that fade by half for every HALF_LIFE_MS of work.
Rejected: tokens over time, by which a worker looks slow at prompts while it mostly decodes.
"""

from __future__ import annotations

HALF_LIFE_MS = 10_000
BUSY_MS_MIN = 500
"""Less work than this says nothing."""
LEAST_PART = 0.01
"""Of the mean of all tokens: what a prompt token costs at least, whatever noise says."""
SAME = 1.2
"""Workers within this factor of the mean count as equally fast."""
_SAME_LEAST = 1 / SAME
SLOWNESS_MAX = 4.0


class Speeds:
    """Least squares of busy time over prompt and output tokens."""

    __slots__ = ("_bo", "_bp", "_busy", "_oo", "_output", "_po", "_pp", "_prefill", "prefill_per_s")

    def __init__(self) -> None:
        self.prefill_per_s = 0.0
        """Prompt tokens in a second of nothing else; 0 while unknown."""
        self._busy = self._prefill = self._output = 0.0
        self._pp = self._po = self._oo = self._bp = self._bo = 0.0

    def note(self, busy_ms: int, prefill_tokens: int, output_tokens: int) -> None:
        """One report."""
        if busy_ms <= 0:
            return
        keep = 0.5 ** (busy_ms / HALF_LIFE_MS)
        p, o, b = float(prefill_tokens), float(output_tokens), float(busy_ms)
        self._busy = keep * self._busy + b
        self._prefill = keep * self._prefill + p
        self._output = keep * self._output + o
        self._pp = keep * self._pp + p * p
        self._po = keep * self._po + p * o
        self._oo = keep * self._oo + o * o
        self._bp = keep * self._bp + b * p
        self._bo = keep * self._bo + b * o
        self.prefill_per_s = self._solved()

    def _solved(self) -> float:
        if self._busy < BUSY_MS_MIN or not self._pp:
            return 0.0
        determinant = self._pp * self._oo - self._po * self._po
        if determinant > 1e-3 * self._pp * self._oo:
            per_token = (self._bp * self._oo - self._bo * self._po) / determinant
        else:
            per_token = self._bp / self._pp  # prompts and output always came together, or alone
        mean = self._busy / (self._prefill + self._output)
        return 1000 / (max(per_token, LEAST_PART * mean) if per_token > 0 else mean)


def slowness(own_per_s: float, mean_per_s: float) -> float:
    """How long a worker takes for what takes 1 at the mean speed; 1 where they are alike, or while
    either is 0, unknown."""
    if not own_per_s or not mean_per_s:
        return 1.0
    factor = mean_per_s / own_per_s
    if _SAME_LEAST <= factor <= SAME:
        return 1.0
    return min(SLOWNESS_MAX, max(1 / SLOWNESS_MAX, factor))
