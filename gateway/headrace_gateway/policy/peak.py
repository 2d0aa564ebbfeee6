"""How much KV a set of jobs will hold at its worst moment: the Past-Future peak.

Invariant: the peak is the most tokens that are held at any instant if every job makes one token a
step until its predicted end and then lets go of everything. Whatever one job holds only grows until
it ends, so the worst instant is the end of one of them: with jobs sorted by remaining output, most
first, the one at place i (from 1) ends when the i jobs up to it hold `sum(held) + remaining_i * i`.
Rejected: reserving `held + remaining` of every job, which are never all there at once and leave a
third of the pool idle; a fixed watermark on what is held now, which forgets that outputs grow.
Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025,
arXiv 2507.10150).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, count
from operator import add, mul


def peak_tokens(running: Sequence[tuple[int, int]]) -> int:
    """The most KV tokens that jobs of (tokens held now, output tokens to come) hold at a time."""
    peak = held = 0
    by_remaining = sorted(running, key=lambda job: -job[1])
    for place, (tokens, remaining) in enumerate(by_remaining, 1):
        held += tokens
        peak = max(peak, held + remaining * place)
    return peak


class PeakProfile:
    """The peaks of a fixed set of jobs, so that what one more adds costs O(log n).

    At places before the candidate's nothing changes, at later ones the candidate has made as many
    tokens as the job that ends there: two running maxima say the rest.
    """

    __slots__ = ("_before", "_behind", "_ends", "_sums", "peak")

    def __init__(self, by_remaining: Sequence[tuple[int, int]]) -> None:
        """`by_remaining`: (held, remaining), the most remaining output first."""
        remaining = [job[1] for job in by_remaining]
        self._ends = [-each for each in remaining]
        self._sums = list(accumulate((job[0] for job in by_remaining), initial=0))
        peaks = list(map(add, self._sums[1:], map(mul, remaining, count(1))))
        self._before = list(accumulate(peaks, max, initial=0))
        with_another = map(add, reversed(peaks), reversed(remaining))
        self._behind = list(accumulate(with_another, max, initial=0))
        self._behind.reverse()
        self.peak = self._before[-1]

    @property
    def held(self) -> int:
        """Tokens held now."""
        return self._sums[-1]

    def peak_with(self, held: int, remaining: int) -> int:
        """The peak if a job that holds `held` and has `remaining` output to make came as well."""
        place = bisect_right(self._ends, -remaining)
        ends = self._sums[place] + held + remaining * (place + 1)
        return max(self._before[place], ends, self._behind[place] + held)
